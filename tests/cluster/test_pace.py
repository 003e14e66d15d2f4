"""The next plan waits for who may come as long as the running step allows, and not longer."""

from __future__ import annotations

import asyncio
import threading

import pytest
from schedulers import make_request
from stepped_executor import LIMITS, SteppedExecutor

from quire.cluster.engine_thread import EngineThread
from quire.cluster.pace import LEAST_LEAD_S, REMEMBERED, Pace
from quire.scheduler.engine import Engine
from quire.scheduler.plan import StepPlan
from quire.scheduler.scheduler import Scheduler


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def paced(clock: Clock, *steps: tuple[int, float]) -> Pace:
    """After steps of so many tokens and seconds."""
    pace = Pace(clock)
    pace.begin()
    for num_tokens, seconds in steps:
        clock.now += seconds
        pace.end(num_tokens, 0.0)
    return pace


def test_a_step_like_the_last_ones_leaves_more_than_half_of_it(clock):
    pace = paced(clock, (4, 0.1), (4, 0.08), (4, 0.09))
    assert pace.spare_s(4) == pytest.approx(0.6 * 0.08)
    clock.now += 0.04
    assert pace.spare_s(4) == pytest.approx(0.6 * 0.08 - 0.04)
    clock.now += 0.04
    assert pace.spare_s(4) == 0


def test_steps_of_more_tokens_say_nothing_about_one_of_fewer(clock):
    pace = paced(clock, (160, 0.5), (8, 0.05))
    assert pace.spare_s(7) == 0
    assert pace.spare_s(8) == pace.spare_s(160) == pytest.approx(0.6 * 0.05)
    assert paced(clock).spare_s(512) == 0


def test_short_steps_are_planned_at_once(clock):
    assert paced(clock, (4, LEAST_LEAD_S)).spare_s(4) == 0
    assert paced(clock, (4, LEAST_LEAD_S + 0.001)).spare_s(4) == pytest.approx(0.001)


def test_a_pause_is_no_part_of_a_step(clock):
    pace = paced(clock, (4, 0.1))
    clock.now += 60
    pace.begin()
    clock.now += 0.05
    pace.end(4, 60.0)
    assert pace.spare_s(4) == pytest.approx(0.6 * 0.05)


def test_a_guess_that_has_become_too_long_corrects_itself(clock):
    """Steps that took 100 ms take 10: each is planned too late, and the workers wait, but less from step to step."""
    pace, waited = paced(clock, *[(4, 0.1)] * REMEMBERED), []
    for _ in range(6):
        seconds = max(0.01, pace.spare_s(4))
        waited.append(seconds - 0.01)
        clock.now += seconds
        pace.end(4, 0.0)
    assert waited == sorted(waited, reverse=True) and waited[0] == pytest.approx(0.05) and waited[5] == 0


def test_workers_that_had_to_wait_get_their_plans_earlier_and_little_by_little_later_again(clock):
    pace = paced(clock, *[(4, 0.1)] * REMEMBERED)

    def after_a_step(starved_s: float) -> float:
        clock.now += 0.1
        pace.end(4, starved_s)
        return pace.spare_s(4)

    assert after_a_step(0.0009) == pytest.approx(0.06)  # less than a hundredth of the step is nothing
    assert [round(after_a_step(0.002), 3) for _ in range(3)] == [0.04, 0.01, 0.0]
    spare = [after_a_step(0.0) for _ in range(500)]
    assert spare == sorted(spare) and spare[100] < 0.02
    assert spare[-1] == pytest.approx(0.06)


class _Patient(Pace):
    """Waits until the test says that the plan is due."""

    def __init__(self) -> None:
        super().__init__()
        self.is_due = threading.Event()

    def spare_s(self, num_tokens: int) -> float:
        return 0 if self.is_due.is_set() else 30


class _Noting(SteppedExecutor):
    def __init__(self) -> None:
        super().__init__()
        self.submitted: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> None:
        self.submitted.append(plan)
        super().submit(plan)


@pytest.mark.parametrize("run_ahead", [1, 2])
def test_who_comes_while_a_step_runs_is_in_the_next_plan(run_ahead):
    async def scenario() -> None:
        executor, pace = _Noting(), _Patient()
        engine = Engine(Scheduler(LIMITS), executor, run_ahead)
        thread = EngineThread(engine, executor, lambda events: None, lambda error: None, pace)
        thread.start()
        for number in range(4):  # each comes with `run_ahead` plans under way, for which it is too late
            request = make_request(f"r{number}", [1, 2, 3], max_tokens=30)
            await thread.call(lambda scheduler, request=request: scheduler.add(request))
        pace.is_due.set()
        executor.run_freely()
        while await thread.call(lambda scheduler: scheduler.has_work):
            await asyncio.sleep(0.005)
        first, *others = [len(plan.admitted) for plan in executor.submitted]
        assert first == 1
        assert others[:run_ahead] == [0] * (run_ahead - 1) + [3]
        thread.stop()

    asyncio.run(scenario())


def test_nobody_is_waited_for_while_others_are_waiting():
    async def scenario() -> None:
        executor = _Noting()
        engine = Engine(Scheduler(LIMITS), executor, run_ahead=1)
        thread = EngineThread(engine, executor, lambda events: None, lambda error: None, _Patient())

        def fill(scheduler: Scheduler) -> None:
            for number in range(LIMITS.max_num_seqs + 1):
                scheduler.add(make_request(f"r{number}", [1, 2, 3], max_tokens=2))

        thread.start()
        await thread.call(fill)
        executor.run_freely()
        async with asyncio.timeout(20):  # the patience is 30
            while len(executor.submitted) < 2:
                await asyncio.sleep(0.005)
        stopping = asyncio.to_thread(thread.stop)
        await stopping

    asyncio.run(scenario())
