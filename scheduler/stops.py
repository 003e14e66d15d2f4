"""Every token that may end a sequence in progress, so that a step in which none came up is told at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from quire.scheduler.blocks import AuditError

NOT_A_NUMBER = -1
"""Stands for logits that were not numbers, and ends any sequence."""


class StopTokens:
    """A multiset of stop tokens: each counts as often as requests in progress name it."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.tokens = {NOT_A_NUMBER}
        """All of them; to be read only."""

    def add(self, token_ids: Iterable[int]) -> None:
        for token in token_ids:
            self._counts[token] = self._counts.get(token, 0) + 1
            self.tokens.add(token)

    def remove(self, token_ids: Iterable[int]) -> None:
        """What was added must be removed once."""
        for token in token_ids:
            count = self._counts.pop(token)
            if count > 1:
                self._counts[token] = count - 1
            else:
                self.tokens.discard(token)

    def audit(self, in_progress: Iterable[Iterable[int]]) -> None:
        """Compare with the stop tokens of each request in progress. Raises AuditError."""
        counts = Counter(token for tokens in in_progress for token in tokens)
        if self._counts != counts or self.tokens != {NOT_A_NUMBER, *counts}:
            raise AuditError(f"the stop tokens are {self.tokens}, counted {self._counts}, not {counts}")
