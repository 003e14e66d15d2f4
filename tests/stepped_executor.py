"""A fake worker behind the engine's thread, whose steps end when the test says so."""

from __future__ import annotations

import threading
from collections import deque

from fake_worker import FakeWorker

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.plan import StepPlan, StepResult

LIMITS = SchedulerConfig(
    num_blocks=64, block_size=4, max_model_len=64, max_num_seqs=64, max_num_batched_tokens=256, max_num_waiting=80
)


class SteppedExecutor:
    """A fake worker whose steps end when the test says so."""

    def __init__(self) -> None:
        self.worker = FakeWorker(
            LIMITS.num_blocks, LIMITS.block_size, LIMITS.max_num_seqs, LIMITS.max_num_batched_tokens
        )
        self.permits = threading.Semaphore(0)
        self.failure: Exception | None = None
        self.starved_s = 0.0
        self.free_running = False
        self._plans: deque[StepPlan] = deque()

    def start(self) -> None:
        pass

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def collect(self) -> StepResult:
        if not self.free_running:
            self.permits.acquire()
        if self.failure is not None:
            raise self.failure
        return self.worker.run(self._plans.popleft())

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def run_freely(self) -> None:
        self.free_running = True
        self.permits.release()

    def close(self) -> None:
        self.run_freely()
