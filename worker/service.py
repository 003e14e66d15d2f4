"""The gRPC side of a worker: one stream of plans in, one stream of reports out. Knows no Ray.

Invariant: one stream drives the rows at a time, that of the newest epoch; its steps are launched in order, without
gaps, each once, and reported in that order. Whoever is refused is told what this worker expected.
"""

from __future__ import annotations

import hmac
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from quire.protos import worker_pb2, worker_pb2_grpc
from quire.protos.channel import WORKER_SERVER_OPTIONS
from quire.worker.checks import PlanError
from quire.worker.config import WorkerConfig
from quire.worker.loop import StepThread
from quire.worker.parallel import TensorParallel
from quire.worker.runner import Loader, Pending, Progress, Runner, load_decoder

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
THREADS = 16
"""An open stream holds one for its life; the rest answer Describe, health and reflection."""

log = logging.getLogger(__name__)


class Refusal(Exception):
    """A call that ends with this status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class _Step:
    """A step on its way."""

    pending: Pending
    came_at: float
    """When its plan came: time.perf_counter()."""


@dataclass(eq=False, slots=True)
class _Stream:
    """One open Run call."""

    context: grpc.ServicerContext
    launched: queue.SimpleQueue[_Step | Refusal | None] = field(default_factory=queue.SimpleQueue)
    """Steps in their order, then why there are no more; None: there is nobody to be told."""
    has_sent: bool = False
    """A plan of it waits to be launched, or has been."""
    is_over: bool = False
    """It has been refused: what it sent beyond that is not looked at."""
    ended_at: float = field(default_factory=time.perf_counter)
    """When its last step ended."""


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Three threads for a stream: one reads plans as they come, the worker's own launches them in their order, and the
    call's waits for each step and reports it, while the next is launched already."""

    def __init__(self, runner: Runner, steps: StepThread) -> None:
        self._runner = runner
        self._steps = steps
        self._rank = runner.config.rank
        # Held for moments: who may drive, and where the rows stand.
        self._state = threading.Lock()
        self._epoch = 0
        self._driver: _Stream | None = None
        self._finished = (0, 0)  # epoch and step
        self._broken = 0
        """The newest epoch of which a step has failed half-way."""
        self._launched = (0, 0)  # epoch and step; of the steps' thread alone

    def Run(
        self, request_iterator: Iterator[worker_pb2.StepPlan], context: grpc.ServicerContext
    ) -> Iterator[worker_pb2.StepReport]:
        stream = _Stream(context)
        if not context.add_callback(lambda: self._leave(stream)):
            return  # it has ended already
        threading.Thread(
            target=self._read, args=(request_iterator, stream), name=f"rank-{self._rank}-plans", daemon=True
        ).start()
        try:
            while (step := stream.launched.get()) is not None:
                yield self._finish(step, stream)
        except Refusal as refusal:
            # Trailers hold eight kilobytes, and errors of collectives can be longer.
            context.abort(refusal.code, str(refusal)[:1000])

    def Describe(
        self, _request: worker_pb2.DescribeRequest, _context: grpc.ServicerContext
    ) -> worker_pb2.WorkerDescription:
        description = self._runner.describe()
        with self._state:
            epoch, step = self._finished
            description.epoch = self._epoch
            description.step = step if epoch == self._epoch else 0
        return description

    # -- in the thread that reads

    def _read(self, plans: Iterator[worker_pb2.StepPlan], stream: _Stream) -> None:
        try:
            for plan in plans:
                self._claim(plan, stream)
                stream.has_sent = True
                self._steps.post(partial(self._launch, plan, time.perf_counter(), stream))
        except Refusal as refusal:
            self._end(stream, refusal)
        except Exception:  # so grpc tells that the call has ended; its callback has seen to the rest
            self._end(stream, None)
        else:
            self._end(stream, None)

    def _end(self, stream: _Stream, why: Refusal | None) -> None:
        """After the steps that it has sent."""
        if stream.has_sent:
            self._steps.post(lambda: stream.launched.put(why))
        else:
            stream.launched.put(why)  # without waiting for a step of somebody else

    def _claim(self, plan: worker_pb2.StepPlan, stream: _Stream) -> None:
        """Makes the plan's stream the driver, or refuses it."""
        if plan.incarnation != self._runner.incarnation:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the plan is for incarnation {plan.incarnation}; this worker is {self._runner.incarnation}",
            )
        with self._state:
            driver = self._driver
            is_newer = plan.epoch > self._epoch
            if driver not in (None, stream) and not is_newer:
                raise Refusal(
                    grpc.StatusCode.ALREADY_EXISTS,
                    f"the plan is of epoch {plan.epoch}, but a stream of epoch {self._epoch} is driving this worker",
                )
            if plan.epoch < self._epoch:
                raise Refusal(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"the plan is of epoch {plan.epoch}; this worker has seen epoch {self._epoch}",
                )
            if is_newer and plan.step != 1:
                raise Refusal(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"epoch {plan.epoch} starts with step {plan.step}; its first step is 1",
                )
            self._epoch, self._driver = plan.epoch, stream
        if not stream.context.is_active():
            self._leave(stream)  # it ended before it drove, and nobody will say so again
        if driver is not None and driver is not stream:
            log.warning("rank %d: epoch %d takes over", self._rank, plan.epoch)
            driver.context.cancel()

    # -- in any thread

    def _leave(self, stream: _Stream) -> None:
        """The stream has ended, from whatever side."""
        with self._state:
            if self._driver is stream:
                self._driver = None
        stream.launched.put(None)

    # -- in the steps' thread

    def _launch(self, plan: worker_pb2.StepPlan, came_at: float, stream: _Stream) -> None:
        if stream.is_over:
            return
        try:
            stream.launched.put(_Step(self._step(plan, stream), came_at))
        except Refusal as refusal:
            stream.is_over = True
            stream.launched.put(refusal)

    def _step(self, plan: worker_pb2.StepPlan, stream: _Stream) -> Pending:
        if self._driver is not stream:
            # While this plan waited for its turn, or its client went away.
            raise Refusal(grpc.StatusCode.ABORTED, f"the stream of epoch {plan.epoch} does not drive any more")
        self._enter(plan)
        try:
            pending = self._runner.launch(plan)
        except PlanError as error:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"rank {self._rank}, step {plan.step}: {error}") from error
        except Exception as error:
            raise self._failure(plan.epoch, plan.step, error) from error
        self._launched = (plan.epoch, plan.step)
        return pending

    def _enter(self, plan: worker_pb2.StepPlan) -> None:
        """Empties the rows for a new epoch; refuses a step that is not the next one."""
        if plan.epoch != self._launched[0]:
            self._runner.reset()
            self._launched = (plan.epoch, 0)
        if self._broken == plan.epoch:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"a step of epoch {plan.epoch} has failed half-way; start a new epoch",
            )
        expected = self._launched[1] + 1
        if plan.step != expected:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the plan is step {plan.step} of epoch {plan.epoch}; the next one is step {expected}",
            )

    # -- in the call's thread

    def _finish(self, step: _Step | Refusal, stream: _Stream) -> worker_pb2.StepReport:
        if isinstance(step, Refusal):
            raise step
        pending = step.pending
        try:
            report = pending.wait()
        except Exception as error:
            raise self._failure(pending.epoch, pending.step, error) from error
        report.starved_us = int(max(0.0, step.came_at - stream.ended_at) * 1e6)
        stream.ended_at = time.perf_counter()
        with self._state:
            self._finished = max(self._finished, (report.epoch, report.step))
        return report

    def _failure(self, epoch: int, step: int, error: Exception) -> Refusal:
        """What a step left half done nobody knows: its epoch is over."""
        log.error("rank %d: step %d of epoch %d failed", self._rank, step, epoch, exc_info=error)
        with self._state:
            self._broken = max(self._broken, epoch)
        return Refusal(
            grpc.StatusCode.INTERNAL, f"rank {self._rank}: step {step} failed: {type(error).__name__}: {error}"
        )


