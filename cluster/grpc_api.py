"""The public `Generation` service: text in front, token ids behind.

It speaks the same service that it calls. Prompts become ids in a thread, ids become text as they come, stop strings end
a sample. Whatever ends the call, the call to the controller ends with it: the open stream is the request. Nothing is
passed on but in order: a gap, a repetition or a stream that stops short of its end is an error, never a false finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import quote

import grpc
from google.protobuf.message import DecodeError, Message

from quire.cluster import errors
from quire.cluster.errors import RequestError, invalid
from quire.cluster.text import SampleText, TextError, Tokenizer
from quire.protos import generation_pb2 as pb
from quire.protos.channel import bearer
from quire.scheduler.params import MAX_LOGIT_BIAS, MAX_STOP_LENGTH, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Method: TypeAlias = Callable[[Any, Context], Awaitable[Any]]
Metadata: TypeAlias = tuple[tuple[str, str], ...]

ROLES = ("system", "user", "assistant")
MAX_REQUEST_ID = 128
MAX_DETOKENIZE = 1 << 16


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """What the service must know of the model it stands before, and its limits."""

    model_names: tuple[str, ...]
    """Names under which the model is served; the first is its own."""
    max_model_len: int
    vocab_size: int
    max_prompt_characters: int = 4 << 20
    max_messages: int = 4096
    internal_token: str | None = None
    """Bearer token that the controller asks for."""


class GenerationService:
    """Without a tokenizer it serves token ids only, and says so to who sends or asks for text."""

    def __init__(self, settings: ApiSettings, upstream: Any, tokenizer: Tokenizer | None) -> None:
        """`upstream`: a RelayStub on a channel to the controller, or a GenerationStub."""
        self._settings = settings
        self._upstream = upstream
        self._tokenizer = tokenizer
        # Looks at the whole vocabulary: better now than while streams are served.
        self._longest_token = tokenizer.longest_token if tokenizer is not None else 0
        self._open = 0
        self._drops: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Returns when no generation is in progress."""
        await self._idle.wait()

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Like the generated function, but a message that cannot be parsed is the client's error and is named so."""
        unary: dict[str, tuple[Method, type[Message]]] = {
            "Abort": (self.abort, pb.AbortRequest),
            "Tokenize": (self.tokenize, pb.TokenizeRequest),
            "Detokenize": (self.detokenize, pb.DetokenizeRequest),
            "GetModelInfo": (self.get_model_info, pb.GetModelInfoRequest),
            "GetLoad": (self.get_load, pb.GetLoadRequest),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                _at_the_edge(method), request_deserializer=_parser(kind), response_serializer=_serialize
            )
            for name, (method, kind) in unary.items()
        }
        handlers["Generate"] = grpc.unary_stream_rpc_method_handler(
            _at_the_edge(self.generate),
            request_deserializer=_parser(pb.GenerateRequest),
            response_serializer=_serialize,
        )
        service = pb.DESCRIPTOR.services_by_name["Generation"].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    # -- the service

    async def generate(self, request: pb.GenerateRequest, context: Context) -> None:
        self._open += 1
        self._idle.clear()
        try:
            await self._generate(request, context)
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _generate(self, request: pb.GenerateRequest, context: Context) -> None:
        self._check_model(request.model)
        self._check_stops(request.sampling)
        _check_sizes(request.sampling)
        request_id = _request_id(request.request_id)
        ids = await self._prompt_ids(request)
        upstream = pb.GenerateRequest(request_id=request_id, sampling=request.sampling)
        upstream.token_ids.ids.extend(ids)
        for field in ("stop", "include_stop_str_in_output", "skip_special_tokens"):
            upstream.sampling.ClearField(field)

        answer = _Answer(request, ids, self._tokenizer)
        model = request.model or self._settings.model_names[0]
        call = self._upstream.Generate(upstream)
        try:
            async for message in call:
                if message.WhichOneof("event") == "started":
                    message.started.model = model
                    await context.write(message)
                    continue
                responses = answer.take(message)
                for response in responses:
                    await context.write(response)
                if answer.is_cut_short:
                    return
                if responses and responses[-1].finished.HasField("stop_string"):
                    self._drop(request_id, responses[-1].finished.index)
        finally:
            # However this ends. On a call that has ended by itself it does nothing.
            call.cancel()
        answer.check_complete()

    async def abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        if not request.request_id:
            raise invalid("request_id", "name the request to end: its request_id is in the Started message")
        response: pb.AbortResponse = await self._upstream.Abort(request, **self._forwarded(context))
        return response

    async def tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        del context
        tokenizer = self._require_tokenizer("input")
        match request.WhichOneof("input"):
            case "text":
                self._check_length("text", len(request.text))
                special = request.add_special_tokens if request.HasField("add_special_tokens") else True
                ids = await _in_thread("text", tokenizer.encode, request.text, special)
            case "conversation":
                ids = await self._conversation_ids(tokenizer, request.conversation)
            case _:
                raise invalid("input", "the input is not set: give text or a conversation")
        return pb.TokenizeResponse(token_ids=ids)

    async def detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        del context
        tokenizer = self._require_tokenizer("token_ids")
        size, count = self._settings.vocab_size, len(request.token_ids)
        if count > MAX_DETOKENIZE:
            raise invalid("token_ids", f"at most {MAX_DETOKENIZE} token ids are taken at once, not {count}")
        if any(token_id >= size for token_id in request.token_ids):
            raise invalid("token_ids", f"token ids must be below the vocabulary's size, {size}")
        text = await asyncio.to_thread(
            tokenizer.decode, request.token_ids, skip_special_tokens=request.skip_special_tokens
        )
        return pb.DetokenizeResponse(text=text)

    async def get_model_info(self, request: pb.GetModelInfoRequest, context: Context) -> pb.ModelInfo:
        info: pb.ModelInfo = await self._upstream.GetModelInfo(request, **self._forwarded(context))
        info.model = self._settings.model_names[0]
        info.has_chat_template = self._tokenizer is not None and self._tokenizer.has_chat_template
        return info

    async def get_load(self, request: pb.GetLoadRequest, context: Context) -> pb.Load:
        load: pb.Load = await self._upstream.GetLoad(request, **self._forwarded(context))
        return load

    def _drop(self, request_id: str, index: int) -> None:
        """Have the controller forget one sample: its siblings go on, and would hold its memory to their end."""

        async def drop() -> None:
            # NOT_FOUND: all of them have ended meanwhile.
            with contextlib.suppress(grpc.aio.AioRpcError):
                request = pb.AbortRequest(request_id=request_id, index=index)
                await self._upstream.Abort(request, metadata=self._metadata(request_id))

        task = asyncio.create_task(drop())
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    # -- checks and prompts

    def _check_model(self, name: str) -> None:
        names = self._settings.model_names
        if name and name not in names:
            served = " or ".join(map(repr, names))
            shown = f" {name!r}" if len(name) <= MAX_REQUEST_ID and name.isprintable() else " of that name"
            message = f"there is no model{shown} here: leave the model empty or send {served}"
            raise RequestError(grpc.StatusCode.NOT_FOUND, message, field="model", reason="MODEL_NOT_FOUND")

    def _check_stops(self, sampling: pb.SamplingParams) -> None:
        if not sampling.stop:
            return
        self._require_tokenizer("sampling.stop")
        if len(sampling.stop) > MAX_STOP_STRINGS:
            raise invalid(
                "sampling.stop", f"at most {MAX_STOP_STRINGS} stop strings are taken, not {len(sampling.stop)}"
            )
        if not all(1 <= len(stop) <= MAX_STOP_LENGTH for stop in sampling.stop):
            raise invalid("sampling.stop", f"each stop string must have 1 to {MAX_STOP_LENGTH} characters")

    def _require_tokenizer(self, field: str) -> Tokenizer:
        if self._tokenizer is None:
            message = "this server has no tokenizer for its model and serves token ids only: send token_ids, no text"
            raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, message, field=field, reason="NO_TOKENIZER")
        return self._tokenizer

    async def _prompt_ids(self, request: pb.GenerateRequest) -> Sequence[int]:
        match request.WhichOneof("prompt"):
            case "token_ids":
                if not request.token_ids.ids:
                    raise invalid("token_ids", "the prompt is empty: send at least one token id")
                self._check_fits(len(request.token_ids.ids))
                return request.token_ids.ids
            case "text":
                tokenizer = self._require_tokenizer("text")
                if not request.text:
                    raise invalid("text", "the prompt is empty: send at least one character")
                self._check_length("text", len(request.text))
                ids = await _in_thread("text", tokenizer.encode, request.text)
            case "conversation":
                ids = await self._conversation_ids(self._require_tokenizer("conversation"), request.conversation)
            case _:
                raise invalid("prompt", "the prompt is not set: give text, token_ids or a conversation")
        if not ids:
            raise invalid("prompt", "the prompt has no tokens: the model's tokenizer drops all of its characters")
        return ids

    async def _conversation_ids(self, tokenizer: Tokenizer, conversation: pb.Conversation) -> list[int]:
        field = "conversation"
        if not tokenizer.has_chat_template:
            message = "the model has no chat template: send the prompt as text, in the form it was trained on"
            raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, message, field=field, reason="NO_CHAT_TEMPLATE")
        messages = conversation.messages
        if not messages:
            raise invalid(field, "the conversation is empty: send at least one message")
        if len(messages) > self._settings.max_messages:
            raise invalid(field, f"at most {self._settings.max_messages} messages are taken, not {len(messages)}")
        for position, turn in enumerate(messages):
            if turn.role not in ROLES:
                raise invalid(f"{field}.messages[{position}].role", f"the role must be one of {', '.join(ROLES)}")
        self._check_length(field, sum(len(turn.content) for turn in messages))
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        return await _in_thread(field, tokenizer.encode_chat, turns)

    def _check_fits(self, count: int) -> None:
        """Of token ids; the controller checks it too, but what cannot fit is not to be carried there."""
        most = self._settings.max_model_len - 1
        if count > most:
            message = f"the prompt has {count} tokens, but at most {most} fit: one of the context is for the answer"
            raise invalid("token_ids", message, reason="CONTEXT_LENGTH_EXCEEDED")

    def _check_length(self, field: str, characters: int) -> None:
        """Before a text is tokenized, which costs time, refuse the one that cannot fit."""
        limit = self._settings.max_prompt_characters
        if characters > limit:
            raise invalid(field, f"the text has {characters} characters, the limit is {limit}")
        length = self._settings.max_model_len
        if characters > length * self._longest_token:
            message = f"the text has {characters} characters, more than max_model_len ({length} tokens) can hold"
            raise invalid(field, message, reason="CONTEXT_LENGTH_EXCEEDED")

    # -- upstream

    def _metadata(self, request_id: str) -> Metadata:
        # Header values are ASCII; an id is anything printable.
        name = quote(request_id, safe=" !#$&'()*+,/:;=?@[]")
        return (("x-request-id", name), *bearer(self._settings.internal_token))

    def _forwarded(self, context: Context) -> dict[str, Any]:
        """Of a short call: the remaining time, and the id under which its client logs it."""
        given = dict(context.invocation_metadata() or ()).get("x-request-id")
        request_id = given if isinstance(given, str) else _request_id("")
        return {"timeout": context.time_remaining(), "metadata": self._metadata(request_id)}


