"""What is left of a step to prompts while others decode."""

from __future__ import annotations

import pytest
from schedulers import make_request, make_scheduler

from quire.scheduler.plan import StepPlan, StepResult
from quire.scheduler.scheduler import Scheduler

BUDGET = 300


def scheduler_with(floor: int, num_decodes: int, **config: object) -> Scheduler:
    """So many sequences decode, and nobody waits."""
    sizes: dict[str, object] = dict(
        num_blocks=400,
        block_size=16,
        max_model_len=4000,
        max_num_seqs=64,
        max_num_batched_tokens=BUDGET,
        enable_prefix_caching=False,
    )
    scheduler = make_scheduler(**sizes | {"prefill_floor": floor} | config)
    for number in range(num_decodes):
        scheduler.add(make_request(f"d{number}", [number], 4000, max_tokens=900))
    if num_decodes:
        step(scheduler)
    return scheduler


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.apply(StepResult(plan.step, (7,) * plan.num_sampled, {}))
    scheduler.audit()
    return plan


def prompts_of(scheduler: Scheduler, num_steps: int) -> list[int]:
    """Tokens of each of the next steps beyond those of the sequences that decoded before it. One for a prompt that is
    under way is not counted against the limit: every running sequence has that."""
    counts = []
    for _ in range(num_steps):
        num_decodes = len(scheduler.state.running.decoding.rows)
        counts.append(step(scheduler).total_tokens - num_decodes)
    return counts


def add(scheduler: Scheduler, name: str, num_tokens: int) -> None:
    scheduler.add(make_request(name, [1] * num_tokens, 4000, max_tokens=4))


def test_a_prompt_that_comes_alone_gets_the_floor():
    scheduler = scheduler_with(32, num_decodes=3)
    add(scheduler, "a", 100)
    assert prompts_of(scheduler, 4) == [32, 33, 33, 2]
    assert prompts_of(scheduler, 1) == [0]


def test_beside_many_that_decode_prompts_get_more():
    scheduler = scheduler_with(32, num_decodes=20)
    add(scheduler, "a", 200)
    assert prompts_of(scheduler, 2) == [160, 40]


def test_what_waits_is_spread_over_some_steps():
    scheduler = scheduler_with(32, num_decodes=2)
    for name in "abcd":
        add(scheduler, name, 400)
    backlog, wanted = 1600, [1600 // 8]
    for _ in range(5):
        backlog -= wanted[-1]
        wanted.append(backlog // 8 + 1)
    assert prompts_of(scheduler, 6) == wanted


def test_never_more_than_the_budget():
    scheduler = scheduler_with(32, num_decodes=2)
    for name in "abc":
        add(scheduler, name, 3900)
    assert prompts_of(scheduler, 1) == [BUDGET - 2]


@pytest.mark.parametrize("floor, num_decodes", [(0, 2), (32, 0)])
def test_without_a_floor_or_without_decodes_prompts_get_all_that_is_left(floor: int, num_decodes: int):
    scheduler = scheduler_with(floor, num_decodes)
    add(scheduler, "a", 1000)
    assert prompts_of(scheduler, 1) == [BUDGET - num_decodes]


def test_samples_that_come_back_together_are_not_too_many_for_the_floor():
    """Swapped out with one token each to compute, they need a step that holds all of them."""
    scheduler = scheduler_with(1, num_decodes=1, num_blocks=260, num_swap_blocks=64, preemption_mode="swap")
    scheduler.add(make_request("n", [1, 2], 4000, n=12, max_tokens=40))
    for _ in range(20):
        step(scheduler)
    group = scheduler.state.running.groups[-1]
    assert len(group.sequences) == 12
    scheduler._leaving.preempt(group, "test")
    assert group.is_swapped
    assert len(step(scheduler).swapped_out) > 0
    for _ in range(2):
        step(scheduler)
    assert group.is_running


def test_a_negative_floor_is_refused():
    with pytest.raises(ValueError, match="prefill_floor must not be negative, unlike -1"):
        make_scheduler(prefill_floor=-1)
