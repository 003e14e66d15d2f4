"""Between gateway and controller: many requests over one stream, what a step has made for all of them in one message.

With a stream for each request, a step of n sequences is n messages, each sent, received and woken up for by itself: the
two processes then cost more than the scheduler and the text together. Both ends speak as if there were no relay. The
controller's `Generate` is called once per request; the gateway calls a stub's `Generate`. The one stream's end, from
whatever side, ends all of its requests.

Most of what a step makes is one token for each sequence and nothing else. Such tokens pass `Generate` by, through its
context, and travel as columns: on the controller's side nobody is woken up for them but who writes the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc

from quire.cluster import errors, wire
from quire.cluster.errors import RequestError
from quire.protos import generation_pb2 as pb
from quire.protos import generation_pb2_grpc, relay_pb2, relay_pb2_grpc

log = logging.getLogger(__name__)

Generate = Callable[[pb.GenerateRequest, Any], AsyncIterator[pb.GenerateResponse]]

MAX_ANSWERS = 512
"""In one message: what a gateway finds waiting that was stopped for a while, or for which many long answers end in one
step, must not exceed what it can receive. Of `wire.MAX_TOKENS_PER_MESSAGE` tokens each with 20 log-probabilities beside
its own, they are 40 of its 64 megabytes."""

MAX_COLUMN = 2048
"""Tokens of one answer."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}


# -- the controller's end


