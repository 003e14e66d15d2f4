"""The sequences that compute one token in every step, and when each of them needs more than that.

Nearly everything that a server's step computes is such a token, and the next step computes it for the same rows. So
what a plan says of them is kept ready until one comes or goes, and a calendar tells whom something else happens to:
nobody else is looked at.

Invariant: the members are the running sequences with one known token to compute. Each stands in the calendar once,
under its `due`: the clock's time at which its blocks are full or its last token is computed, whichever is earlier; and
at once while its last block may be another's too.
"""

from __future__ import annotations

from quire.scheduler.blocks import AuditError
from quire.scheduler.sequence import Clock, Sequence


class DecodingSet:
    """Rows that decode. O(1) to enter and to leave; O(due) per step, and O(members), in C, after a change."""

    def __init__(self) -> None:
        self.clock = Clock()
        """Steps so far; it moves on with every plan."""
        self._members: dict[int, Sequence] = {}
        """By row."""
        self._calendar: dict[int, dict[int, Sequence]] = {}
        """By due time, and by arrival."""
        self._rows: tuple[int, ...] | None = ()
        self._sequences: tuple[Sequence, ...] | None = ()

    @property
    def rows(self) -> tuple[int, ...]:
        """The same object as long as nobody comes or goes."""
        if self._rows is None:
            self._rows = tuple(self._members)
        return self._rows

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """In the order of `rows`; the same object as long as nobody comes or goes."""
        if self._sequences is None:
            self._sequences = tuple(self._members.values())
        return self._sequences

    def enter(self, sequence: Sequence) -> None:
        """From the next step on it computes a token in each. It has one known token to compute."""
        assert sequence.gap == 1 and sequence.num_computed < sequence.max_computed
        self._members[sequence.row] = sequence
        self._rows = self._sequences = None
        sequence.follow(self.clock)
        self.enroll(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It computes nothing more, or not in every step. Does nothing for who is no member."""
        if self._members.get(sequence.row) is not sequence:
            return
        del self._members[sequence.row]
        self._rows = self._sequences = None
        sequence.unfollow()
        bucket = self._calendar.get(sequence.due)
        if bucket is not None:  # else the calendar's page has been taken off
            bucket.pop(sequence.arrival, None)
        sequence.due = -1

    def take_due(self) -> list[Sequence]:
        """Those whose blocks are full or whose last token is computed in this step, in order of arrival.

        Off the calendar: whoever goes on decoding must be enrolled again."""
        due = self._calendar.pop(self.clock.now, None)
        return [due[arrival] for arrival in sorted(due)] if due else []

    def enroll(self, sequence: Sequence) -> None:
        """Note when the sequence is due: from what it has computed by now, and after it has the blocks for more."""
        sequence.due = self.clock.now + _steps_left(sequence)
        self._calendar.setdefault(sequence.due, {})[sequence.arrival] = sequence

    def audit(self, running: list[Sequence]) -> None:
        """Compare with a walk over all running sequences. Raises AuditError. O(running)."""
        expected = {s.row: s for s in running if s.gap == 1 and s.num_computed < s.max_computed}
        if self._members != expected:
            raise AuditError(f"rows {sorted(self._members)} decode, not {sorted(expected)}")
        if self.rows != tuple(self._members) or self.sequences != tuple(self._members.values()):
            raise AuditError("what is kept ready for the plans is stale")
        entries = sorted((due, arrival) for due, bucket in self._calendar.items() for arrival in bucket)
        now = self.clock.now
        due = sorted((now + _steps_left(s), s.arrival) for s in self._members.values())
        if entries != due or any(time < now for time, _ in entries):
            raise AuditError(f"the calendar says {entries} at {now}, not {due}")


def _steps_left(sequence: Sequence) -> int:
    """Steps in which nothing but the next token happens to it."""
    if sequence.is_tail_shared:
        return 0
    end, capacity = sequence.max_computed - 1, sequence.capacity
    return (capacity if capacity < end else end) - sequence.num_computed
