"""The scheduler looks at few sequences per step; it must decide as one that looks at all of them.

Single samples without a prefix cache: what is shared is the business of test_sharing_walk.py."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from naive_scheduler import Decisions, NaiveScheduler
from schedulers import make_request, make_scheduler

from quire.scheduler.plan import StepPlan, StepResult
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import FinishReason

VOCAB = 12
STOPS = (3, 5)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, int | float]:
    block_size, max_model_len = draw(st.integers(1, 5)), draw(st.integers(4, 24))
    least, rows = -(-(max_model_len - 1) // block_size), draw(st.integers(1, 6))
    return {
        "block_size": block_size,
        "max_model_len": max_model_len,
        "num_blocks": least + draw(st.integers(0, 2 * least)),
        "max_num_seqs": rows,
        "max_num_batched_tokens": rows + draw(st.integers(0, 24)),
        "prefill_floor": draw(st.sampled_from([0, 0, 1, 5])),
        "watermark": draw(st.sampled_from([0.0, 0.2])),
        "enable_prefix_caching": False,
    }


class Pair:
    """Both schedulers, driven alike and compared at every step."""

    def __init__(self, config: dict[str, int | float]) -> None:
        self.ours: Scheduler = make_scheduler(**config)
        self.naive = NaiveScheduler(self.ours.config)
        self.plans: deque[StepPlan] = deque()
        self.num_added = self.num_ends = 0

    def add(self, prompt_len: int, max_tokens: int, stops: bool) -> None:
        room = self.ours.config.max_model_len - 1
        prompt = [1] * min(prompt_len, room)
        request = make_request(
            f"r{self.num_added}", prompt, self.ours.config.max_model_len, eos=STOPS if stops else (),
            max_tokens=min(max_tokens, self.ours.config.max_model_len - len(prompt)),
        )  # fmt: skip
        self.num_added += 1
        self.ours.add(request)
        self.naive.add(request)

    def cancel(self, number: int, index: int) -> None:
        self.ours.cancel(f"r{number}", index)
        self.naive.cancel(f"r{number}", index)

    def schedule(self) -> None:
        plan, wanted = self.ours.schedule(), self.naive.schedule()
        assert (Decisions.of(plan) if plan else None) == wanted
        if plan:
            self.plans.append(plan)
            assert plan.num_sampled == len(self.naive.in_flight[-1])

    def apply(self, tokens: list[int]) -> None:
        if not self.plans:
            return
        plan, sampling = self.plans.popleft(), self.naive.in_flight[0]
        by_row = {row: tokens[i % len(tokens)] for i, row in enumerate(plan.rows) if row in sampling}
        events = self.ours.apply(StepResult(plan.step, tuple(by_row.values()), {}))
        found = {(e.sequence.request.request_id, e.sequence.index): (e.token_id, e.finish_reason) for e in events}
        assert found == self.naive.apply(by_row)
        self.num_ends += len(events.ends)

    def check(self) -> None:
        self.ours.audit()
        ours = [(s.request.request_id, s.index, s.num_computed, s.num_tokens) for s in self._ours()]
        naive = [(s.request.request_id, s.index, s.num_computed, s.num_tokens) for s in self._naive()]
        assert ours == naive
        assert self.ours.pool.free_blocks() == self.naive.free_blocks

    def _ours(self):
        return (*self.ours.running, *(s for group in self.ours.waiting for s in group.sequences))

    def _naive(self):
        return (*self.naive.running, *self.naive.waiting)


ADD = st.tuples(st.just("add"), st.integers(1, 20), st.integers(1, 12), st.booleans())
CANCEL = st.tuples(st.just("cancel"), st.integers(0, 8), st.integers(0, 1))
TOKENS = st.lists(st.integers(-1, VOCAB - 1) | st.just(7), min_size=1, max_size=6)
APPLY = st.tuples(st.just("apply"), TOKENS)
SCHEDULE = st.tuples(st.just("schedule"))


@settings(max_examples=400, deadline=None)
@given(configs(), st.lists(st.one_of(ADD, SCHEDULE, SCHEDULE, APPLY, APPLY, CANCEL), max_size=120))
def test_every_decision_is_that_of_a_walk_over_all_sequences(config, actions):
    pair = Pair(config)
    for name, *arguments in actions:
        getattr(pair, name)(*arguments)
        pair.check()
    for _ in range(2000):  # to the end, with a token that ends nothing but by length
        if not pair.ours.has_work:
            break
        pair.schedule()
        pair.apply([7])
        pair.check()
    assert not pair.ours.has_work and not pair.naive.running and not pair.naive.waiting


def test_the_walk_meets_what_it_is_for():
    """Preemptions, block boundaries, ends by length and by stop tokens, at a depth of three plans."""
    pair = Pair(
        {
            "block_size": 2,
            "max_model_len": 16,
            "num_blocks": 12,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 8,
            "enable_prefix_caching": False,
        }
    )
    for number in range(8):
        pair.add(1 + number % 5, 10, stops=number % 2 == 0)
    for step in range(200):
        for _ in range(3 - len(pair.plans)):
            pair.schedule()
        pair.apply([7, 7, 3 if step % 9 == 0 else 7])
        pair.check()
    assert not pair.ours.has_work and pair.ours.counters.num_preemptions > 3 and pair.num_ends == 8
    assert pair.ours.counters.discarded_tokens > 0


def test_what_a_steady_step_says_is_the_same_object_as_before():
    """Nothing is built again for sequences that go on as they did."""
    scheduler = make_scheduler(block_size=4)
    for name in "abc":
        scheduler.add(make_request(name, [1, 2], max_tokens=30))
    plans = [scheduler.schedule() for _ in range(5)]
    assert plans[1].rows is plans[2].rows is plans[4].rows == (0, 1, 2)
    assert [plan.extended for plan in plans] == [(), (), (), ((0, 3), (1, 4), (2, 5)), ()]
    for plan in plans[:2]:
        scheduler.apply(StepResult(plan.step, (5, 5, 5), {}))
    scheduler.cancel("b")
    assert scheduler.schedule().rows == (0, 2)
    events = scheduler.apply(StepResult(3, (5, 6, 7), {}))
    assert events.token_ids == (5, 7) and [s.request.request_id for s in events.sequences] == ["a", "c"]
    assert {e.finish_reason for e in events} == {None} and FinishReason.LENGTH not in events.ends.values()