class _Answer:
    """All samples of one request on their way to the client."""

    def __init__(self, request: pb.GenerateRequest, ids: Sequence[int], tokenizer: Tokenizer | None) -> None:
        self._sampling = request.sampling
        self._tokenizer = tokenizer
        # A completion goes on where the prompt ends; an answer in a conversation begins a text of its own.
        self._before = () if request.WhichOneof("prompt") == "conversation" else tuple(ids[-16:])
        self._samples: dict[int, _Sample] = {}
        self._unfinished = request.sampling.n if request.sampling.HasField("n") else 1
        self._cut = False

    @property
    def is_cut_short(self) -> bool:
        """Every sample has ended, and not all of them upstream, where they would go on."""
        return self._unfinished == 0 and self._cut

    def check_complete(self) -> None:
        if self._unfinished:
            raise RequestError(grpc.StatusCode.INTERNAL, "the controller ended the stream before the request's end")

    def take(self, message: pb.GenerateResponse) -> list[pb.GenerateResponse]:
        """What to send for one message from upstream."""
        kind = message.WhichOneof("event")
        event = message.output if kind == "output" else message.finished
        sample = self._samples.get(event.index)
        if sample is None:
            sample = self._samples[event.index] = self._new_sample()
        if sample.is_finished:  # by a stop string, of which the controller does not know
            return []
        if event.seq != sample.seq:
            raise RequestError(
                grpc.StatusCode.INTERNAL,
                f"sample {event.index}: token {event.seq} from the controller where {sample.seq} is next",
            )
        if kind == "finished":
            sample.finish(message.finished)
            self._unfinished -= 1
            return [message]
        stop = sample.take(message.output)
        if stop is None:
            return [message]
        self._unfinished -= 1
        self._cut = True
        finished = pb.Finished(index=event.index, seq=sample.seq, reason=pb.FINISH_REASON_STOP, stop_string=stop)
        return [message, pb.GenerateResponse(finished=finished)]

    def _new_sample(self) -> _Sample:
        return _Sample(self._sampling, self._before, self._tokenizer)


