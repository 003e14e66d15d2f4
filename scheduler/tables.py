"""Block tables: which blocks hold a sequence's tokens, in order. The paper's verbs live here (section 4.3-4.5).

Invariant: a running sequence owns ceil(known tokens / block size) blocks or one fewer (its next token's block is
taken when that token is about to be computed); any other sequence owns none.
"""

from __future__ import annotations

from collections.abc import Iterable

from quire.scheduler.blocks import BlockPool
from quire.scheduler.sequence import Sequence


class BlockTables:
    """Maps sequences to blocks of one pool. The table itself is `sequence.block_ids`, written only here."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_reserve(self, num_tokens: int, keep_free: int) -> bool:
        """Whether blocks for `num_tokens` can be had with `keep_free` left over."""
        return self.pool.num_free - self.blocks_for(num_tokens) >= keep_free

    def reserve(self, sequence: Sequence) -> None:
        """Take the blocks of all tokens that the sequence knows. The caller has checked `can_reserve`."""
        for _ in range(self.blocks_for(sequence.num_tokens) - len(sequence.block_ids)):
            self.append(sequence)

    def append(self, sequence: Sequence) -> int:
        """Take one more block for the sequence's next tokens; returns its id."""
        block = self.pool.allocate()
        sequence.block_ids.append(block)
        sequence.capacity += self.block_size
        return block

    def free(self, sequence: Sequence) -> None:
        """Give all blocks back, tail first, so that they are taken again in the order of the table."""
        for block in reversed(sequence.block_ids):
            self.pool.release(block)
        sequence.block_ids.clear()
        sequence.capacity = 0

    def audit(self, sequences: Iterable[Sequence]) -> None:
        """Raises AuditError unless pool and tables agree."""
        self.pool.audit(sequence.block_ids for sequence in sequences)
