"""Which form of an operation runs: Triton on a GPU, torch (or numba) elsewhere."""

from __future__ import annotations

import torch


def on_gpu(x: torch.Tensor) -> bool:
    """CUDA or ROCm: torch calls both "cuda"."""
    return x.is_cuda