class TokenCheck(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Lets calls pass that carry the token, whatever they call."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        if hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected):
            return continuation(handler_call_details)
        # A refusal reads no request, so one kind of handler serves every kind of call.
        return grpc.stream_stream_rpc_method_handler(_deny)


def _deny(_requests: Iterator[Any], context: grpc.ServicerContext) -> NoReturn:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "this call needs the metadata 'authorization: Bearer <token>'")


class WorkerServer:
    """A worker process, from start to stop: connect (several ranks only), load, measure, allocate, serve."""

    def __init__(self, config: WorkerConfig, token: str | None = None, loader: Loader = load_decoder) -> None:
        self._config = config
        self._token = token
        self._loader = loader
        self._tp = TensorParallel.single()
        self._runner = Runner(config, self._tp, loader) if config.tensor_parallel_size == 1 else None
        self._steps = StepThread(f"rank-{config.rank}-steps")
        self._server: grpc.Server | None = None
        self._health = health.HealthServicer()

    def connect(self, init_method: str) -> None:
        """Joins the tensor-parallel group; returns when all ranks have."""
        config = self._config
        self._tp = self._steps.call(
            lambda: TensorParallel.start(config.rank, config.tensor_parallel_size, init_method, config.device)
        )
        self._runner = Runner(config, self._tp, self._loader)

    def load(self, progress: Progress | None = None) -> None:
        self._steps.call(lambda: self._connected.load(progress))

    def measure(self) -> int:
        """How many blocks fit here. On several ranks: called on all of them at once."""
        return self._steps.call(self._connected.measure)

    def allocate(self, num_blocks: int) -> None:
        """The pool, and a first step through it. On several ranks: called on all of them at once."""
        self._steps.call(lambda: self._connected.allocate(num_blocks))
        self._steps.call(self._connected.warm_up)

    def serve(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Starts answering; returns "host:port". Port 0: one that is free."""
        self._service = WorkerService(self._connected, self._steps)
        self._steps.be_quiet()
        server = grpc.server(
            ThreadPoolExecutor(THREADS, thread_name_prefix="worker-rpc"),
            interceptors=[TokenCheck(self._token)] if self._token else [],
            options=WORKER_SERVER_OPTIONS,
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        name = f"[{host}]" if ":" in host else host
        bound = server.add_insecure_port(f"{name}:{port}")
        server.start()
        self._server = server
        return f"{name}:{bound}"

    def describe(self) -> worker_pb2.WorkerDescription:
        return self._connected.describe()

    def stop(self, grace: float | None = None) -> None:
        """Refuses new calls, gives open ones `grace` seconds, ends them, and leaves the group."""
        self._health.enter_graceful_shutdown()
        if self._server is not None:
            self._server.stop(grace).wait()
        self._steps.stop(self._tp.close)

    @property
    def _connected(self) -> Runner:
        assert self._runner is not None, "several ranks connect before anything else"
        return self._runner
