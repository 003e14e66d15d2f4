"""A runner that is driven as over the wire."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from quire.cluster import wire
from quire.protos import worker_pb2
from quire.scheduler.plan import StepPlan, StepResult
from quire.worker.runner import Pending, Runner


@dataclass
class WireExecutor:
    """An `Executor` whose plans and reports travel as bytes; steps are launched as far ahead as the engine runs."""

    runner: Runner
    launched: deque[Pending] = field(default_factory=deque)

    def submit(self, plan: StepPlan) -> None:
        payload = wire.encode_plan(plan, epoch=1).SerializeToString()
        self.launched.append(self.runner.launch(worker_pb2.StepPlan.FromString(payload)))

    def collect(self) -> StepResult:
        report = self.launched.popleft().wait()
        return wire.decode_report(worker_pb2.StepReport.FromString(report.SerializeToString()))