class _Sample:
    """One sample: how far it is, and its text on the way."""

    def __init__(self, sampling: pb.SamplingParams, before: Sequence[int], tokenizer: Tokenizer | None) -> None:
        self.seq = 0
        self.is_finished = False
        self._tokenizer = tokenizer
        if tokenizer is not None:
            self._text = SampleText(
                tokenizer,
                stops=tuple(sampling.stop),
                include_stop=sampling.include_stop_str_in_output,
                stop_token_ids=sampling.stop_token_ids,
                min_tokens=sampling.min_tokens,
                skip_special_tokens=not sampling.HasField("skip_special_tokens") or sampling.skip_special_tokens,
                context=before,
            )

    def take(self, output: pb.Output) -> str | None:
        """Add the text, cut after the token that completes a stop string; returns that."""
        if self._tokenizer is None:
            self.seq += len(output.token_ids)
            return None
        text, stop = [], None
        for count, token_id in enumerate(output.token_ids, start=1):
            self.seq += 1
            piece, stop = self._text.feed(token_id)
            text.append(piece)
            if stop is not None:
                del output.token_ids[count:]
                del output.logprobs[count:]
                break
        output.text = "".join(text)
        for position in output.logprobs:
            for candidate in position.candidates:
                candidate.token = self._tokenizer.token_text(candidate.token_id)
        self.is_finished = stop is not None
        return stop

    def finish(self, finished: pb.Finished) -> None:
        """The controller's end: release what was held back."""
        self.is_finished = True
        if self._tokenizer is None:
            return
        finished.text, stop = self._text.finish()
        if stop is not None:
            finished.reason = pb.FINISH_REASON_STOP
            finished.stop_string = stop


