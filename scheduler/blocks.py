"""The pool of KV blocks: who is free, how often each block is referred to, and what free ones still hold.

The free list is the cache. It is intrusive (two integer arrays and a sentinel), so that taking, returning and reviving
a block in its middle are O(1). Blocks that hold nothing worth finding stand in front, last freed first: that memory is
warm, and a pool on a CPU takes no more memory than its sequences ever needed at once. Blocks that can be found by
their content stand behind them, in the order in which they were freed: they are taken last, the longest unused first.

Invariants: a block is on the free list exactly when its reference count is 0; a content is held by one block at most.
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
        """Blocks that can be taken, those with content among them."""
        self.num_cached = 0
        """Free blocks that can be found by their content."""
        self._ref_counts: list[int] = [0] * num_blocks
        # Position num_blocks is the sentinel: the list is a ring through it.
        self._next: list[int] = [*range(1, num_blocks + 1), 0]
        self._previous: list[int] = [num_blocks, *range(num_blocks)]
        self._content: list[bytes | None] = [None] * num_blocks
        self._holder: dict[bytes, int] = {}

    def allocate(self) -> int:
        """Take the next free block, with one reference; what it held is forgotten. The caller has checked num_free."""
        block = self._next[self.num_blocks]
        if block == self.num_blocks:
            raise AuditError("no free block: the caller must check num_free first")
        self._unlink(block)
        content = self._content[block]
        if content is not None:
            self._content[block] = None
            del self._holder[content]
            self.num_cached -= 1
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more table refers to a block in use."""
        if self._ref_counts[block] < 1:
            raise AuditError(f"block {block} is free and cannot be shared")
        self._ref_counts[block] += 1

    def release(self, block: int) -> None:
        """One table less refers to the block; without any it is free."""
        count = self._ref_counts[block]
        if count < 1:
            raise AuditError(f"block {block} is free already")
        self._ref_counts[block] = count - 1
        if count == 1:
            sentinel = self.num_blocks
            if self._content[block] is None:
                before, after = sentinel, self._next[sentinel]
            else:
                before, after = self._previous[sentinel], sentinel
                self.num_cached += 1
            self._next[before] = self._previous[after] = block
            self._previous[block], self._next[block] = before, after
            self.num_free += 1

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    # -- content

    def find(self, content: bytes) -> int | None:
        """The block that holds this, free or in use."""
        return self._holder.get(content)

    def remember(self, block: int, content: bytes) -> None:
        """A block in use holds this from now on. Ignored where another one holds it already."""
        if content not in self._holder and self._content[block] is None:
            self._content[block] = content
            self._holder[content] = block

    def refer(self, block: int) -> None:
        """One more table refers to a block that was found; a free one is taken off the list and keeps its content."""
        if self._ref_counts[block]:
            self._ref_counts[block] += 1
            return
        if self._content[block] is None:
            raise AuditError(f"block {block} is free and holds nothing")
        self._unlink(block)
        self.num_cached -= 1
        self._ref_counts[block] = 1

    def forget_free(self) -> int:
        """Free blocks hold nothing any more, and are the next to be taken; returns how many did. O(free)."""
        blocks = [block for block in self.free_blocks() if self._content[block] is not None]
        for block in blocks:
            self.refer(block)
            content, self._content[block] = self._content[block], None
            assert content is not None
            del self._holder[content]
            self.release(block)
        return len(blocks)

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before
        self.num_free -= 1

    # -- looking in

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
        self._audit_content(free)

    def _audit_content(self, free: list[int]) -> None:
        holders = {content: block for block, content in enumerate(self._content) if content is not None}
        if holders != self._holder or len(holders) != sum(content is not None for content in self._content):
            raise AuditError("blocks and contents do not name each other")
        has_content = [self._content[block] is not None for block in free]
        if has_content != sorted(has_content) or sum(has_content) != self.num_cached:
            raise AuditError(f"the free list's blocks with content are not the last {self.num_cached}: {has_content}")
