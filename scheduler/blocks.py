"""The pool of KV blocks: who is free, and how often each block is referred to.

The free list is intrusive (two integer arrays and a sentinel), so that taking, returning and, later, reviving a block
in its middle are O(1). Its order is the order of reuse: last freed first, because that memory is warm, and because a
pool on a CPU then takes no more memory than its sequences ever needed at once. Blocks that are worth finding again
will join at the other end.

Invariant: a block is on the free list exactly when its reference count is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class AuditError(AssertionError):
    """The books do not balance: a bug in Quire, never a user's mistake."""


class BlockPool:
    """`num_blocks` block ids, 0 to num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._ref_counts: list[int] = [0] * num_blocks
        # Position num_blocks is the sentinel: the list is a ring through it.
        self._next: list[int] = [*range(1, num_blocks + 1), 0]
        self._previous: list[int] = [num_blocks, *range(num_blocks)]

    def allocate(self) -> int:
        """Take the block that was freed last, with one reference. The caller has checked `num_free`."""
        sentinel = self.num_blocks
        block = self._next[sentinel]
        if block == sentinel:
            raise AuditError("no free block: the caller must check num_free first")
        after = self._next[block]
        self._next[sentinel] = after
        self._previous[after] = sentinel
        self._ref_counts[block] = 1
        self.num_free -= 1
        return block

    def share(self, block: int) -> None:
        """One more table refers to a block in use."""
        if self._ref_counts[block] < 1:
            raise AuditError(f"block {block} is free and cannot be shared")
        self._ref_counts[block] += 1

    def release(self, block: int) -> None:
        """One table less refers to the block; without any it is the first to be taken again."""
        count = self._ref_counts[block]
        if count < 1:
            raise AuditError(f"block {block} is free already")
        self._ref_counts[block] = count - 1
        if count == 1:
            sentinel = self.num_blocks
            first = self._next[sentinel]
            self._next[sentinel] = block
            self._previous[block] = sentinel
            self._next[block] = first
            self._previous[first] = block
            self.num_free += 1

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def free_blocks(self) -> list[int]:
        """The free list, next to be taken first. O(free): for audits and tests."""
        blocks, block = [], self._next[self.num_blocks]
        while block != self.num_blocks:
            blocks.append(block)
            block = self._next[block]
        return blocks

    def audit(self, tables: Iterable[list[int]]) -> None:
        """Compare the books with `tables`, the block tables of all sequences. Raises AuditError."""
        entries = Counter(block for table in tables for block in table)
        free = self.free_blocks()
        if len(free) != self.num_free or len(set(free)) != len(free):
            raise AuditError(f"the free list {free} does not hold {self.num_free} distinct blocks")
        if self.num_free + len(entries) != self.num_blocks:
            raise AuditError(f"{self.num_free} free + {len(entries)} in tables is not {self.num_blocks} blocks")
        for block, count in enumerate(self._ref_counts):
            if count != entries[block]:
                raise AuditError(f"block {block} has reference count {count} but {entries[block]} table entries")
        if any(self._ref_counts[block] for block in free):
            raise AuditError("a block is free and in use at once")
