"""Feeds a decoder with sequences, step by step, over a poisoned pool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quire.kernels.attention import PagedRows
from quire.worker.batch import Batch
from quire.worker.models.decoder import Decoder


class Stepper:
    """Runs sequences through a decoder step by step; the pool is NaN wherever nothing was written."""

    def __init__(self, model: Decoder, block_size: int = 16, max_tokens: int = 512, seed: int = 0) -> None:
        spec = model.spec
        self.model, self.block_size = model, block_size
        blocks = max_tokens // block_size + 16
        parameter = next(model.parameters())
        self.pool = torch.full(
            (blocks, spec.num_layers, 2, block_size, model.num_local_kv_heads, spec.head_dim),
            float("nan"), dtype=parameter.dtype, device=parameter.device,
        )  # fmt: skip
        self.free = np.random.default_rng(seed).permutation(blocks).tolist()
        self.tokens: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}

    def step(self, new: dict[int, Sequence[int]], sample: str = "last") -> torch.Tensor:
        """Appends tokens to sequences and returns logits [S, vocab]: of each one's last token, of "all" or "none"."""
        starts, lengths, positions, slots, ids = [0], [], [], [], []
        for row, tokens in new.items():
            known, table = self.tokens.setdefault(row, []), self.tables.setdefault(row, [])
            for token in tokens:
                if len(known) % self.block_size == 0:
                    table.append(self.free.pop())
                positions.append(len(known))
                slots.append(table[-1] * self.block_size + len(known) % self.block_size)
                known.append(token)
                ids.append(token)
            starts.append(len(ids))
            lengths.append(len(known))
        width = max(len(self.tables[row]) for row in new) + 2
        # Entries past the end are arbitrary: out of range, here.
        tables = [(self.tables[row] + [10**6] * width)[:width] for row in new]
        index = {"all": range(len(ids)), "last": [start - 1 for start in starts[1:]], "none": []}[sample]
        batch = Batch(
            token_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            rows=PagedRows(
                torch.tensor(tables, dtype=torch.int32), np.array(starts, np.int32), np.array(lengths, np.int32)
            ),
            sample_index=torch.tensor(index, dtype=torch.int64),
        )
        return self.model.logits(self.model(batch, self.pool))
