"""Who computes what, step by step, with exact rows, blocks and token counts on small pools."""

import pytest
from schedulers import answer, make_request, make_scheduler

from quire.scheduler.blocks import AuditError
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.params import InvalidRequest, QueueFull
from quire.scheduler.plan import Logprobs, StepResult
from quire.scheduler.sequence import FinishReason


def prompt(length: int) -> list[int]:
    return list(range(1, length + 1))


def test_a_prompt_takes_its_blocks_at_once_and_one_more_when_its_last_is_full():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt(7), max_tokens=4))
    plan = scheduler.schedule()
    assert plan.step == 1 and plan.rows == (0,) and plan.num_tokens == (7,) and plan.num_sampled == 1
    (admission,) = plan.admitted
    assert admission.row == 0 and admission.block_ids == (0, 1) and admission.token_ids == tuple(prompt(7))
    assert next(iter(answer(scheduler, plan))).token_id == 5

    plan = scheduler.schedule()  # position 7 still fits into block 1
    assert plan.extended == () and plan.num_tokens == () and plan.admitted == ()
    answer(scheduler, plan)
    plan = scheduler.schedule()  # position 8 opens block 2
    assert plan.extended == ((0, 2),)
    answer(scheduler, plan)
    (event,) = answer(scheduler, scheduler.schedule())
    assert event.finish_reason is FinishReason.LENGTH
    assert event.sequence.token_ids == [*prompt(7), 5, 5, 5, 5]
    assert scheduler.schedule() is None and not scheduler.has_work
    assert scheduler.pool.free_blocks()[:4] == [0, 1, 2, 3]  # warm ones first
    scheduler.audit()


def test_a_long_prompt_is_cut_by_the_budget_and_shares_steps_with_decodes():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request("short", prompt(3)))
    answer(scheduler, scheduler.schedule())
    scheduler.add(make_request("long", prompt(17)))
    plan = scheduler.schedule()
    assert plan.rows == (0, 1) and plan.num_tokens == (1, 7) and plan.num_sampled == 1
    answer(scheduler, plan)
    plan = scheduler.schedule()
    assert plan.num_tokens == (1, 7) and plan.num_sampled == 1
    answer(scheduler, plan)
    plan = scheduler.schedule()
    assert plan.num_tokens == (1, 3) and plan.num_sampled == 2
    answer(scheduler, plan)
    assert scheduler.schedule().num_tokens == ()
    scheduler.audit()


def test_decodes_are_never_starved_by_prompts():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    for name in "abcd":
        scheduler.add(make_request(name, [1]))
    answer(scheduler, scheduler.schedule())
    for name in "efgh":
        scheduler.add(make_request(name, prompt(9)))
    plan = scheduler.schedule()
    assert plan.rows[:4] == (0, 1, 2, 3) and plan.num_tokens == (1, 1, 1, 1, 4)


def test_admission_waits_for_the_whole_prompt_and_leaves_the_watermark_free():
    scheduler = make_scheduler(num_blocks=16, watermark=0.25)
    scheduler.add(make_request("a", prompt(24)))
    scheduler.add(make_request("b", prompt(28)))  # 7 of the 10 blocks left would leave 3 < 4
    scheduler.add(make_request("c", prompt(4)))  # would fit, but it is not its turn
    plan = scheduler.schedule()
    assert [a.block_ids for a in plan.admitted] == [(0, 1, 2, 3, 4, 5)]
    assert len(scheduler.waiting) == 2
    answer(scheduler, plan)
    scheduler.cancel("b")
    assert [len(a.block_ids) for a in scheduler.schedule().admitted] == [1]


def test_the_watermark_never_keeps_a_lone_request_out():
    scheduler = make_scheduler(num_blocks=16, watermark=0.9)
    scheduler.add(make_request("a", prompt(60), max_tokens=4))
    assert scheduler.schedule().num_tokens == (32,)


def test_the_latest_is_preempted_and_comes_back_first_with_all_its_tokens():
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_model_len=16, max_num_seqs=3)
    for name in "ab":
        scheduler.add(make_request(name, prompt(7), max_model_len=16, max_tokens=8))
    answer(scheduler, scheduler.schedule(), token=5)  # 2 blocks each: the pool is full
    scheduler.add(make_request("c", [1], max_model_len=16))
    answer(scheduler, scheduler.schedule(), token=6)
    plan = scheduler.schedule()  # both need a third block: b gives its blocks to a
    assert plan.rows == (0,) and plan.retired == (1,) and plan.extended == ((0, 2),)
    assert [s.request.request_id for s in scheduler.waiting] == ["b", "c"]
    assert scheduler.counters.num_preemptions == 1 and scheduler.counters.recomputed_tokens == 8
    scheduler.audit()
    answer(scheduler, plan, token=7)
    scheduler.cancel("a")
    plan = scheduler.schedule()
    assert [a.token_ids for a in plan.admitted] == [(*prompt(7), 5, 6), (1,)]
    assert plan.admitted[0].num_prompt_tokens == 7 and plan.admitted[0].num_computed == 0
    assert plan.num_tokens == (9, 1)
    scheduler.audit()


