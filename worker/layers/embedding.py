"""Tables indexed by token or position, and the head that turns hidden states into logits.

Token tables are cut by vocabulary: a rank looks up its own tokens and the all-reduce supplies the rest; the head
computes its own logits and the all-gather supplies the rest.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from quire.kernels.embedding import embedding
from quire.worker.layers.linear import Product, choose_product, empty_parameter
from quire.worker.models.checkpoint import share
from quire.worker.parallel import TensorParallel


class TokenEmbedding(nn.Module):
    """Vocabulary-parallel."""

    def __init__(
        self, vocab_size: int, size: int, tp: TensorParallel, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.tp = tp
        self.start, self.stop = tp.split(vocab_size)
        self.weight = empty_parameter(self.stop - self.start, size, dtype=dtype, device=device)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, size]"""
        if self.tp.size == 1:
            return embedding(token_ids, self.weight)
        foreign = (token_ids < self.start) | (token_ids >= self.stop)
        rows = F.embedding((token_ids - self.start).masked_fill(foreign, 0), self.weight)
        return self.tp.all_reduce(rows.masked_fill(foreign[:, None], 0))


class PositionEmbedding(nn.Module):
    """Learned positions; `offset` rows come before position 0."""

    def __init__(self, num_positions: int, size: int, offset: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.offset = offset
        self.weight = empty_parameter(num_positions + offset, size, dtype=dtype, device=device)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, size]"""
        return F.embedding(positions + self.offset, self.weight)


class Head(nn.Module):
    """Vocabulary-parallel logits, gathered whole on every rank. A tied head is given the embedding's own weight."""

    def __init__(
        self,
        vocab_size: int,
        size: int,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        tied: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.shares = [stop - start for start, stop in (share(vocab_size, rank, tp.size) for rank in range(tp.size))]
        own = self.shares[tp.rank]
        self.weight: nn.Parameter | None
        self.weight = empty_parameter(own, size, dtype=dtype, device=device) if tied is None else tied
        self.tied = tied is not None
        self.product: Product = F.linear
        self.packed: torch.Tensor | None = None

    def pack(self, deterministic: bool = False) -> None:
        """As for a linear layer; a tied weight stays beside its packed copy, for the embedding."""
        assert self.weight is not None
        self.product, self.packed = choose_product(self.weight, deterministic)
        if self.packed is not None and not self.tied:
            self.weight = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, size] -> [S, vocab_size] float32"""
        weight = self.weight if self.packed is None else self.packed
        assert weight is not None
        logits = self.product(hidden, weight, None)
        widest = max(self.shares)
        logits = self.tp.all_gather(F.pad(logits, (0, widest - logits.shape[-1])), -1)
        if min(self.shares) < widest:
            parts = logits.split(widest, -1)
            logits = torch.cat([part[:, :n] for part, n in zip(parts, self.shares, strict=True)], -1)
        return logits.float()
