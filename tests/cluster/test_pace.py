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
from quire.scheduler.plan import StepEvents, StepPlan, StepResult
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
            while len(executor.submitted) < run_ahead:
                await asyncio.sleep(0.001)
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
        await asyncio.to_thread(thread.stop)

    asyncio.run(scenario())


def test_workers_without_a_plan_get_one_before_the_clients_get_their_tokens():
    """Telling takes the interpreter, and the workers would wait for that too. What nothing follows is told as well."""

    async def scenario() -> None:
        executor, told = _Noting(), []
        engine = Engine(Scheduler(LIMITS), executor, run_ahead=0)
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_events(events: StepEvents) -> None:
            told.append((len(executor.submitted), len(events)))
            if len(told) == 5:
                loop.call_soon_threadsafe(done.set)

        thread = EngineThread(engine, executor, on_events, lambda error: None)
        thread.start()
        executor.free_running = True
        await thread.call(lambda scheduler: scheduler.add(make_request("r", [1, 2, 3], max_tokens=5)))
        await asyncio.wait_for(done.wait(), 10)
        assert told == [(2, 1), (3, 1), (4, 1), (5, 1), (5, 1)]
        thread.stop()

    asyncio.run(scenario())


def test_what_the_last_step_brought_is_told_before_the_failure():
    async def scenario() -> None:
        executor, told = _Noting(), []
        engine = Engine(Scheduler(LIMITS), executor, run_ahead=0)
        failed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def collect() -> StepResult:
            result = SteppedExecutor.collect(executor)
            executor.failure = RuntimeError("gone")
            return result

        def on_failure(error: Exception) -> None:
            told.append(str(error))
            loop.call_soon_threadsafe(failed.set)

        executor.collect = collect  # type: ignore[method-assign]
        executor.free_running = True
        thread = EngineThread(engine, executor, lambda events: told.append(len(events)), on_failure)
        thread.start()
        await thread.call(lambda scheduler: scheduler.add(make_request("r", [1, 2, 3], max_tokens=5)))
        await asyncio.wait_for(failed.wait(), 10)
        assert told == [1, "gone"]
        thread.stop()

    asyncio.run(scenario())