def test_nobody_is_admitted_in_a_step_that_preempts():
    scheduler = make_scheduler(num_blocks=5, block_size=4, max_model_len=16, max_num_seqs=4)
    for name in "ab":
        scheduler.add(make_request(name, prompt(8), max_model_len=16))
    answer(scheduler, scheduler.schedule())
    scheduler.add(make_request("c", [1], max_model_len=16))
    answer(scheduler, scheduler.schedule())  # a takes the fifth block, b is preempted
    assert scheduler.counters.num_preemptions == 1 and scheduler.counters.num_admissions == 2


def test_cancelling_frees_at_once_in_every_state():
    scheduler = make_scheduler(max_num_seqs=2, max_num_batched_tokens=8)
    for name in ("decoding", "prefilling", "waiting"):
        scheduler.add(make_request(name, prompt(3 if name == "decoding" else 20)))
    plan = scheduler.schedule()
    for name in ("waiting", "prefilling", "decoding"):
        assert scheduler.cancel(name)
        scheduler.audit()
    assert scheduler.pool.num_free == 32 and not scheduler.cancel("decoding")
    assert not answer(scheduler, plan)  # its token comes back to nobody
    assert scheduler.counters.discarded_tokens == 1 and not scheduler.has_work
    scheduler.add(make_request("next", [1]))
    plan = scheduler.schedule()
    assert sorted(plan.retired) == [0, 1] and plan.rows == (0,)


def test_stop_tokens_end_a_sequence_unless_ignored():
    scheduler = make_scheduler()
    scheduler.add(make_request("eos", [1], eos=(5,)))
    scheduler.add(make_request("ignoring", [1], eos=(5,), ignore_eos=True))
    scheduler.add(make_request("own", [1], eos=(9,), stop_token_ids=[5]))
    events = answer(scheduler, scheduler.schedule(), token=5)
    assert [e.finish_reason for e in events] == [FinishReason.STOP, None, FinishReason.STOP]


def test_logits_that_are_not_numbers_end_only_their_own_request():
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add(make_request(name, [1]))
    plan = scheduler.schedule()
    events = scheduler.apply(StepResult(plan.step, (-1, 5), {}))
    assert [e.finish_reason for e in events] == [FinishReason.ERROR, None]
    scheduler.audit()


def test_n_samples_are_n_sequences_with_seeds_of_their_own():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt(3), n=3, seed=11))
    plan = scheduler.schedule()
    seeds = [plan.admitted[0].seed, *(fork.seed for fork in plan.branched)]
    assert len(set(seeds)) == 3 and seeds[0] == 11
    assert [(fork.parent, fork.child) for fork in plan.branched] == [(0, 1), (0, 2)] and plan.num_sampled == 3
    assert [e.sequence.index for e in answer(scheduler, plan)] == [0, 1, 2]
    assert scheduler.cancel("a", index=1) and scheduler.num_requests == 1
    assert scheduler.schedule().rows == (0, 2)
    assert scheduler.cancel("a") and scheduler.num_requests == 0


def test_plans_can_be_made_ahead_of_results():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt(3), max_tokens=3))
    plans = [scheduler.schedule() for _ in range(3)]
    assert [p.rows for p in plans] == [(0,), (0,), (0,)]
    assert scheduler.schedule() is None  # its last token is in flight: nothing is left to compute
    events = [answer(scheduler, plan, token=t) for t, plan in zip((7, 8, 9), plans, strict=True)]
    assert [e.finish_reason for step in events for e in step] == [None, None, FinishReason.LENGTH]
    scheduler.audit()


def test_a_preempted_sequence_waits_for_its_tokens_in_flight():
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_model_len=16, max_num_seqs=2)
    for name in "ab":
        scheduler.add(make_request(name, prompt(7), max_model_len=16, max_tokens=8))
    first, second, third = (scheduler.schedule() for _ in range(3))
    assert third.rows == (0,) and third.retired == (1,)
    scheduler.cancel("a")
    assert scheduler.schedule() is None  # b may not be admitted before its two tokens are known
    answer(scheduler, first), answer(scheduler, second), answer(scheduler, third)
    assert scheduler.schedule().admitted[0].token_ids == (*prompt(7), 5, 5)
    scheduler.audit()


