"""A small blocking client: for the command line, batches, benchmarks and tests.

One `Client` is one channel; it may be used from several threads. Every failure is a `ServerError` with the server's
own sentence. Dropping the iterator of a generation ends the request on the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc

from quire.cluster import errors
from quire.protos import generation_pb2 as pb
from quire.protos import generation_pb2_grpc as pb_grpc
from quire.protos.channel import PUBLIC_CHANNEL_OPTIONS

T = TypeVar("T")
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or a conversation: messages with `role` and `content`."""

_POLL_S = 0.1


class ServerError(Exception):
    """The server refused or failed, or there is none. `code` is the gRPC status."""

    def __init__(self, error: errors.RequestError) -> None:
        super().__init__(error.message)
        self.code = error.code
        self.message = error.message
        self.field = error.field
        self.reason = error.reason
        self.retry_after_s = error.retry_after_s


class Client:
    def __init__(self, target: str = "127.0.0.1:50051") -> None:
        self.target = target
        self._channel = grpc.insecure_channel(target, options=PUBLIC_CHANNEL_OPTIONS)
        self._stub: Any = pb_grpc.GenerationStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        cache_salt: str | None = None,
        timeout: float | None = None,
        **sampling: Any,
    ) -> Iterator[pb.GenerateResponse]:
        """Stream the answer's messages. `sampling`: the fields of SamplingParams; None is as good as not given.
        `early_stopping` is True, False or "never"."""
        request = pb.GenerateRequest(model=model, request_id=request_id, cache_salt=cache_salt)
        set_prompt(request, prompt)
        given = {name: value for name, value in sampling.items() if value is not None}
        if "early_stopping" in given:
            given["early_stopping"] = f"EARLY_STOPPING_{given['early_stopping']}".upper()
        request.sampling.CopyFrom(pb.SamplingParams(**given))
        call = self._stub.Generate(request, timeout=timeout)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._failure(error) from error
        finally:
            call.cancel()

    def complete(self, prompt: Prompt, **options: Any) -> str:
        """The whole text of the first sample, or of the best answer."""
        return "".join(text for index, text in texts(self.generate(prompt, **options)) if index == 0)

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Iterator[str]:
        """The answer's text, as it comes."""
        return (text for index, text in texts(self.generate(messages, **options)) if index == 0)

    def abort(self, request_id: str, timeout: float | None = None) -> None:
        self._call(self._stub.Abort, pb.AbortRequest(request_id=request_id), timeout)

    def tokenize(
        self, prompt: str | Sequence[Mapping[str, str]], timeout: float | None = None, **options: Any
    ) -> list[int]:
        request = pb.TokenizeRequest(**options)
        set_prompt(request, prompt)
        response: pb.TokenizeResponse = self._call(self._stub.Tokenize, request, timeout)
        return list(response.token_ids)

    def detokenize(self, token_ids: Sequence[int], timeout: float | None = None, **options: Any) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, **options)
        response: pb.DetokenizeResponse = self._call(self._stub.Detokenize, request, timeout)
        return response.text

    def model_info(self, timeout: float | None = None) -> pb.ModelInfo:
        info: pb.ModelInfo = self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest(), timeout)
        return info

    def load(self, timeout: float | None = None) -> pb.Load:
        load: pb.Load = self._call(self._stub.GetLoad, pb.GetLoadRequest(), timeout)
        return load

    def explain(self, request_id: str, timeout: float | None = None) -> pb.Explanation:
        """The life of a request, in progress or ended not long ago."""
        request = pb.ExplainRequest(request_id=request_id)
        explanation: pb.Explanation = self._call(self._stub.Explain, request, timeout)
        return explanation

    def reserve_prefix(
        self, name: str, prefix: Prompt, cache_salt: str = "", timeout: float | None = None
    ) -> pb.ReservedPrefix:
        """Keep what prompts begin with: text, token ids, or the first messages of conversations."""
        request = pb.ReservePrefixRequest(name=name, cache_salt=cache_salt)
        set_prompt(request, prefix)
        reserved: pb.ReservedPrefix = self._call(self._stub.ReservePrefix, request, timeout)
        return reserved

    def release_prefix(self, name: str, timeout: float | None = None) -> None:
        self._call(self._stub.ReleasePrefix, pb.ReleasePrefixRequest(name=name), timeout)

    def prefixes(self, timeout: float | None = None) -> list[pb.ReservedPrefix]:
        listed: pb.ListPrefixesResponse = self._call(self._stub.ListPrefixes, pb.ListPrefixesRequest(), timeout)
        return list(listed.prefixes)

    def wait_ready(self, timeout: float) -> pb.ModelInfo:
        """Until the model is served; a server that is still starting or loading is waited for."""
        deadline = time.monotonic() + timeout
        while True:
            remaining = deadline - time.monotonic()
            try:
                return self.model_info(timeout=max(remaining, _POLL_S))
            except ServerError as error:
                starting = error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED)
                if not starting or remaining < _POLL_S:
                    raise
            time.sleep(_POLL_S)

    def _call(self, method: Callable[..., T], request: Any, timeout: float | None) -> T:
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise self._failure(error) from error

    def _failure(self, failure: grpc.RpcError) -> ServerError:
        error = errors.from_rpc_error(failure)
        if error.code == grpc.StatusCode.UNAVAILABLE and error.reason is None:
            error.message = (
                f"no server answers at {self.target}: start one with `quire serve`, or name another with --url"
                f" ({error.message})"
            )
        if error.code == grpc.StatusCode.DEADLINE_EXCEEDED and error.reason is None:
            error.message = "the time limit was over before the answer was complete: allow more with --timeout"
        return ServerError(error)


def texts(responses: Iterator[pb.GenerateResponse]) -> Iterator[tuple[int, str]]:
    """(sample, text) of every message that brings some."""
    for response in responses:
        match response.WhichOneof("event"):
            case "output" if response.output.text:
                yield response.output.index, response.output.text
            case "finished" if response.finished.text:
                yield response.finished.index, response.finished.text


def set_prompt(request: Any, prompt: Prompt) -> None:
    """Into the oneof of a GenerateRequest, a ReservePrefixRequest or a TokenizeRequest; the empty list is a list of
    token ids."""
    if isinstance(prompt, str):
        request.text = prompt
        return
    messages = [pb.ChatMessage(**item) for item in prompt if isinstance(item, Mapping)]
    if messages:
        request.conversation.messages.extend(messages)
    else:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(prompt)
