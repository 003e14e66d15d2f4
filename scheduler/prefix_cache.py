"""Full blocks are found again by what they hold, whoever computed them.

What a block holds depends on all tokens before it, so its name is chained: a keyed hash of the name of the block before
it and of its own tokens. The first name stands for the tenant's salt: requests with different salts never share a
block, and nobody can learn from timing what another tenant has asked. The key is drawn for each process, so names
cannot be made to collide by whoever chooses the tokens.

A hit only raises the number of tokens that count as computed. Blocks are given names when the plan that fills them is
made: plans run in order, and within a step keys and values are written before any are read.
"""

from __future__ import annotations

import hashlib
import secrets
from struct import Struct

from quire.scheduler.blocks import BlockPool
from quire.scheduler.sequence import Sequence

NAME_BYTES = 16


class PrefixCache:
    """Names of blocks of one pool."""

    def __init__(self, pool: BlockPool, block_size: int, enabled: bool) -> None:
        self.enabled = enabled
        """Whether what sequences compute is remembered; reserved prefixes always are."""
        self._pool = pool
        self._block_size = block_size
        self._keyed = hashlib.blake2b(key=secrets.token_bytes(32), digest_size=NAME_BYTES)
        self._pack = Struct(f"{block_size}i").pack

    def find(self, sequence: Sequence, most: int) -> list[int]:
        """The blocks that hold the sequence's first tokens, at most so many."""
        found: list[int] = []
        for index in range(most):
            block = self._pool.find(self.name(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def remember(self, sequence: Sequence) -> None:
        """Give names to the blocks that the sequence has filled since the last time, as far as their tokens are
        known."""
        if not (self.enabled or sequence.group.is_reserved):
            return
        known = sequence.num_prompt_tokens if sequence.group.search else len(sequence.token_ids)
        num_full = min(sequence.num_computed, known) // self._block_size
        if num_full <= sequence.num_named:
            return
        self.name(sequence, num_full - 1)
        for index in range(sequence.num_named, num_full):
            self._pool.remember(sequence.block_ids[index], sequence.block_names[index])
        sequence.num_named = num_full

    def name(self, sequence: Sequence, index: int) -> bytes:
        """Of the block at `index` of the sequence's table, whose tokens are known; kept with the sequence."""
        names, size = sequence.block_names, self._block_size
        for i in range(len(names), index + 1):
            before = names[-1] if names else self._hash(sequence.request.cache_salt.encode())
            names.append(self._hash(before + self._pack(*sequence.token_ids[i * size : (i + 1) * size])))
        return names[index]

    def _hash(self, data: bytes) -> bytes:
        keyed = self._keyed.copy()  # its key is worked in already
        keyed.update(data)
        return keyed.digest()