def test_a_full_queue_and_a_used_id_are_refused_without_a_trace():
    scheduler = make_scheduler(max_num_waiting=1, max_num_seqs=1)
    scheduler.add(make_request("a", [1], n=2))  # one runs, one waits
    with pytest.raises(QueueFull, match="the limit is 1"):
        scheduler.add(make_request("b", [1]))
    with pytest.raises(InvalidRequest, match="at most 2 sequences can run and wait"):
        scheduler.add(make_request("c", [1], n=3))
    with pytest.raises(InvalidRequest, match="'a' is in progress already"):
        scheduler.add(make_request("a", [1]))
    assert scheduler.num_requests == 1 and len(scheduler.waiting) == 2
    scheduler.audit()


def test_a_budget_of_one_token_per_sequence_still_computes_prompts():
    scheduler = make_scheduler(max_num_seqs=2, max_num_batched_tokens=2)
    for name in "ab":
        scheduler.add(make_request(name, prompt(5), max_tokens=2))
    for _ in range(20):
        if plan := scheduler.schedule():
            assert plan.total_tokens <= 2
            answer(scheduler, plan)
        scheduler.audit()
    assert not scheduler.has_work


def test_results_are_taken_in_order_or_not_at_all():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1]))
    scheduler.schedule()
    with pytest.raises(AuditError, match="awaited step 1 with 1 tokens, not step 2 with 1"):
        scheduler.apply(StepResult(2, (5,), {}))


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(num_blocks=0), "num_blocks must be at least 1"),
        (dict(max_num_batched_tokens=4, max_num_seqs=8), "must be at least max_num_seqs"),
        (dict(watermark=1.0), "watermark must be in"),
        (dict(num_blocks=4, max_model_len=128), "the KV pool holds 64 tokens, fewer than max_model_len"),
    ],
)
def test_impossible_limits_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        SchedulerConfig(**{**dict(num_blocks=8, block_size=16, max_model_len=64, max_num_seqs=4), **wrong})


def test_memory_sums_to_the_pool():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt(7)))
    scheduler.add(make_request("b", prompt(2)))
    scheduler.schedule()
    memory = scheduler.memory()
    assert (memory.blocks_total, memory.blocks_used, memory.blocks_free) == (32, 3, 29)
    assert (memory.slots_filled, memory.slots_reserved) == (9, 3)


def test_log_probabilities_stay_with_their_tokens_when_others_are_discarded():
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.add(make_request(name, [1]))
    plan = scheduler.schedule()
    scheduler.cancel("a")
    about = {position: Logprobs((token,), (-1.0,), 1) for position, token in ((0, 5), (2, 7))}
    events = scheduler.apply(StepResult(plan.step, (5, 6, 7), about))
    assert [(e.sequence.request.request_id, e.token_id, e.logprobs) for e in events] == [
        ("b", 6, None),
        ("c", 7, about[2]),
    ]


def test_what_a_preempted_request_will_find_again_is_counted():
    scheduler = make_scheduler(num_blocks=5, block_size=4, max_model_len=20, max_num_seqs=2, enable_prefix_caching=True)
    for start in (10, 30):
        scheduler.add(make_request(f"r{start}", list(range(start, start + 8)), max_model_len=20, max_tokens=12))
    for _ in range(2):
        answer(scheduler, scheduler.schedule())
    # The fifth block went to the first; the second gave up its two, which are cached, and none of which is taken yet.
    assert scheduler.counters.num_preemptions == 1 and scheduler.slots_kept_for_preempted() == 8
    assert scheduler.memory().blocks_cached == 2
    while scheduler.memory().blocks_cached == 2:
        answer(scheduler, scheduler.schedule())
    assert scheduler.slots_kept_for_preempted() == 4  # the tail was evicted before the head
    scheduler.audit()


def test_a_prompt_with_one_token_left_decodes_when_nobody_waits_for_it_any_more():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request("a", prompt(9), n=2))
    answer(scheduler, scheduler.schedule())  # 8 of its 9 tokens: the last is to be sampled from twice
    assert scheduler.cancel("a", index=1)
    scheduler.audit()
    plan = scheduler.schedule()
    assert plan.rows == (0,) and plan.num_tokens == () and plan.num_sampled == 1 and plan.branched == ()
    answer(scheduler, plan)
    assert scheduler.schedule().rows is scheduler.state.running.decoding.rows
    scheduler.audit()
