"""The gRPC side of a worker: one stream of plans in, one stream of reports out. Knows no Ray.

Invariant: one stream drives the rows at a time, that of the newest epoch; its steps are executed in order, without
gaps, each once. Whoever is refused is told what this worker expected.
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from quire.protos import worker_pb2, worker_pb2_grpc
from quire.protos.channel import WORKER_SERVER_OPTIONS
from quire.worker.config import WorkerConfig
from quire.worker.parallel import TensorParallel
from quire.worker.runner import Loader, Progress, Runner, load_decoder
from quire.worker.table import PlanError

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
THREADS = 16
"""An open stream holds one for its life; the rest answer Describe, health and reflection."""

log = logging.getLogger(__name__)


class Refusal(Exception):
    """A call that ends with this status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class WorkerService(worker_pb2_grpc.WorkerServicer):
    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._rank = runner.config.rank
        # Held for moments: which stream may drive. Never held while a step runs, for ends of streams take it too.
        self._claiming = threading.Lock()
        self._epoch = 0
        self._driver: grpc.ServicerContext | None = None
        # Held while a step runs: the rows, and where they stand.
        self._stepping = threading.Lock()
        self._finished = (0, 0)  # epoch and step
        self._broken = False

    def Run(
        self, request_iterator: Iterator[worker_pb2.StepPlan], context: grpc.ServicerContext
    ) -> Iterator[worker_pb2.StepReport]:
        context.add_callback(lambda: self._leave(context))
        try:
            for plan in request_iterator:
                self._claim(plan, context)
                yield self._step(plan, context)
        except Refusal as refusal:
            # Trailers hold eight kilobytes, and errors of collectives can be longer.
            context.abort(refusal.code, str(refusal)[:1000])

    def Describe(
        self, _request: worker_pb2.DescribeRequest, _context: grpc.ServicerContext
    ) -> worker_pb2.WorkerDescription:
        description = self._runner.describe()
        epoch, step = self._finished
        description.epoch = self._epoch
        description.step = step if epoch == self._epoch else 0
        return description

    def _claim(self, plan: worker_pb2.StepPlan, context: grpc.ServicerContext) -> None:
        """Makes the plan's stream the driver, or refuses it."""
        if plan.incarnation != self._runner.incarnation:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the plan is for incarnation {plan.incarnation}; this worker is {self._runner.incarnation}",
            )
        with self._claiming:
            driver = self._driver
            is_newer = plan.epoch > self._epoch
            if driver not in (None, context) and not is_newer:
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
            self._epoch, self._driver = plan.epoch, context
        if not context.is_active():
            self._leave(context)  # it ended before it drove, and nobody will say so again
        if driver not in (None, context):
            log.warning("rank %d: epoch %d takes over", self._rank, plan.epoch)
            driver.cancel()

    def _leave(self, context: grpc.ServicerContext) -> None:
        with self._claiming:
            if self._driver is context:
                self._driver = None

    def _step(self, plan: worker_pb2.StepPlan, context: grpc.ServicerContext) -> worker_pb2.StepReport:
        with self._stepping:
            if self._driver is not context:
                # While this plan waited for the lock, or its client went away.
                raise Refusal(grpc.StatusCode.ABORTED, f"the stream of epoch {plan.epoch} does not drive any more")
            self._enter(plan)
            try:
                report = self._runner.run(plan)
            except PlanError as error:
                raise Refusal(
                    grpc.StatusCode.INVALID_ARGUMENT, f"rank {self._rank}, step {plan.step}: {error}"
                ) from error
            except Exception as error:
                log.exception("rank %d: step %d of epoch %d failed", self._rank, plan.step, plan.epoch)
                self._broken = True
                raise Refusal(
                    grpc.StatusCode.INTERNAL,
                    f"rank {self._rank}: step {plan.step} failed: {type(error).__name__}: {error}",
                ) from error
            self._finished = (plan.epoch, plan.step)
            return report

    def _enter(self, plan: worker_pb2.StepPlan) -> None:
        """Empties the rows for a new epoch; refuses a step that is not the next one."""
        if plan.epoch != self._finished[0]:
            self._runner.reset()
            self._finished, self._broken = (plan.epoch, 0), False
        if self._broken:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"a step of epoch {plan.epoch} has failed half-way; start a new epoch",
            )
        expected = self._finished[1] + 1
        if plan.step != expected:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the plan is step {plan.step} of epoch {plan.epoch}; the next one is step {expected}",
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
        self._server: grpc.Server | None = None
        self._health = health.HealthServicer()

    def connect(self, init_method: str) -> None:
        """Joins the tensor-parallel group; returns when all ranks have."""
        config = self._config
        self._tp = TensorParallel.start(config.rank, config.tensor_parallel_size, init_method, config.device)
        self._runner = Runner(config, self._tp, self._loader)

    def load(self, progress: Progress | None = None) -> None:
        self._connected.load(progress)

    def measure(self) -> int:
        """How many blocks fit here. On several ranks: called on all of them at once."""
        return self._connected.measure()

    def allocate(self, num_blocks: int) -> None:
        """The pool, and a first step through it. On several ranks: called on all of them at once."""
        self._connected.allocate(num_blocks)
        self._connected.warm_up()

    def serve(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Starts answering; returns "host:port". Port 0: one that is free."""
        self._service = WorkerService(self._connected)
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
        self._tp.close()

    @property
    def _connected(self) -> Runner:
        assert self._runner is not None, "several ranks connect before anything else"
        return self._runner
