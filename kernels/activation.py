"""The MLP's activations; a gated one multiplies what it activates with the second half of its input."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """[T, 2 * I] gate and up -> [T, I]."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def gelu(x: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    return F.gelu(x, approximate="tanh" if tanh else "none")


def relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x)
