"""Rows of a table by token."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from quire.kernels import dispatch


def embedding(
    token_ids: torch.Tensor,  # [T] int64
    weight: torch.Tensor,  # [V, H], contiguous
) -> torch.Tensor:  # [T, H]
    # A loop of ours is not faster, but can be recorded with the others; of float32's products none can.
    fused = dispatch.compiled(weight) if weight.dtype == torch.bfloat16 else None
    if fused is not None:
        rows: torch.Tensor = fused.embed(token_ids, weight)
        return rows
    return F.embedding(token_ids, weight)