class RelayService(relay_pb2_grpc.RelayServicer):
    """Runs `generate`, a `Generation.Generate` over token ids, once per call."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate

    def add_to_server(self, server: grpc.aio.Server) -> None:
        relay_pb2_grpc.add_RelayServicer_to_server(self, server)

    async def Open(
        self, request_iterator: AsyncIterator[relay_pb2.RelayCalls], _context: Any
    ) -> AsyncIterator[relay_pb2.RelayAnswers]:
        served = _Served(self._generate)
        reader = asyncio.create_task(served.read(request_iterator))
        try:
            while answers := await served.take():
                yield relay_pb2.RelayAnswers(answers=answers)
        finally:
            reader.cancel()
            served.cancel_all()


class _Served:
    """The requests of one stream."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._answers: list[relay_pb2.RelayAnswer | _Tokens] = []
        self._ready = asyncio.Event()
        self._is_over = False

    async def read(self, stream: AsyncIterator[relay_pb2.RelayCalls]) -> None:
        """Start and cancel what the gateway says, until it says no more."""
        try:
            async for message in stream:
                for call in message.calls:
                    if call.HasField("generate"):
                        self._tasks[call.key] = asyncio.create_task(self._serve(call.key, call.generate))
                    elif task := self._tasks.get(call.key):
                        task.cancel()
        finally:
            self._is_over = True
            self._ready.set()

    async def take(self) -> list[relay_pb2.RelayAnswer]:
        """What has come since the last time; empty when the stream is over."""
        while not self._answers and not self._is_over:
            self._ready.clear()
            await self._ready.wait()
        if self._is_over:
            return []
        taken, self._answers = self._answers[:MAX_ANSWERS], self._answers[MAX_ANSWERS:]
        return [answer.encode() if isinstance(answer, _Tokens) else answer for answer in taken]

    def cancel_all(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _serve(self, key: int, request: pb.GenerateRequest) -> None:
        end = relay_pb2.CallEnd()
        try:
            async for response in self._generate(request, RelayContext(functools.partial(self._put_token, key))):
                self._put(relay_pb2.RelayAnswer(key=key, response=response))
        except _Aborted as aborted:
            end = aborted.end
        except Exception as error:
            log.exception("unexpected failure while serving a request")
            end.code, end.message = grpc.StatusCode.UNKNOWN.value[0], f"{type(error).__name__}: {error}"[:1000]
        finally:
            del self._tasks[key]
        self._put(relay_pb2.RelayAnswer(key=key, end=end))

    def _put(self, answer: relay_pb2.RelayAnswer) -> None:
        self._answers.append(answer)
        self._ready.set()

    def _put_token(self, key: int, index: int, seq: int, token_id: int) -> None:
        last = self._answers[-1] if self._answers else None
        if not isinstance(last, _Tokens) or len(last.keys) == MAX_COLUMN:
            last = _Tokens()
            self._answers.append(last)
            self._ready.set()
        last.keys.append(key)
        last.indexes.append(index)
        last.seqs.append(seq)
        last.token_ids.append(token_id)


class _Tokens:
    """Columns that grow until they are sent, or something else follows."""

    __slots__ = ("indexes", "keys", "seqs", "token_ids")

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.indexes: list[int] = []
        self.seqs: list[int] = []
        self.token_ids: list[int] = []

    def encode(self) -> relay_pb2.RelayAnswer:
        columns = {name: getattr(self, name) for name in self.__slots__}
        return relay_pb2.RelayAnswer(tokens=relay_pb2.Tokens(**columns))


class _Aborted(Exception):
    def __init__(self, end: relay_pb2.CallEnd) -> None:
        super().__init__(end.message)
        self.end = end


class RelayContext:
    """What `generate` is given for a context: it can end the call with a status."""

    def __init__(self, send_token: Callable[[int, int, int], None]) -> None:
        self.send_token = send_token
        """Sends index, position and id of a token, after all that has been yielded until now."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        kept = next((value for key, value in trailing_metadata or () if key == errors.DETAILS_KEY), b"")
        raise _Aborted(relay_pb2.CallEnd(code=code.value[0], message=details, details=kept))


# -- the gateway's end


class RelayStub:
    """A `GenerationStub` whose generations share one stream, opened when the first of them needs it."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        stub: Any = generation_pb2_grpc.GenerationStub(channel)
        self.Abort, self.GetModelInfo, self.GetLoad = stub.Abort, stub.GetModelInfo, stub.GetLoad
        self.ReservePrefix, self.ReleasePrefix = stub.ReservePrefix, stub.ReleasePrefix
        self.ListPrefixes, self.Explain = stub.ListPrefixes, stub.Explain
        self._open = relay_pb2_grpc.RelayStub(channel).Open
        self._metadata = metadata
        self._link: _Link | None = None

    def Generate(self, request: pb.GenerateRequest) -> RelayedCall:
        """It has no deadline of its own: the public call ends with its own, and cancels this one."""
        if self._link is None or self._link.is_over:
            self._link = _Link(self._open(metadata=self._metadata))
        return self._link.call(request)

    def close(self) -> None:
        if self._link is not None:
            self._link.close()


class _Link:
    """The open stream: who waits for what."""

    def __init__(self, stream: Any) -> None:
        self.is_over = False
        self._stream = stream
        self._keys = itertools.count(1)
        self._calls: dict[int, RelayedCall] = {}
        self._outbox: list[relay_pb2.RelayCall] = []
        self._ready = asyncio.Event()
        self._tasks = (asyncio.create_task(self._write()), asyncio.create_task(self._read()))

    def call(self, request: pb.GenerateRequest) -> RelayedCall:
        key = next(self._keys)
        call = self._calls[key] = RelayedCall(lambda: self._cancel(key))
        self._send(relay_pb2.RelayCall(key=key, generate=request))
        return call

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._stream.cancel()

    def _cancel(self, key: int) -> None:
        if self._calls.pop(key, None) is not None:
            self._send(relay_pb2.RelayCall(key=key, cancel=relay_pb2.Cancel()))

    def _send(self, call: relay_pb2.RelayCall) -> None:
        self._outbox.append(call)
        self._ready.set()

    async def _write(self) -> None:
        # A stream that has ended says why to who reads it.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._ready.wait()
                self._ready.clear()
                calls, self._outbox = self._outbox, []
                await self._stream.write(relay_pb2.RelayCalls(calls=calls))

    async def _read(self) -> None:
        why: Exception = _gone("ended its stream")
        try:
            async for message in self._stream:
                for answer in message.answers:
                    if answer.HasField("tokens"):
                        self._deliver_tokens(answer.tokens)
                    else:
                        self._deliver(answer)
        except grpc.aio.AioRpcError as error:
            # A process that ends cuts its streams with one code or another. A secret that does not fit is no such end.
            is_ours = error.code() is grpc.StatusCode.UNAUTHENTICATED
            why = error if is_ours else _gone(f"is gone: {error.details()}")
        finally:
            self.is_over = True
            for call in self._calls.values():
                call.end(why)
            self._calls.clear()

    def _deliver_tokens(self, tokens: relay_pb2.Tokens) -> None:
        columns = tokens.keys, tokens.indexes, tokens.seqs, tokens.token_ids
        for key, index, seq, token_id in zip(*columns, strict=True):
            if (call := self._calls.get(key)) is not None:
                call.push(wire.encode_output(index, seq, [token_id], []))

    def _deliver(self, answer: relay_pb2.RelayAnswer) -> None:
        call = self._calls.get(answer.key)
        if call is None:
            return  # cancelled meanwhile
        if answer.HasField("response"):
            call.push(answer.response)
            return
        del self._calls[answer.key]
        call.end(None if answer.end.code == 0 else _failure(answer.end))


class RelayedCall:
    """One generation, to be read like a grpc.aio call. What its reader is too slow for is put together: tokens of one
    sample that wait here are one message."""

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._on_cancel = on_cancel
        self._messages: deque[pb.GenerateResponse] = deque()
        self._waiting: dict[int, pb.GenerateResponse] = {}
        """The last output of each sample among the messages."""
        self._ready = asyncio.Event()
        self._is_over = False
        self._error: Exception | None = None

    def push(self, message: pb.GenerateResponse) -> None:
        if message.WhichOneof("event") == "output" and not self._merge(message.output):
            self._waiting[message.output.index] = message
            self._messages.append(message)
        elif message.WhichOneof("event") != "output":
            self._messages.append(message)
        self._ready.set()

    def end(self, error: Exception | None) -> None:
        self._error, self._is_over = error, True
        self._ready.set()

    def cancel(self) -> None:
        self._on_cancel()

    def __aiter__(self) -> RelayedCall:
        return self

    async def __anext__(self) -> pb.GenerateResponse:
        while not self._messages:
            if self._is_over:
                raise self._error or StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        message = self._messages.popleft()
        if message.WhichOneof("event") == "output" and self._waiting.get(message.output.index) is message:
            del self._waiting[message.output.index]
        return message

    def _merge(self, output: pb.Output) -> bool:
        """Into the output of the same sample that waits here, where there is one that it continues."""
        waiting = self._waiting.get(output.index)
        if waiting is None:
            return False
        before, count = waiting.output, len(output.token_ids)
        if (
            before.seq + len(before.token_ids) != output.seq
            or len(before.token_ids) + count > wire.MAX_TOKENS_PER_MESSAGE
        ):
            return False
        before.token_ids.extend(output.token_ids)
        before.logprobs.extend(output.logprobs)
        return True


def _gone(how: str) -> RequestError:
    return RequestError(grpc.StatusCode.UNAVAILABLE, f"the controller {how}", retry_after_s=5)


def _failure(end: relay_pb2.CallEnd) -> grpc.aio.AioRpcError:
    details = grpc.aio.Metadata((errors.DETAILS_KEY, end.details)) if end.details else grpc.aio.Metadata()
    code = _CODES.get(end.code, grpc.StatusCode.UNKNOWN)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), details, end.message, None)
