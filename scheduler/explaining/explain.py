"""Why a request took as long as it did: its life, from what the scheduler told of it (journal.py).

`Lives` is a journal that keeps requests in progress and, for a while, those that have ended. Its memory is bounded: of
a long life the first and the last events are kept, and of all of it the sums.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from quire.scheduler.explaining.journal import (
    Added,
    Admitted,
    Blocked,
    Cancelled,
    Chunk,
    Copied,
    Discarded,
    Ended,
    Event,
    Finished,
    Preempted,
    Resumed,
)
from quire.scheduler.explaining.words import count, in_words, seconds_text

TURN = "its turn"
"""What a request waits for until it is the first in the queue."""


class Moment(NamedTuple):
    """One event of a life."""

    at_s: float
    """Seconds since the request arrived."""
    step: int
    kind: str
    """Name of the event's class in journal.py."""
    text: str


@dataclass(slots=True)
class Sums:
    """Of a whole life, whatever of its events is still kept."""

    waited_s: dict[str, float] = field(default_factory=dict)
    """Seconds in the queue, by what it waited for: before it ran for the first time, and after preemptions."""
    preempted_s: float = 0.0
    """Seconds of the waiting that came after preemptions."""
    num_preemptions: int = 0
    num_swaps: int = 0
    """Preemptions that moved the blocks out; the others let tokens be computed again."""
    num_chunks: int = 0
    num_cached_tokens: int = 0
    """Tokens found in the prefix cache or in a reserved prefix, each time it was let in."""
    num_recomputed_tokens: int = 0
    """Given up by preemptions, and not found in the cache afterwards."""
    num_copied_blocks: int = 0
    num_discarded_tokens: int = 0
    """Lost to planning ahead."""
    num_output_tokens: int = 0
    """Of the sequences that have ended."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A life as it is now."""

    request_id: str
    state: str
    """"waiting", "running", "preempted", "finished", or "cancelled": nothing of it ended by itself."""
    age_s: float
    """Seconds from its arrival to its end, or to now."""
    sums: Sums
    moments: tuple[Moment, ...]
    num_omitted: int
    """Events in the middle that are not kept."""

    def lines(self) -> list[str]:
        """For a person to read."""
        return [
            f"request {self.request_id}: {self.state}, {seconds_text(self.age_s)} old",
            *_told(self),
            *_summed(self),
        ]


class _Life:
    __slots__ = (
        "ended_at",
        "first",
        "last",
        "num_events",
        "num_finished",
        "num_given_up",
        "state",
        "sums",
        "wait",
        "waits_from",
    )

    def __init__(self, num_kept: int) -> None:
        self.first: list[tuple[float, int, Event]] = []
        self.last: deque[tuple[float, int, Event]] = deque(maxlen=num_kept)
        self.num_events = 0
        self.sums = Sums()
        self.state = "waiting"
        self.num_finished = 0
        self.num_given_up = 0
        """Computed tokens that the last preemption has taken, and that have not been computed again."""
        self.wait: str | None = TURN
        """What it waits for; None: it does not."""
        self.waits_from = 0.0
        self.ended_at: float | None = None


