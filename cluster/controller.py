"""The controller: owns the scheduler and the engine's loop, and serves `Generation` for token ids.

Two worlds meet here. The engine runs in a thread of its own (`engine_thread.py`), the service in an asyncio loop. Into
the engine go calls, out of it come events, one hand-over per step.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc

from quire.cluster import errors, wire
from quire.cluster.engine_thread import EngineThread, RemoteExecutor
from quire.cluster.errors import RequestError
from quire.cluster.executor import GrpcExecutor, WorkerAddress, WorkerLost
from quire.cluster.relay import RelayContext
from quire.cluster.servers import Context
from quire.cluster.streams import Stream
from quire.protos import generation_pb2, generation_pb2_grpc
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.engine import Engine
from quire.scheduler.explaining.explain import Lives
from quire.scheduler.params import InvalidRequest, QueueFull
from quire.scheduler.plan import StepEvents
from quire.scheduler.recording.record import Recorder, RecordingScheduler
from quire.scheduler.request import ModelLimits, Request, check_cache_salt, check_prompt
from quire.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """What the controller reads."""

    scheduler: SchedulerConfig
    limits: ModelLimits
    step_timeout: float
    """Seconds within which every rank must have finished a step."""
    run_ahead: int = 1
    """Plans under way beyond the one whose result is awaited."""
    record: str | None = None
    """File to which the scheduler's inputs and decisions are written."""


