"""What is kept ready between two steps: who decodes, when each is due, which tokens may end somebody."""

from __future__ import annotations

import pytest
from schedulers import answer, make_request, make_scheduler

from quire.scheduler.blocks import AuditError
from quire.scheduler.decoding import DecodingSet
from quire.scheduler.groups import Group
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Clock, Sequence
from quire.scheduler.stops import NOT_A_NUMBER, StopTokens


def decoding(arrival: int, num_tokens: int, capacity: int, max_tokens: int = 20) -> Sequence:
    """All its tokens but one are computed."""
    sequence = Sequence(Group(make_request(str(arrival), [1] * num_tokens, max_tokens=max_tokens), arrival), 0, arrival)
    sequence.compute(num_tokens - 1)
    sequence.row, sequence.capacity = 10 + arrival, capacity
    return sequence


def test_numbers_follow_the_clock_and_stay_when_it_is_left():
    clock, sequence = Clock(), decoding(0, 5, 8)
    clock.now = 100
    sequence.follow(clock)
    assert (sequence.num_computed, sequence.num_tokens) == (4, 5)
    clock.now += 3
    assert (sequence.num_computed, sequence.num_tokens, sequence.num_in_flight) == (7, 8, 3)
    sequence.unfollow()
    clock.now += 1
    assert (sequence.num_computed, sequence.num_tokens) == (7, 8)
    assert sequence.compute(1) and (sequence.num_computed, sequence.num_tokens) == (8, 9)
    sequence.forget_computed()
    assert (sequence.num_computed, sequence.num_tokens, sequence.gap) == (0, 9, 9)


def test_the_calendar_tells_whose_blocks_are_full_and_who_ends_in_order_of_arrival():
    members = DecodingSet()
    full_in_two, full_now = decoding(2, 3, 4), decoding(1, 5, 4)
    ends_in_two = decoding(0, 4, 64, max_tokens=3)  # seven tokens, six of them computed: the last in step 2
    for sequence in (full_in_two, full_now, ends_in_two):
        members.enter(sequence)
    assert members.rows == (12, 11, 10) and members.sequences == (full_in_two, full_now, ends_in_two)
    assert members.take_due() == [full_now]
    full_now.capacity += 4
    members.enroll(full_now)
    due = []
    for _ in range(4):
        members.clock.now += 1
        due.append(members.take_due())
        for sequence in due[-1]:
            sequence.capacity += 4
            if sequence is not ends_in_two:
                members.enroll(sequence)
    assert due == [[], [ends_in_two, full_in_two], [], [full_now]]


def test_who_leaves_is_due_no_more():
    members, gone, kept = DecodingSet(), decoding(0, 3, 4), decoding(1, 3, 4)
    members.enter(gone)
    members.enter(kept)
    members.leave(gone)
    members.leave(gone)  # no member any more
    assert members.rows == (11,) and gone.due == -1
    members.clock.now += 2
    assert members.take_due() == [kept]


def running_scheduler() -> Scheduler:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    for name in "ab":
        scheduler.add(make_request(name, [1, 2], eos=(9,)))
    answer(scheduler, scheduler.schedule())
    scheduler.add(make_request("long", [1] * 30))
    answer(scheduler, scheduler.schedule())
    scheduler.audit()
    return scheduler


def lose_an_entry(scheduler: Scheduler) -> None:
    scheduler.state.running.decoding._calendar.popitem()


def keep_a_stale_row(scheduler: Scheduler) -> None:
    scheduler.state.running.decoding._rows = (0,)


def forget_a_member(scheduler: Scheduler) -> None:
    scheduler.state.running.decoding.leave(scheduler.running[0])


def forget_a_chunk(scheduler: Scheduler) -> None:
    scheduler.state.running.prefilling.clear()


def forget_a_stop_token(scheduler: Scheduler) -> None:
    scheduler.state.requests.stops.tokens.discard(9)


def count_a_stop_token_twice(scheduler: Scheduler) -> None:
    scheduler.state.requests.stops.add([9])


@pytest.mark.parametrize(
    "damage",
    [lose_an_entry, keep_a_stale_row, forget_a_member, forget_a_chunk, forget_a_stop_token, count_a_stop_token_twice],
)
def test_an_audit_notices(damage):
    scheduler = running_scheduler()
    damage(scheduler)
    with pytest.raises(AuditError):
        scheduler.audit()


def test_a_stop_token_counts_as_long_as_anybody_has_it():
    stops = StopTokens()
    stops.add([3, 5])
    stops.add([5])
    assert stops.tokens == {NOT_A_NUMBER, 3, 5}
    stops.remove([3, 5])
    assert stops.tokens == {NOT_A_NUMBER, 5}
    stops.remove([5])
    assert stops.tokens == {NOT_A_NUMBER}
    stops.audit([])
