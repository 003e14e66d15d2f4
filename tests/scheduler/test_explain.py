"""Requests' lives: what is kept of them, what it adds up to, and in which words."""

import pytest

from quire.scheduler.explaining.explain import TURN, Lives
from quire.scheduler.explaining.journal import (
    Added,
    Admitted,
    Blocked,
    Branched,
    Cancelled,
    Chunk,
    Copied,
    Discarded,
    Ended,
    Event,
    Finished,
    Forked,
    Preempted,
    Resumed,
    Wait,
)
from quire.scheduler.explaining.words import in_words, seconds_text
from quire.scheduler.sequence import FinishReason


class _Story:
    """A journal on a clock that is set by hand."""

    def __init__(self, **bounds):
        self.now = 100.0
        self.lives = Lives(clock=lambda: self.now, **bounds)
        self.step = 0

    def tell(self, after, name, *events):
        self.now += after
        self.step += 1
        for event in events:
            self.lives.note(self.step, name, event)


def _long_wait():
    story = _Story()
    story.tell(0, "a", Added(70, 2, 3))
    story.tell(0.5, "a", Blocked(Wait.ROWS, 2, 1))
    story.tell(0.25, "a", Blocked(Wait.BLOCKS, 9, 4))
    story.tell(1.25, "a", Admitted(70, 32, 5), Chunk(0, 30))
    story.tell(0.125, "a", Chunk(0, 8), Branched(0, 1))
    story.tell(0, "a", Copied(1, 4, 8))
    story.tell(1, "a", Preempted("b", "recompute", 6, 75, 0.25, 0.002))
    story.tell(0.5, "a", Blocked(Wait.RESULTS, 1, 0))
    story.tell(0.25, "a", Admitted(76, 16, 7), Chunk(0, 40), Chunk(1, 36))
    story.tell(1, "a", Preempted("a", "swap", 7, 80, 0.0, 0.0))
    return story


def test_waiting_adds_up_by_reason():
    story = _long_wait()
    story.tell(2, "a", Resumed(7, 80))
    story.tell(1, "a", Finished(0, FinishReason.STOP, 12))
    story.tell(1, "a", Finished(1, FinishReason.LENGTH, 20), Ended(), Discarded(0, 2))
    story.tell(5, "b", Added(1, 1, 0))
    found = story.lives.explain("a")
    sums = found.sums
    assert (found.state, found.age_s) == ("finished", 8.875)
    assert sums.waited_s == {
        TURN: 0.5 + 0.5 + 2,
        Wait.ROWS.value: 0.25,
        Wait.BLOCKS.value: 1.25,
        Wait.RESULTS.value: 0.25,
    }
    assert sums.preempted_s == 2.75
    assert (sums.num_preemptions, sums.num_swaps, sums.num_chunks) == (2, 1, 4)
    assert (sums.num_cached_tokens, sums.num_recomputed_tokens) == (48, 59)
    assert (sums.num_copied_blocks, sums.num_discarded_tokens, sums.num_output_tokens) == (1, 2, 32)
    assert [moment.at_s for moment in found.moments[:4]] == [0, 0.5, 0.75, 2]
    assert [moment.kind for moment in found.moments[-3:]] == ["Finished", "Ended", "Discarded"]
    assert [moment.step for moment in found.moments[-3:]] == [13, 13, 13]


def test_waiting_that_goes_on_is_counted_to_now():
    story = _long_wait()
    story.now += 3
    for _ in range(2):  # asking changes nothing
        found = story.lives.explain("a")
        assert found.state == "preempted" and found.sums.waited_s[TURN] == 4 and found.sums.preempted_s == 3.75
    story.tell(0, "b", Added(1, 1, 0))
    assert story.lives.explain("b").state == "waiting"
    story.tell(1, "b", Admitted(1, 0, 1))
    assert story.lives.explain("b").state == "running"