class Controller(generation_pb2_grpc.GenerationServicer):
    """The `Generation` service over token ids. Lives in one asyncio loop."""

    def __init__(self, config: ControllerConfig, info: generation_pb2.ModelInfo) -> None:
        self.config = config
        self.info = info
        self._lives = Lives()
        """Only the engine's thread looks at it."""
        self._recorder: Recorder | None = None
        self._streams: dict[str, Stream] = {}
        self._refusal: RequestError | None = None
        """Why nothing new is accepted."""
        self._lost = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def connect(self, workers: list[WorkerAddress], epoch: int, token: str) -> None:
        """Take charge of the workers and start the loop."""
        self.attach(GrpcExecutor(workers, epoch, token, self.config.step_timeout, on_loss=lambda: self._thread.wake()))

    def attach(self, executor: RemoteExecutor) -> None:
        """Start the loop over an executor, which is this controller's from now on."""
        self._loop = asyncio.get_running_loop()
        self._executor = executor
        self._thread = EngineThread(
            Engine(self._make_scheduler(), executor, self.config.run_ahead),
            executor,
            on_events=lambda events: self._post(self._dispatch, events),
            on_failure=lambda error: self._post(self._fail, error),
        )
        self._thread.start()

    def _make_scheduler(self) -> Scheduler:
        path, limits = self.config.record, self.config.scheduler
        if path is None:
            return Scheduler(limits, journal=self._lives)
        try:
            self._recorder = Recorder(path)
        except OSError as error:
            raise ValueError(f"--record {path} cannot be written: {error.strerror}") from error
        return RecordingScheduler(limits, self._recorder, journal=self._lives)

    @property
    def num_open(self) -> int:
        """Requests whose stream is open."""
        return len(self._streams)

    async def drain(self, timeout: float) -> None:
        """Accept nothing new, let the open requests finish, end those that have not after `timeout` seconds."""
        self._refusal = RequestError(grpc.StatusCode.UNAVAILABLE, "the server is shutting down", retry_after_s=5)
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            self._end_all(self._refusal)

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.stop)
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.close)
        await asyncio.to_thread(self._executor.close)

    async def failure(self) -> str:
        """Waits until the engine has failed; says why."""
        await self._lost.wait()
        assert self._refusal is not None
        return self._refusal.message

    async def audit(self) -> None:
        """Raises AuditError when the books do not balance."""
        await self._thread.call(lambda scheduler: scheduler.audit())

    # -- the service

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        try:
            stream = await self._open(request)
        except RequestError as error:
            await errors.abort(context, error)
        try:
            yield _started(stream.request, self.info.model)
            if isinstance(context, RelayContext):
                stream.send_token = context.send_token
            async for message in stream.messages():
                yield message
        except RequestError as error:
            await errors.abort(context, error)
        finally:
            # Reached however the stream ends: finished, failed, cancelled, past its deadline, reader gone.
            self._close(stream)

    async def Abort(self, request: generation_pb2.AbortRequest, context: Context) -> generation_pb2.AbortResponse:
        stream = self._streams.get(request.request_id)
        if stream is None:
            message = f"no request with id {request.request_id[:128]!r} is in progress"
            await errors.abort(context, RequestError(grpc.StatusCode.NOT_FOUND, message, field="request_id"))
        if request.HasField("index"):
            if stream.request.params.is_ranked:
                message = "the answers of this request are ranked when all have ended: end all of it, without an index"
                await errors.abort(context, errors.invalid("index", message))
            name, index = request.request_id, request.index
            stream.drop(index)
            await self._thread.call(lambda scheduler: scheduler.cancel(name, index))
        else:
            stream.fail(RequestError(grpc.StatusCode.CANCELLED, "aborted by Abort", reason="ABORTED_BY_CALL"))
        return generation_pb2.AbortResponse()

    async def GetModelInfo(
        self, _request: generation_pb2.GetModelInfoRequest, _context: Context
    ) -> generation_pb2.ModelInfo:
        return self.info

    async def GetLoad(self, _request: generation_pb2.GetLoadRequest, _context: Context) -> generation_pb2.Load:
        def read(scheduler: Scheduler) -> generation_pb2.Load:
            return wire.encode_load(
                scheduler.counters,
                scheduler.memory(),
                num_running=len(scheduler.running),
                num_waiting=len(scheduler.waiting),
                open_requests=len(self._streams),
                block_size=scheduler.config.block_size,
                block_bytes=scheduler.config.block_bytes,
            )

        return await self._thread.call(read)

    async def Explain(self, request: generation_pb2.ExplainRequest, context: Context) -> generation_pb2.Explanation:
        name, with_names = request.request_id, request.with_names
        found = await self._thread.call(lambda _scheduler: self._lives.explain(name, with_names))
        if found is None:
            message = f"no request with id {name[:128]!r} is known: there was none, or it ended too long ago"
            await errors.abort(context, RequestError(grpc.StatusCode.NOT_FOUND, message, field="request_id"))
        return wire.encode_explanation(found)

    # -- reserved prefixes; the gateway lets only an operator's calls through

    async def ReservePrefix(
        self, request: generation_pb2.ReservePrefixRequest, context: Context
    ) -> generation_pb2.ReservedPrefix:
        name, ids, salt = request.name, request.token_ids.ids, request.cache_salt

        def reserve(scheduler: Scheduler) -> generation_pb2.ReservedPrefix:
            check_prompt(ids, self.config.limits)
            check_cache_salt(salt)
            scheduler.reserve_prefix(name, tuple(ids), salt)
            return next(prefix for prefix in map(wire.encode_prefix, scheduler.prefix_status()) if prefix.name == name)

        try:
            return await self._thread.call(reserve)
        except (InvalidRequest, QueueFull) as error:
            await errors.abort(context, _refused(error))

    async def ReleasePrefix(
        self, request: generation_pb2.ReleasePrefixRequest, context: Context
    ) -> generation_pb2.ReleasePrefixResponse:
        if not await self._thread.call(lambda scheduler: scheduler.release_prefix(request.name)):
            message = f"no prefix {request.name[:128]!r} is reserved"
            await errors.abort(context, RequestError(grpc.StatusCode.NOT_FOUND, message, field="name"))
        return generation_pb2.ReleasePrefixResponse()

    async def ListPrefixes(
        self, _request: generation_pb2.ListPrefixesRequest, _context: Context
    ) -> generation_pb2.ListPrefixesResponse:
        prefixes = await self._thread.call(lambda scheduler: scheduler.prefix_status())
        return generation_pb2.ListPrefixesResponse(prefixes=map(wire.encode_prefix, prefixes))

    # -- streams

    async def _open(self, message: generation_pb2.GenerateRequest) -> Stream:
        if self._refusal is not None:
            raise self._refusal
        request = self._check(message)
        stream = Stream(request)
        if self._streams.setdefault(request.request_id, stream) is not stream:
            raise RequestError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"a request with id {request.request_id!r} is in progress already",
                field="request_id",
            )
        self._idle.clear()
        try:
            await self._thread.call(lambda scheduler: scheduler.add(request))
        except BaseException as error:
            self._close(stream)
            if isinstance(error, (InvalidRequest, QueueFull)):
                raise _refused(error) from error
            raise
        return stream

    def _check(self, message: generation_pb2.GenerateRequest) -> Request:
        if message.model and message.model != self.info.model:
            raise RequestError(
                grpc.StatusCode.NOT_FOUND,
                f"there is no model {message.model[:128]!r} here; {self.info.model!r} is served",
                field="model",
            )
        if message.WhichOneof("prompt") != "token_ids":
            raise errors.invalid("prompt", "the controller takes token ids; send text to the gateway")
        try:
            params = wire.decode_sampling(message.sampling)
            seed = secrets.randbits(63) if params.seed is None else params.seed
            name = message.request_id or secrets.token_hex(8)
            return Request.checked(name, message.token_ids.ids, params, seed, self.config.limits, message.cache_salt)
        except InvalidRequest as error:
            raise _refused(error) from error

    def _close(self, stream: Stream) -> None:
        name = stream.request.request_id
        if self._streams.get(name) is stream:
            del self._streams[name]
            if stream.is_unfinished:
                self._thread.call(lambda scheduler: scheduler.cancel(name))
        if not self._streams:
            self._idle.set()

    # -- from the engine's thread

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)

    def _dispatch(self, events: StepEvents) -> None:
        """One call per step; a reader that waits is woken once, and finds what has come since."""
        ends, logprobs = events.ends.get, events.logprobs.get
        for position, (sequence, token) in enumerate(zip(events.sequences, events.token_ids, strict=True)):
            request = sequence.request
            stream = self._streams.get(request.request_id)
            # A new request may have taken the id of one that was cancelled while its last step ran.
            if stream is not None and stream.request is request:
                stream.push(sequence.index, token, ends(position), logprobs(position))
        for answer in events.answers:
            stream = self._streams.get(answer.request.request_id)
            if stream is not None and stream.request is answer.request:
                stream.push_answer(answer)

    def _fail(self, error: Exception) -> None:
        """The engine is over: every stream ends with the reason, and nothing new is accepted."""
        if isinstance(error, WorkerLost):
            logger.error("%s", error)
            self._refusal = RequestError(grpc.StatusCode.UNAVAILABLE, str(error), reason="WORKER_LOST")
        else:
            self._refusal = RequestError(
                grpc.StatusCode.INTERNAL, f"the engine failed: {error}", reason="ENGINE_FAILED"
            )
        self._end_all(self._refusal)
        self._lost.set()

    def _end_all(self, error: RequestError) -> None:
        for stream in self._streams.values():
            stream.fail(error)


def _started(request: Request, model: str) -> generation_pb2.GenerateResponse:
    seed = request.seed - (1 << 64) if request.seed >> 63 else request.seed
    started = generation_pb2.Started(
        request_id=request.request_id, model=model, prompt_tokens=len(request.prompt_token_ids), seed=seed
    )
    return generation_pb2.GenerateResponse(started=started)


def _refused(error: InvalidRequest | QueueFull) -> RequestError:
    """With the field's path in a GenerateRequest."""
    if isinstance(error, QueueFull):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        return RequestError(code, f"{error}; try again later", reason="QUEUE_FULL", retry_after_s=1)
    in_sampling = error.field in generation_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    return errors.invalid(f"sampling.{error.field}" if in_sampling else error.field, str(error))
