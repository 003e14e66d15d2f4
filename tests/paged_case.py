"""A call of paged attention over a poisoned pool."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from quire.kernels import reference
from quire.kernels.attention import PagedRows, paged_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
NOWHERE = 10**8
"""A block id that nothing may follow."""


class Case:
    """Arguments of paged attention for rows (tokens in the KV, of which new). Slots that nothing may read are NaN, and
    table entries that nothing may follow are out of range. The first `shared` rows begin with the same `prefix` tokens,
    in the same blocks."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        heads: tuple[int, int] = (4, 2),
        size: int = 24,
        block_size: int = 16,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        alibi: bool = False,
        float8: bool = False,
        deterministic: bool = False,
        shared: int = 0,
        prefix: int = 0,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        seq_lens, new = zip(*rows, strict=True)
        self.scale, self.window = size**-0.5, window
        self.q = torch.randn(sum(new), heads[0], size, generator=generator).to(dtype).to(device)
        counts = [-(-n // block_size) for n in seq_lens]
        order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        pool = torch.full((len(order), 3, 2, block_size, heads[1], size), torch.nan)
        tables = torch.full((len(rows), max(counts) + 2), NOWHERE, dtype=torch.int32)
        for row, (seq_len, num_new) in enumerate(rows):
            first = 0 if window is None else max(0, seq_len - num_new - window + 1)
            if 0 < row < shared:
                tables[row, : prefix // block_size] = tables[0, : prefix // block_size]
                first = max(first, prefix)
            for position in range(first, seq_len):
                index = position // block_size
                if tables[row, index] == NOWHERE:
                    tables[row, index] = order.pop()
                slot = pool[tables[row, index], 1, :, position % block_size]
                slot.copy_(torch.randn(2, heads[1], size, generator=generator))
        self.poisoned = order.pop()
        """A block of NaN."""
        self.slopes = 2.0 ** -torch.arange(1, heads[0] + 1, device=device) if alibi else None
        self.kv_scales = None
        if float8:
            self.kv_scales = torch.rand(2, heads[1], generator=generator).add(0.5).to(device)
        self.kv_layer = pool.to(torch.float8_e4m3fn if float8 else dtype).to(device)[:, 1]
        starts = np.cumsum([0, *new]).astype(np.int32)
        self.rows = PagedRows(tables.to(device), starts, np.array(seq_lens, np.int32), deterministic)

    def run(self, function: Callable[..., torch.Tensor] = paged_attention) -> torch.Tensor:
        return function(self.q, self.kv_layer, self.rows, self.scale, self.window, self.slopes, self.kv_scales)

    def check(self, function: Callable[..., torch.Tensor] = paged_attention, tolerance: float | None = None) -> None:
        got, want = self.run(function), self.run(reference.paged_attention)
        assert got.dtype == self.q.dtype
        torch.testing.assert_close(got.cpu(), want, atol=tolerance or TOLERANCE[self.q.dtype], rtol=0)
