"""Who waits, in order of arrival: the preempted come back before anybody who came after them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from quire.scheduler.blocks import AuditError
from quire.scheduler.groups import Group
from quire.scheduler.running import by_arrival


class WaitingQueue:
    """Of groups. O(1) at both ends."""

    def __init__(self) -> None:
        self.num_sequences = 0
        """Rows that the groups need."""
        self.num_tokens = 0
        """Tokens that the groups' first sequences have to compute, each as it was when its group came."""
        self._tokens: dict[Group, int] = {}
        self._groups: deque[Group] = deque()

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    @property
    def first(self) -> Group:
        return self._groups[0]

    def push(self, group: Group) -> None:
        """Into its place."""
        self.num_sequences += group.num_rows
        self._tokens[group] = group.sequences[0].gap
        self.num_tokens += self._tokens[group]
        if not self._groups or self._groups[-1].arrival < group.arrival:
            self._groups.append(group)
            return
        place = next(i for i, other in enumerate(self._groups) if other.arrival > group.arrival)
        self._groups.insert(place, group)

    def remove(self, group: Group) -> None:
        """With all its sequences still in it."""
        self._groups.remove(group)
        self.num_tokens -= self._tokens.pop(group)
        self.num_sequences -= group.num_rows

    def audit(self) -> None:
        """Raises AuditError."""
        arrivals = [group.arrival for group in self._groups]
        if arrivals != sorted(set(arrivals)):
            raise AuditError(f"{list(self._groups)} are not in order of arrival")
        if self.num_sequences != sum(group.num_rows for group in self._groups):
            raise AuditError(f"{self.num_sequences} sequences wait by the count, not by the queue")
        if self.num_tokens != sum(self._tokens.values()) or list(self._groups) != sorted(self._tokens, key=by_arrival):
            raise AuditError(f"{self.num_tokens} tokens wait by the count, {self._tokens} by group")
