"""Runs plans on remote workers: an open gRPC stream per rank, plans encoded once, a step done when all ranks say so.

Whatever goes wrong with a worker surfaces here as WorkerLost with the rank's name, within seconds: a killed process
ends its stream at once, a stopped one fails the keepalive, and a rank that is alive but late runs into the step's time
limit.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc

from quire.cluster import wire
from quire.protos import worker_pb2
from quire.protos.channel import WORKER_CHANNEL_OPTIONS
from quire.scheduler.plan import StepPlan, StepResult

RUN_METHOD = "/quire.v1.Worker/Run"
BLAME_WINDOW_S = 0.5
"""After a first failure, how long to listen for another rank's: when one dies, its peers fail in their collectives."""


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a rank listens, and which life of its process that is."""

    rank: int
    target: str
    incarnation: int
    node: str = "localhost"
    pid: int = 0

    def __str__(self) -> str:
        return f"worker rank {self.rank} (process {self.pid} on {self.node})"


class WorkerLost(RuntimeError):
    """A rank died, hangs or failed a step; the group cannot go on."""

    def __init__(self, worker: WorkerAddress, why: str) -> None:
        super().__init__(f"{worker} {why}")
        self.worker = worker


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What a reader thread hands over: a report, or the reason why there will be none."""

    worker: WorkerAddress
    report: worker_pb2.StepReport | None
    why: str = ""
    gone: bool = False
    """The process itself, not its step, is at fault."""


class _Link:
    """The open stream to one rank: a queue in, a reader thread out."""

    def __init__(self, worker: WorkerAddress, token: str, deliver: Callable[[_Arrival], None]) -> None:
        self.worker = worker
        self._suffix = wire.incarnation_suffix(worker.incarnation)
        self._plans: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._deliver = deliver
        self._channel = grpc.insecure_channel(worker.target, options=WORKER_CHANNEL_OPTIONS)
        run = self._channel.stream_stream(
            RUN_METHOD,
            request_serializer=None,  # plans are bytes already
            response_deserializer=worker_pb2.StepReport.FromString,
        )
        self._call = run(self._outgoing(), metadata=(("authorization", f"Bearer {token}"),))
        self._reader = threading.Thread(target=self._read, name=f"rank-{worker.rank}", daemon=True)
        self._reader.start()

    def send(self, payload: bytes) -> None:
        self._plans.put(payload + self._suffix)

    def close(self) -> None:
        self._plans.put(None)
        self._call.cancel()
        self._reader.join(timeout=5)
        self._channel.close()

    def _outgoing(self) -> Iterator[bytes]:
        while (payload := self._plans.get()) is not None:
            yield payload

    def _read(self) -> None:
        try:
            for report in self._call:
                self._deliver(_Arrival(self.worker, report))
            self._deliver(_Arrival(self.worker, None, "ended its step stream", gone=True))
        except grpc.RpcError as error:
            self._deliver(_failure(self.worker, error))


def _failure(worker: WorkerAddress, error: grpc.RpcError) -> _Arrival:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return _Arrival(worker, None, f"is gone: {details}", gone=True)
    return _Arrival(worker, None, f"failed: {code.name}: {details}")


class GrpcExecutor:
    """An `Executor` over the ranks of one tensor-parallel group.

    submit(), collect() and check() are called from one thread; `on_loss` is called from a reader thread when a stream
    ends, so that an idle loop can wake up and check()."""

    def __init__(
        self,
        workers: Sequence[WorkerAddress],
        epoch: int,
        token: str,
        step_timeout: float,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._workers = list(workers)
        self._epoch = epoch
        self._step_timeout = step_timeout
        self._awaited: deque[int] = deque()
        self._reports: dict[int, dict[int, worker_pb2.StepReport]] = {}
        self._arrivals: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        self._on_loss = on_loss
        self._token = token
        self._links: list[_Link] = []
        self.starved_s = 0.0
        """Seconds for which the ranks had waited for the plan that was collected last."""

    def start(self) -> None:
        """Open a stream to every rank; from here on `on_loss` may be called."""
        self._links = [_Link(worker, self._token, self._deliver) for worker in self._workers]

    def submit(self, plan: StepPlan) -> None:
        payload = wire.encode_plan(plan, self._epoch).SerializeToString()
        self._awaited.append(plan.step)
        for link in self._links:
            link.send(payload)

    def collect(self) -> StepResult:
        """Raises WorkerLost."""
        step = self._awaited.popleft()
        deadline = time.monotonic() + self._step_timeout
        reports = self._reports.setdefault(step, {})
        while len(reports) < len(self._workers):
            try:
                self._take(self._arrivals.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                late = next(worker for worker in self._workers if worker.rank not in reports)
                raise WorkerLost(late, f"did not answer step {step} within {self._step_timeout:g} s") from None
        del self._reports[step]
        self.starved_s = min(report.starved_us for report in reports.values()) / 1e6
        return wire.decode_report(reports[0])

    def check(self) -> None:
        """Raises WorkerLost if a rank was lost while nothing was awaited."""
        while not self._arrivals.empty():
            self._take(self._arrivals.get_nowait())

    def close(self) -> None:
        for link in self._links:
            link.close()

    def _deliver(self, arrival: _Arrival) -> None:
        """Called from the reader threads."""
        self._arrivals.put(arrival)
        if arrival.report is None:
            self._on_loss()

    def _take(self, arrival: _Arrival) -> None:
        if arrival.report is None:
            raise self._blame(arrival)
        report = arrival.report
        if report.epoch == self._epoch and report.incarnation == arrival.worker.incarnation:
            # A report that nobody awaits, of an older epoch or another life, is dropped.
            self._reports.setdefault(report.step, {})[arrival.worker.rank] = report

    def _blame(self, first: _Arrival) -> WorkerLost:
        """The rank at fault: of failures that come together, the one whose process is gone."""
        failure, deadline = first, time.monotonic() + BLAME_WINDOW_S
        while not failure.gone:
            try:
                arrival = self._arrivals.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if arrival.report is None and arrival.gone:
                failure = arrival
        return WorkerLost(failure.worker, failure.why)
