"""The public `Generation` service: text in front, token ids behind.

It speaks the same service that it calls. Prompts become ids in a thread, ids become text as they come (`answers.py`).
Whatever ends the call, the call to the controller ends with it: the open stream is the request. A stream that stops
short of its end is an error, never a false finish.

The operator's calls, which say what is kept in memory for everybody, are served only where the settings say so: the
port asks nobody who he is, and on a port that others reach they would be everybody's.
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
from quire.cluster.answers import Answers
from quire.cluster.errors import RequestError, invalid
from quire.cluster.text import TextError, Tokenizer
from quire.protos import generation_pb2 as pb
from quire.protos.channel import bearer
from quire.scheduler.params import (
    MAX_LOGIT_BIAS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    InvalidRequest,
)
from quire.scheduler.request import check_cache_salt

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
    enable_admin: bool = False
    """Serve the operator's calls on the public port."""
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
            "Explain": (self.explain, pb.ExplainRequest),
            "ReservePrefix": (self.reserve_prefix, pb.ReservePrefixRequest),
            "ReleasePrefix": (self.release_prefix, pb.ReleasePrefixRequest),
            "ListPrefixes": (self.list_prefixes, pb.ListPrefixesRequest),
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
        upstream = pb.GenerateRequest(
            request_id=request_id, sampling=request.sampling, cache_salt=_cache_salt(request.cache_salt)
        )
        upstream.token_ids.ids.extend(ids)
        for field in ("stop", "include_stop_str_in_output", "skip_special_tokens"):
            upstream.sampling.ClearField(field)

        answers = Answers(request, ids, self._tokenizer)
        model = request.model or self._settings.model_names[0]
        call = self._upstream.Generate(upstream)
        try:
            async for message in call:
                if message.WhichOneof("event") == "started":
                    message.started.model = model
                    await context.write(message)
                    continue
                responses = answers.take(message)
                for response in responses:
                    await context.write(response)
                if answers.is_cut_short:
                    return
                if message.HasField("output") and responses and responses[-1].HasField("finished"):
                    self._drop(request_id, responses[-1].finished.index)
        finally:
            # However this ends. On a call that has ended by itself it does nothing.
            call.cancel()
        answers.check_complete()

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

    async def explain(self, request: pb.ExplainRequest, context: Context) -> pb.Explanation:
        if not request.request_id:
            raise invalid("request_id", "name the request to explain: its request_id is in the Started message")
        request.with_names = self._settings.enable_admin
        explanation: pb.Explanation = await self._upstream.Explain(request, **self._forwarded(context))
        return explanation

    # -- the operator's calls

    async def reserve_prefix(self, request: pb.ReservePrefixRequest, context: Context) -> pb.ReservedPrefix:
        self._require_admin()
        return await self.reserve(request, **self._forwarded(context))

    async def release_prefix(self, request: pb.ReleasePrefixRequest, context: Context) -> pb.ReleasePrefixResponse:
        self._require_admin()
        response: pb.ReleasePrefixResponse = await self._upstream.ReleasePrefix(request, **self._forwarded(context))
        return response

    async def list_prefixes(self, request: pb.ListPrefixesRequest, context: Context) -> pb.ListPrefixesResponse:
        self._require_admin()
        response: pb.ListPrefixesResponse = await self._upstream.ListPrefixes(request, **self._forwarded(context))
        return response

    async def reserve(self, request: pb.ReservePrefixRequest, **options: Any) -> pb.ReservedPrefix:
        """Whoever asks. Raises RequestError, or AioRpcError where the controller refuses."""
        if not 0 < len(request.name) <= MAX_REQUEST_ID or not request.name.isprintable():
            raise invalid("name", f"a prefix's name has 1 to {MAX_REQUEST_ID} printable characters")
        salt = _cache_salt(request.cache_salt)
        ids = await self._prompt_ids(request)
        upstream = pb.ReservePrefixRequest(name=request.name, token_ids=pb.TokenIds(ids=ids), cache_salt=salt)
        reserved: pb.ReservedPrefix = await self._upstream.ReservePrefix(upstream, **options)
        return reserved

    def _require_admin(self) -> None:
        if not self._settings.enable_admin:
            message = "reserved prefixes are the operator's: the server serves these calls with --enable-admin only"
            raise RequestError(grpc.StatusCode.PERMISSION_DENIED, message, reason="ADMIN_DISABLED")

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

    async def _prompt_ids(self, request: pb.GenerateRequest | pb.ReservePrefixRequest) -> Sequence[int]:
        """Of a whole prompt, or of the beginning of prompts, where a conversation goes on."""
        is_whole = isinstance(request, pb.GenerateRequest)
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
                tokenizer = self._require_tokenizer("conversation")
                ids = await self._conversation_ids(tokenizer, request.conversation, is_whole)
            case _:
                raise invalid("prompt", "the prompt is not set: give text, token_ids or a conversation")
        if not ids:
            raise invalid("prompt", "the prompt has no tokens: the model's tokenizer drops all of its characters")
        return ids

    async def _conversation_ids(
        self, tokenizer: Tokenizer, conversation: pb.Conversation, add_generation_prompt: bool = True
    ) -> list[int]:
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
        return await _in_thread(field, tokenizer.encode_chat, turns, add_generation_prompt)

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


def _cache_salt(given: str) -> str:
    try:
        check_cache_salt(given)
    except InvalidRequest as error:
        raise invalid("cache_salt", str(error)) from error
    return given


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
