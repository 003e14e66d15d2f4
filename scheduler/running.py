"""Who runs: groups and sequences in the order of service, the rows that they hold, and what each of them does next."""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from quire.scheduler.blocks import AuditError
from quire.scheduler.decoding import DecodingSet
from quire.scheduler.groups import Group
from quire.scheduler.sequence import Sequence, Status

by_arrival = attrgetter("arrival")


class RunningSet:
    """Every running sequence is a member of `decoding`, stands in `prefilling`, is a beam, or has computed its last
    token."""

    def __init__(self, num_rows: int) -> None:
        self.groups: list[Group] = []
        """In order of arrival; so are the sequences."""
        self.sequences: list[Sequence] = []
        self.decoding = DecodingSet()
        self.prefilling: list[Sequence] = []
        """Those with more known tokens to compute, in order of arrival."""
        self.joining: list[Group] = []
        """Groups with sequences that wait for what a sibling computes again."""
        self.searched: list[Group] = []
        """Groups whose beams have been told how they go on, in order of arrival."""
        self._num_rows = num_rows
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._num_promised = 0

    @property
    def num_free_rows(self) -> int:
        """Those that are promised to running groups not counted."""
        return len(self._free_rows) - self._num_promised

    def enter(self, group: Group) -> None:
        group.is_running = True
        insort(self.groups, group, key=by_arrival)

    def leave(self, group: Group) -> None:
        """It runs no more; its sequences have stopped."""
        del self.groups[bisect_left(self.groups, group.arrival, key=by_arrival)]
        group.is_running = False
        for groups in (self.joining, self.searched):
            if group in groups:
                groups.remove(group)
        self.promise(group)

    def promise(self, group: Group) -> None:
        """Keep as many rows free for a running group as it has still to take."""
        wanted = group.num_rows - group.num_held if group.is_running and group.sequences else 0
        self._num_promised += wanted - group.num_promised
        group.num_promised = wanted

    def settle(self, group: Group) -> None:
        """A sequence has left it. Who computed the prompt for that one too, and has one token left, now decodes."""
        self.promise(group)
        if group.search is not None or group.is_led:
            return
        for sequence in [s for s in self.prefilling if s.group is group and s.gap == 1]:
            self.prefilling.remove(sequence)
            self.decoding.enter(sequence)

    def start(self, sequence: Sequence) -> None:
        """Give it a row. The caller has checked that there is one for it."""
        sequence.row = self._free_rows.pop()
        sequence.status = Status.RUNNING
        if self.sequences and self.sequences[-1].arrival > sequence.arrival:
            insort(self.sequences, sequence, key=by_arrival)
        else:
            self.sequences.append(sequence)

    def stop(self, sequence: Sequence) -> int:
        """Take its row, which is free, and returned. It is left waiting."""
        del self.sequences[bisect_left(self.sequences, sequence.arrival, key=by_arrival)]
        self.decoding.leave(sequence)
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        row, sequence.row = sequence.row, -1
        sequence.status = Status.WAITING
        self._free_rows.append(row)
        return row

    def audit(self) -> None:
        """Raises AuditError."""
        decoding = [s for s in self.sequences if s.group.search is None and not s.group.is_led]
        self.decoding.audit(decoding)
        prefilling = [s for s in self.sequences if s.gap > 1 or s.group.is_led or self._is_unread_beam(s)]
        if self.prefilling != prefilling:
            raise AuditError(f"{self.prefilling} are not the running sequences with chunks to compute: {prefilling}")
        joining = [group for group in self.groups if group.has_joining]
        if not set(joining) <= set(self.joining):
            raise AuditError(f"{joining} have sequences that wait for siblings")
        for items in (self.groups, self.sequences):
            arrivals = [item.arrival for item in items]
            if arrivals != sorted(set(arrivals)):
                raise AuditError(f"{items} are not in order of arrival")
        in_groups = {id(s) for group in self.groups for s in group.sequences if s.status is Status.RUNNING}
        if in_groups != {id(sequence) for sequence in self.sequences}:
            raise AuditError("the running sequences are not those of the running groups")
        self._audit_rows()

    def _is_unread_beam(self, sequence: Sequence) -> bool:
        """A beam with a known token to compute that no plan has taken up and no search has just told."""
        group = sequence.group
        return group.search is not None and sequence.num_in_flight == 0 and group not in self.searched

    def _audit_rows(self) -> None:
        rows = [sequence.row for sequence in self.sequences]
        if sorted(rows + self._free_rows) != list(range(self._num_rows)):
            raise AuditError(f"rows {sorted(rows)} in use and {sorted(self._free_rows)} free do not make up the table")
        promised = sum(group.num_promised for group in self.groups)
        if promised != self._num_promised or self.num_free_rows < 0:
            raise AuditError(
                f"{self._num_promised} of {len(self._free_rows)} free rows are promised, {promised} by groups"
            )
