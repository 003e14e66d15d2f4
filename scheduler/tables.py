"""Block tables: which blocks hold a sequence's tokens, in order. The paper's verbs live here: append, fork, free, swap
out, swap in; copy-on-write is one look at a reference count (sections 4.3 to 4.5).

Invariant: a running sequence has room for its computed tokens, and takes the block of its next token when that is about
to be computed; a waiting one owns no block of the pool, and slots of the swap space only if it was swapped out.

What the blocks hold is counted along: every computed token of a table fills a slot, and what tables share was filled
once. So the use of memory is known at every step without a walk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from quire.scheduler.blocks import AuditError, BlockPool
from quire.scheduler.sequence import Sequence


class BlockTables:
    """Maps sequences to blocks of one pool. The table itself is `sequence.block_ids`, written only here."""

    def __init__(self, pool: BlockPool, block_size: int, num_swap_blocks: int = 0) -> None:
        self.pool = pool
        self.swap = BlockPool(num_swap_blocks)
        """Slots of the swap space; shared blocks take one."""
        self.block_size = block_size
        self.num_entries = 0
        """Of all tables."""
        self.num_computed = 0
        """Tokens with KV, summed over the tables; the scheduler adds what plans compute."""
        self.num_saved = 0
        """Of them, those for which a slot that another table fills is enough."""

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- one sequence

    def reserve(self, sequence: Sequence) -> None:
        """Take the blocks of all tokens that the sequence knows. The caller has checked that there are enough."""
        for _ in range(self.blocks_for(sequence.num_tokens) - len(sequence.block_ids)):
            self.append(sequence)

    def append(self, sequence: Sequence) -> int:
        """Take one more block for the sequence's next tokens; returns its id."""
        block = self.pool.allocate()
        self._enter(sequence, block)
        return block

    def adopt(self, sequence: Sequence, block: int) -> None:
        """Go on with a block that was found by its content, and is full."""
        self.num_saved += self.block_size if self.pool.ref_count(block) else 0
        self.num_computed += self.block_size
        self.pool.refer(block)
        self._enter(sequence, block)
        sequence.skip(self.block_size)

    def take(self, sequence: Sequence, blocks: Iterable[int]) -> None:
        """Go on with blocks that were allocated for it before."""
        for block in blocks:
            self._enter(sequence, block)

    def share(self, sequence: Sequence, source: Sequence, num_blocks: int) -> None:
        """Begin with the first blocks of another sequence, all computed."""
        for block in source.block_ids[:num_blocks]:
            self.pool.share(block)
            self._enter(sequence, block)
        num_tokens = num_blocks * self.block_size
        self.num_computed += num_tokens
        self.num_saved += num_tokens
        sequence.skip(num_tokens)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child, which has the parent's numbers, gets its table: every block is shared, wherever it is."""
        if parent.swap_ids:
            for slot in parent.swap_ids:
                self.swap.share(slot)
            child.swap_ids = parent.swap_ids.copy()
            return
        for block in parent.block_ids:
            self.pool.share(block)
        child.block_ids = parent.block_ids.copy()
        child.capacity = parent.capacity
        self.num_entries += len(child.block_ids)
        self.num_computed += child.num_computed
        self.num_saved += child.num_computed

    def is_written_by_many(self, sequence: Sequence) -> bool:
        """Whether the block of the sequence's next token is another's too."""
        index = sequence.num_computed // self.block_size
        return index < len(sequence.block_ids) and self.pool.ref_count(sequence.block_ids[index]) > 1

    def copy_on_write(self, sequence: Sequence) -> tuple[int, int, int]:
        """A block of its own in place of the one that its next token goes to; (source, destination, index)."""
        index, fill = divmod(sequence.num_computed, self.block_size)
        source = sequence.block_ids[index]
        destination = self.pool.allocate()
        self.pool.release(source)
        self.num_saved -= fill
        sequence.block_ids[index] = destination
        return source, destination, index

    def free(self, sequence: Sequence) -> None:
        """Give everything back, tail first: of blocks with content the head is the last to be evicted, and of others
        the head is the first to be taken again."""
        for slot in reversed(sequence.swap_ids):
            self.swap.release(slot)
        sequence.swap_ids.clear()
        blocks, size, pool = sequence.block_ids, self.block_size, self.pool
        num_computed = sequence.num_computed if blocks else 0
        for index in range(len(blocks) - 1, -1, -1):
            if pool.ref_count(blocks[index]) > 1:
                self.num_saved -= min(size, max(0, num_computed - index * size))
            pool.release(blocks[index])
        self.num_entries -= len(blocks)
        self.num_computed -= num_computed
        blocks.clear()
        sequence.capacity = sequence.num_named = 0

    # -- groups of sequences

    def distinct(self, sequences: Iterable[Sequence]) -> tuple[int, int]:
        """Blocks that hold the computed tokens of these sequences, which own blocks, and slots that they fill."""
        fills = self._fills(sequences)
        return len(fills), sum(fills.values())

    def _fills(self, sequences: Iterable[Sequence]) -> dict[int, int]:
        """By block."""
        fills: dict[int, int] = {}
        size = self.block_size
        for sequence in sequences:
            full, rest = divmod(sequence.num_computed, size)
            fills.update(dict.fromkeys(sequence.block_ids[:full], size))
            if rest:
                fills[sequence.block_ids[full]] = rest
        return fills

    def needed_to_begin(self, sequences: list[Sequence], found: list[int], shares: list[int] | None) -> int:
        """Free blocks that the first sequence's known tokens take, of which `found` are there, and those of the others
        where they are not to be branches of it: beside `shares` blocks that each of them will share with a sibling."""
        needed = self.blocks_for(sequences[0].num_tokens) - len(found)
        needed += sum(self.pool.ref_count(block) == 0 for block in found)
        if shares is not None:
            needed += sum(self.blocks_for(s.num_tokens) - n for s, n in zip(sequences[1:], shares, strict=True))
        return needed

    def needed_to_swap_in(self, sequences: list[Sequence]) -> int:
        """Blocks for what is in the swap space, for the known tokens beyond that, and for copies of last blocks that
        several are about to write to."""
        back = [sequence for sequence in sequences if sequence.swap_ids]
        slots = {slot for sequence in back for slot in sequence.swap_ids}
        more = sum(self.blocks_for(s.num_tokens) - len(s.swap_ids) for s in back)
        places = [(s, s.num_computed // self.block_size) for s in back]
        tails = Counter(s.swap_ids[index] for s, index in places if index < len(s.swap_ids))
        return len(slots) + more + sum(count - 1 for count in tails.values())

    def swap_out(self, sequences: list[Sequence]) -> list[tuple[int, int]]:
        """Their computed tokens move to the swap space, each block once; returns (block, slot). There is room for
        `distinct` blocks."""
        places = {block: self.swap.allocate() for block in self._fills(sequences)}
        is_taken: set[int] = set()
        for sequence in sequences:
            slots = [places[block] for block in sequence.block_ids[: self.blocks_for(sequence.num_computed)]]
            for slot in slots:
                if slot in is_taken:
                    self.swap.share(slot)
                is_taken.add(slot)
            self.free(sequence)
            sequence.swap_ids = slots
        return list(places.items())

    def swap_in(self, sequences: list[Sequence]) -> list[tuple[int, int]]:
        """And back, each slot once; returns (slot, block). There is room for them."""
        places: dict[int, int] = {}
        for sequence in sequences:
            num_computed = sequence.num_computed
            self.num_computed += num_computed
            for index, slot in enumerate(sequence.swap_ids):
                if slot in places:
                    self.pool.share(places[slot])
                    self.num_saved += min(self.block_size, num_computed - index * self.block_size)
                else:
                    places[slot] = self.pool.allocate()
                self._enter(sequence, places[slot])
                self.swap.release(slot)
            sequence.swap_ids = []
        return list(places.items())

    def _enter(self, sequence: Sequence, block: int) -> None:
        sequence.block_ids.append(block)
        sequence.capacity += self.block_size
        self.num_entries += 1

    # -- looking in

    def audit(self, sequences: list[Sequence], kept: list[int]) -> None:
        """Raises AuditError unless pool, swap space and tables agree; `kept` are blocks allocated ahead."""
        self.pool.audit([*(sequence.block_ids for sequence in sequences), kept])
        self.swap.audit(sequence.swap_ids for sequence in sequences)
        entries = sum(len(sequence.block_ids) for sequence in sequences)
        with_blocks = [sequence for sequence in sequences if sequence.block_ids]
        num_computed = sum(sequence.num_computed for sequence in with_blocks)
        fills: Counter[int] = Counter()
        for sequence in with_blocks:
            for index, block in enumerate(sequence.block_ids):
                fill = min(self.block_size, max(0, sequence.num_computed - index * self.block_size))
                fills[block] = max(fills[block], fill)
        counted = (self.num_entries, self.num_computed, self.num_computed - self.num_saved)
        if counted != (entries, num_computed, sum(fills.values())):
            raise AuditError(
                f"tables count {counted} entries, computed tokens and filled slots, but there are"
                f" {(entries, num_computed, sum(fills.values()))}"
            )
