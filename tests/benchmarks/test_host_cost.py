"""The worker that sleeps keeps to its clock and to the protocol, and the loop over it measures what it says."""

from __future__ import annotations

import time

import pytest
from worker_plans import admit, plan, unpacked

from benchmarks.host_cost import PARTS, STEP_MS, measure, sleeping_worker
from benchmarks.sleeping_worker import SleepingRunner


def test_a_step_starts_when_the_one_before_has_ended_however_late_its_thread_is():
    runner = SleepingRunner(num_rows=4, step_s=0.05)
    started = time.perf_counter()
    steps = [runner.launch(plan(rows=[0], admits=[admit(0, [1], [0])], step=1)), runner.launch(plan(rows=[0], step=2))]
    launched = time.perf_counter()
    for number, step in enumerate(steps, 1):
        assert step.wait().step == number
        now = time.perf_counter()
        assert now - started >= number * 0.05
        if number == 1:
            time.sleep(0.02)  # the second step is under way meanwhile
    assert steps[1]._ends_at <= launched + 0.1


def test_rows_sample_when_their_last_known_token_is_computed():
    runner = SleepingRunner(num_rows=4, step_s=0)

    def sampled(**changes) -> int:
        return len(unpacked(runner.run(plan(**changes)).token_ids))

    first = [admit(2, [1, 2, 3, 4, 5], [0]), admit(0, [1], [1])]
    assert sampled(rows=[2, 0], num_tokens=[3, 1], admits=first) == 1
    assert sampled(rows=[2, 0], num_tokens=[2, 1]) == 2
    assert sampled(rows=[2, 0]) == 2
    assert sampled(rows=[0], num_tokens=[1]) == 1
    runner.reset()
    assert sampled(rows=[2], admits=[admit(2, [1, 2], [0])], num_tokens=[1]) == 0


def test_the_loop_over_grpc_measures_every_part():
    with sleeping_worker(8) as worker:
        for epoch, depth in ((1, 0), (2, 1)):
            figures = measure(worker, epoch, running=8, run_ahead=depth, steps=20)
            assert figures.wall > STEP_MS * 1e3 * 0.95  # a step never takes less
            assert figures.exposed == pytest.approx(figures.wall / (STEP_MS * 1e3) - 1)
            assert set(figures.parts) == set(PARTS) and all(time > 0 for time in figures.parts.values())
            assert figures.host >= max(figures.parts.values())