class Lives:
    """A journal. `num_ended`: requests that stay explainable after their end; `num_kept`: events kept of each life at
    its beginning, and as many at its end. `clock` counts seconds."""

    def __init__(self, num_ended: int = 1024, num_kept: int = 64, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_ended = num_ended
        self._num_kept = num_kept
        self._clock = clock
        self._lives: dict[str, _Life] = {}
        self._ended: deque[tuple[str, _Life]] = deque()

    def __len__(self) -> int:
        return len(self._lives)

    def note(self, step: int, request_id: str, event: Event) -> None:
        now = self._clock()
        if isinstance(event, Added):
            life = self._lives[request_id] = _Life(self._num_kept)
            life.waits_from = now
        else:
            known = self._lives.get(request_id)
            if known is None:
                return  # it ended so long ago that it is forgotten
            life = known
        kept = life.first if len(life.first) < self._num_kept else life.last
        kept.append((now, step, event))
        life.num_events += 1
        _add_up(life, now, event)
        if isinstance(event, Ended):
            self._end(request_id, life, now)

    def _end(self, request_id: str, life: _Life, now: float) -> None:
        life.ended_at = now
        _stop_waiting(life, now)
        life.state = "finished" if life.num_finished else "cancelled"
        self._ended.append((request_id, life))
        if len(self._ended) > self._num_ended:
            name, oldest = self._ended.popleft()
            if self._lives.get(name) is oldest:  # else its id has been used again
                del self._lives[name]

    def explain(self, request_id: str, with_names: bool = True) -> Explanation | None:
        """None for a request that was never here, or is forgotten. Of several with one id, the latest.

        `with_names`: tell the ids of the requests for which it was preempted; whoever knows an id can end a request."""
        life = self._lives.get(request_id)
        if life is None:
            return None
        now = self._clock() if life.ended_at is None else life.ended_at
        arrived = life.first[0][0]
        moments = tuple(
            Moment(at - arrived, step, type(event).__name__, in_words(request_id, event, with_names))
            for at, step, event in (*life.first, *life.last)
        )
        return Explanation(
            request_id, life.state, now - arrived, _sums_until(life, now), moments, life.num_events - len(moments)
        )


# -- adding up


def _add_up(life: _Life, now: float, event: Event) -> None:
    sums = life.sums
    match event:
        case Blocked():
            if life.wait is not None:
                _wait_on(life, now, event.wait.value)
        case Admitted():
            _stop_waiting(life, now)
            life.state = "running"
            sums.num_cached_tokens += event.num_cached
            sums.num_recomputed_tokens += max(0, life.num_given_up - event.num_cached)
            life.num_given_up = 0
        case Resumed():
            _stop_waiting(life, now)
            life.state = "running"
        case Preempted():
            life.state, life.wait, life.waits_from = "preempted", TURN, now
            sums.num_preemptions += 1
            sums.num_swaps += event.mode == "swap"
            life.num_given_up = 0 if event.mode == "swap" else event.num_tokens
        case Chunk():
            sums.num_chunks += 1
        case Copied():
            sums.num_copied_blocks += 1
        case Discarded():
            sums.num_discarded_tokens += event.num_tokens
        case Finished():
            life.num_finished += 1
            sums.num_output_tokens += event.num_output_tokens
        case Cancelled():
            sums.num_output_tokens += event.num_output_tokens


def _wait_on(life: _Life, now: float, wait: str | None) -> None:
    """What it waited for until now is over; from now on it is this."""
    if life.wait is not None:
        _note_wait(life.sums, life.wait, now - life.waits_from, life.state)
    life.wait, life.waits_from = wait, now


def _stop_waiting(life: _Life, now: float) -> None:
    _wait_on(life, now, None)


def _note_wait(sums: Sums, wait: str, seconds: float, state: str) -> None:
    sums.waited_s[wait] = sums.waited_s.get(wait, 0.0) + seconds
    if state == "preempted":
        sums.preempted_s += seconds


def _sums_until(life: _Life, now: float) -> Sums:
    """With the waiting that is not over, and apart from what goes on being counted."""
    sums = life.sums
    copy = Sums(**{name: getattr(sums, name) for name in Sums.__slots__})
    copy.waited_s = dict(sums.waited_s)
    if life.wait is not None:
        _note_wait(copy, life.wait, now - life.waits_from, life.state)
    return copy


# -- in words


def _told(explanation: Explanation) -> list[str]:
    lines = [f"  +{moment.at_s:.3f} s  step {moment.step}  {moment.text}" for moment in explanation.moments]
    if explanation.num_omitted:
        middle = len(lines) // 2
        lines.insert(middle, f"  … {count(explanation.num_omitted, 'event')} more, only summed up …")
    return lines


def _summed(explanation: Explanation) -> list[str]:
    sums = explanation.sums
    lines = []
    if sums.waited_s:
        parts = ", ".join(f"{seconds_text(seconds)} for {wait}" for wait, seconds in sums.waited_s.items())
        lines.append(f"  waited {seconds_text(sum(sums.waited_s.values()))}: {parts}")
    if sums.num_preemptions:
        again = sums.num_preemptions - sums.num_swaps
        lines.append(
            f"  preempted {count(sums.num_preemptions, 'time')} ({sums.num_swaps} by swap, {again} by recompute),"
            f" {seconds_text(sums.preempted_s)} out of the pool, {count(sums.num_recomputed_tokens, 'token')} computed"
            " again"
        )
    lines.append(
        f"  {count(sums.num_chunks, 'chunk')}, {count(sums.num_cached_tokens, 'token')} from the cache,"
        f" {count(sums.num_copied_blocks, 'block')} copied, {count(sums.num_discarded_tokens, 'token')} lost to"
        f" planning ahead, {count(sums.num_output_tokens, 'token')} of output in what has ended"
    )
    return lines