def _check_sizes(sampling: pb.SamplingParams) -> None:
    """Before a list is copied and carried on, refuse the one that is too long whatever is in it."""
    for field, limit in (("logit_bias", MAX_LOGIT_BIAS), ("stop_token_ids", MAX_STOP_TOKEN_IDS)):
        count = len(getattr(sampling, field))
        if count > limit:
            raise invalid(f"sampling.{field}", f"{field} may have at most {limit} entries, not {count}")


def _request_id(given: str) -> str:
    if len(given) > MAX_REQUEST_ID or not given.isprintable():
        raise invalid("request_id", f"a request_id has at most {MAX_REQUEST_ID} printable characters")
    return given or secrets.token_hex(16)


async def _in_thread(field: str, encode: Callable[..., list[int]], *arguments: Any) -> list[int]:
    try:
        return await asyncio.to_thread(encode, *arguments)
    except TextError as error:
        raise invalid(field, str(error)) from error


# -- the edge: bytes in, statuses out


def _parser(kind: type[Message]) -> Callable[[bytes], Message | DecodeError]:
    """gRPC answers UNKNOWN when a deserializer raises, so what is wrong travels to the handler as a value."""

    def parse(data: bytes) -> Message | DecodeError:
        try:
            return kind.FromString(data)
        except DecodeError as error:
            return error

    return parse


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _at_the_edge(method: Method) -> Method:
    """The only place where an exception becomes a status."""

    async def handle(request: Any, context: Context) -> Any:
        try:
            if isinstance(request, DecodeError):
                raise RequestError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "the message cannot be parsed: it is no valid protobuf, or a string in it is not UTF-8",
                    reason="MALFORMED_MESSAGE",
                )
            return await method(request, context)
        except RequestError as error:
            await errors.abort(context, error)
        except grpc.aio.AioRpcError as failure:
            await errors.relay(context, failure)
        except Exception:
            log.exception("unexpected failure while serving a call")
            message = "the server failed on this call; its log says why"
            await errors.abort(context, RequestError(grpc.StatusCode.INTERNAL, message))

    return handle
