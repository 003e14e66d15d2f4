"""Rows of a table by token."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from quire.kernels import dispatch


def embedding(
    token_ids: torch.Tensor,  # [T] int64
    weight: torch.Tensor,  # [V, H], contiguous
) -> torch.Tensor:  # [T, H]
    fused = dispatch.compiled(weight)
    if fused is not None:
        rows: torch.Tensor = fused.embed(token_ids, weight)
        return rows
    return F.embedding(token_ids, weight)
