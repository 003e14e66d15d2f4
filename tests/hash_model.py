"""A decoder whose next token depends on every KV slot that it reaches through the block table.

Computing token t at position p stores the pair in its slot; the logits point at a hash of the pairs read back at
positions 0 to p. One lost, stale or misplaced block changes the next token, at the cost of a few array operations.
The pool must be float32, which holds positions and tokens below 2^24 exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quire.worker.batch import Batch
from quire.worker.config import WorkerConfig
from quire.worker.parallel import TensorParallel

VOCAB_SIZE = 512
PEAK = 30.0
"""Logit of the next token, all others being 0: temperatures around 1 do not change it, great ones do."""

_LOW = (1 << 31) - 1


def expected_tokens(prompt: list[int], n: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """The n greedy tokens that follow, from the prompt alone."""
    tokens = list(prompt)
    total = sum(_mix(position, token) for position, token in enumerate(tokens))
    for _ in range(n):
        tokens.append(_next(total) % vocab_size)
        total += _mix(len(tokens) - 1, tokens[-1])
    return tokens[len(prompt) :]


def hidden_of(tokens: list[int]) -> torch.Tensor:
    """[1] int64: what the model computes of a sequence, from its tokens alone."""
    return torch.tensor([sum(_mix(position, token) for position, token in enumerate(tokens))])


# Both work on ints and on int64 arrays: factors stay below 2^31, so no product reaches 2^63.
def _mix(position: Any, token: Any) -> Any:
    """Position and token to 31 bits, by way of products whose high bits are folded back in."""
    x = ((position * 0x2C1B3C6D + token * 0x297A2D39 + 0x1B873593) & _LOW) * 0x5D588B65
    return (x ^ (x >> 29)) & _LOW


def _next(total: Any) -> Any:
    x = ((total ^ (total >> 31)) & _LOW) * 0x6A09E667
    return ((x ^ (x >> 27)) & _LOW) >> 3


@dataclass(frozen=True, slots=True)
class HashSpec:
    vocab_size: int = VOCAB_SIZE
    num_layers: int = 1
    head_dim: int = 1


class HashDecoder:
    num_local_kv_heads = 1
    weight_bytes = 0

    def __init__(self, vocab_size: int = VOCAB_SIZE) -> None:
        self.spec = HashSpec(vocab_size)

    def forward(self, batch: Batch, kv: torch.Tensor) -> torch.Tensor:
        """[S] int64: sums over what the sampling rows read."""
        assert kv.dtype is torch.float32 and kv.device.type == "cpu"
        # NumPy, because small parallel operations of torch wait for each other when the cores are busy.
        # [N, 1, 2, block, 1, 1] to the keys and the values of all slots, each [N, block].
        pool = kv.numpy()
        keys, values = pool[:, 0, 0, :, 0, 0], pool[:, 0, 1, :, 0, 0]
        block_size = keys.shape[1]
        is_real = batch.slots.numpy() >= 0  # else padding
        blocks, offsets = np.divmod(batch.slots.numpy()[is_real], block_size)
        keys[blocks, offsets] = batch.positions.numpy()[is_real] + 1  # so that an empty slot is no position
        values[blocks, offsets] = batch.token_ids.numpy()[is_real]

        lengths = batch.rows.seq_lens
        if batch.rows.static:
            assert batch.rows.on_device is not None
            lengths = batch.rows.on_device[1].numpy()
        rows = np.arange(len(lengths))
        if batch.sample_index is not None:
            rows = np.searchsorted(batch.rows.query_starts[1:] - 1, batch.sample_index.numpy())
        sums = torch.zeros(len(rows), dtype=torch.int64)
        wanted = lengths[rows] > 0
        rows = rows[wanted]
        lengths = lengths[rows].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        position = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        index, offsets = np.divmod(position, block_size)
        blocks = batch.rows.block_tables.numpy()[np.repeat(rows, lengths), index]
        stored, token = keys[blocks, offsets].astype(np.int64) - 1, values[blocks, offsets].astype(np.int64)
        # The position that was stored decides, and one that was not meant to be here counts as another token.
        pairs = _mix(stored, token + 7 * (stored != position))
        if len(starts):
            sums[torch.from_numpy(wanted)] = torch.from_numpy(np.add.reduceat(pairs, starts))
        return sums

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), self.spec.vocab_size)
        return logits.scatter_(1, (_next(hidden) % self.spec.vocab_size)[:, None], PEAK)


def load_hash_decoder(
    config: WorkerConfig, tp: TensorParallel, progress: Callable[[int, int], None] | None
) -> HashDecoder:
    """A `Loader` for the runner; every rank holds the whole model."""
    if progress is not None:
        progress(1, 1)
    return HashDecoder()