def test_a_person_reads_it():
    story = _long_wait()
    story.tell(0.5, "a", Cancelled(0, 3), Cancelled(1, 4), Ended())
    assert story.lives.explain("a").lines() == [
        "request a: cancelled, 5.38 s old",
        "  +0.000 s  step 1  arrived: 70 prompt tokens, 2 sequences, 3 requests before it",
        "  +0.500 s  step 2  first in the queue, waits for a free place among the running sequences: needs 2, there are"
        " 1",
        "  +0.750 s  step 3  first in the queue, waits for free blocks: needs 9, there are 4",
        "  +2.000 s  step 4  let in with 70 tokens, 32 of them found in the cache; it has 5 blocks",
        "  +2.000 s  step 4  [0] computes 30 known tokens",
        "  +2.125 s  step 5  [0] computes 8 known tokens",
        "  +2.125 s  step 5  [1] begins, from the prompt that [0] has computed",
        "  +2.125 s  step 6  [1] gets a copy of a shared block: 4 to 8",
        "  +3.125 s  step 7  preempted for b, its tokens are to be computed again: gives up 6 blocks, 75 tokens"
        " (estimated cost: swap 250.0 ms, recompute 2.0 ms)",
        "  +3.625 s  step 8  first in the queue, waits for its own tokens, still in flight: needs 1, there are 0",
        "  +3.875 s  step 9  let in with 76 tokens, 16 of them found in the cache; it has 7 blocks",
        "  +3.875 s  step 9  [0] computes 40 known tokens",
        "  +3.875 s  step 9  [1] computes 36 known tokens",
        "  +4.875 s  step 10  preempted as the latest, for itself, swapped out: gives up 7 blocks, 80 tokens",
        "  +5.375 s  step 11  [0] is cancelled after 3 tokens",
        "  +5.375 s  step 11  [1] is cancelled after 4 tokens",
        "  +5.375 s  step 11  over: its memory is free",
        "  waited 3.25 s: 1.50 s for its turn, 250.0 ms for a free place among the running sequences, 1.25 s for free"
        " blocks, 250.0 ms for its own tokens, still in flight",
        "  preempted 2 times (1 by swap, 1 by recompute), 1.25 s out of the pool, 59 tokens computed again",
        "  4 chunks, 48 tokens from the cache, 1 block copied, 0 tokens lost to planning ahead, 7 tokens of output in"
        " what has ended",
    ]


def test_other_requests_are_named_to_the_operator_only():
    story = _long_wait()
    lines = story.lives.explain("a", with_names=False).lines()
    assert any("preempted for an earlier one, " in line for line in lines)
    assert not any("for b," in line for line in lines)
    assert any("for itself" in line for line in lines)


def test_every_event_has_words():
    events = {
        Added: Added(1, 1, 1), Blocked: Blocked(Wait.PREEMPTED, 0, 0), Admitted: Admitted(1, 0, 1),
        Chunk: Chunk(0, 1), Branched: Branched(0, 1), Forked: Forked(2, 1), Copied: Copied(0, 1, 2),
        Preempted: Preempted("b", "swap", 1, 1, 0.5, 0), Resumed: Resumed(1, 1), Discarded: Discarded(3, 1),
        Finished: Finished(0, FinishReason.STOP, 1), Cancelled: Cancelled(0, 1), Ended: Ended(),
    }  # fmt: skip
    assert set(events) == set(Event.__args__)
    for event in events.values():
        words = in_words("a", event)
        assert "None" not in words and "1 tokens" not in words and "1 blocks" not in words


def test_those_that_have_ended_are_forgotten_in_order():
    story = _Story(num_ended=3)
    for name in "abcde":
        story.tell(1, name, Added(1, 1, 0), Admitted(1, 0, 1), Finished(0, FinishReason.STOP, 1), Ended())
    story.tell(1, "f", Added(1, 1, 0))
    assert [name for name in "abcdef" if story.lives.explain(name)] == ["c", "d", "e", "f"]
    assert len(story.lives) == 4
    story.tell(1, "a", Discarded(0, 1))  # of one that is forgotten: nothing
    assert story.lives.explain("a") is None and story.lives.explain("never") is None


def test_an_id_that_is_used_again_is_the_new_request():
    story = _Story(num_ended=1)
    story.tell(0, "a", Added(1, 1, 0), Cancelled(0, 0), Ended())
    story.tell(1, "a", Added(5, 1, 0))
    story.tell(1, "b", Added(1, 1, 0), Cancelled(0, 0), Ended())  # has the first one forgotten, not the second
    assert story.lives.explain("a").moments[0].text.startswith("arrived: 5 prompt tokens")


@pytest.mark.parametrize("num_events", [8, 9, 400])
def test_of_a_long_life_the_beginning_and_the_end_are_kept(num_events):
    story = _Story(num_kept=4)
    story.tell(0, "a", Added(1, 1, 0))
    for number in range(num_events - 1):
        story.tell(1, "a", Chunk(0, number))
    found = story.lives.explain("a")
    assert len(found.moments) == 8 and found.num_omitted == num_events - 8
    assert [moment.step for moment in found.moments] == [1, 2, 3, 4, *range(num_events - 3, num_events + 1)]
    assert found.sums.num_chunks == num_events - 1
    omitted = [line for line in found.lines() if "only summed up" in line]
    assert len(omitted) == (num_events > 8) and (not omitted or found.lines()[5] == omitted[0])


def test_seconds_in_three_sizes():
    assert [seconds_text(value) for value in (0, 4e-5, 0.0123, 61.5)] == ["0 µs", "40 µs", "12.3 ms", "61.50 s"]
