"""The loop that serves: schedule, execute, apply. What executes is behind `Executor`: a process, a cluster, a fake."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from quire.scheduler.plan import StepEvents, StepPlan, StepResult
from quire.scheduler.scheduler import Scheduler


class Executor(Protocol):
    """Runs plans in the order they are submitted."""

    def submit(self, plan: StepPlan) -> None:
        """Hand over a plan; may return before it has run, and has to where plans are to run ahead."""

    def collect(self) -> StepResult:
        """Wait for the oldest plan that has not been collected."""


class Engine:
    """Owns the order of the three verbs. `run_ahead` plans may be under way beyond the one that is awaited: each costs
    a sequence that ends unforeseen one discarded token, and changes nothing else."""

    def __init__(self, scheduler: Scheduler, executor: Executor, run_ahead: int = 0) -> None:
        if run_ahead < 0:
            raise ValueError(f"run_ahead must be at least 0, not {run_ahead}")
        self.scheduler = scheduler
        self.executor = executor
        self.run_ahead = run_ahead
        self.in_flight: deque[StepPlan] = deque()
        """Plans whose results are awaited; to be read only."""

    def step(self) -> StepEvents:
        """Fill the pipeline, then take the oldest result. Empty when there is nothing to do."""
        while self.plan():
            pass
        return self.take() if self.in_flight else StepEvents()

    def plan(self) -> bool:
        """Send one more plan, if there is work and `run_ahead` allows; False: there is nothing to do but to wait."""
        if len(self.in_flight) > self.run_ahead or (plan := self.scheduler.schedule()) is None:
            return False
        self.executor.submit(plan)
        self.in_flight.append(plan)
        return True

    def take(self) -> StepEvents:
        """Wait for the oldest result, and apply it. Something is in flight."""
        result = self.executor.collect()
        self.in_flight.popleft()
        return self.scheduler.apply(result)
