"""Which form of an operation runs: Triton on a GPU; compiled by numba on a CPU, or else torch."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

logger = logging.getLogger(__name__)


def on_gpu(x: torch.Tensor) -> bool:
    """CUDA or ROCm: torch calls both "cuda"."""
    return x.is_cuda


def compiled(*tensors: torch.Tensor) -> ModuleType | None:
    """`kernels/cpu/fused.py`, if its loops take these tensors: on a CPU, of one type that a model computes in, and
    their rows in one piece."""
    dtype = tensors[0].dtype
    if all(x.dtype == dtype and x.stride(-1) == 1 and x.device.type == "cpu" for x in tensors):
        fused = _fused()
        if fused is not None and dtype in fused.ELEMENTS:
            return fused
    return None


def blocked_linear() -> ModuleType | None:
    """`kernels/cpu/blocked_linear.py`, where loops can be compiled."""
    if _fused() is None:
        return None
    from quire.kernels.cpu import blocked_linear

    return blocked_linear


def programs() -> ModuleType | None:
    """`kernels/cpu/program.py`, where loops can be compiled."""
    if _fused() is None:
        return None
    from quire.kernels.cpu import program

    return program


@functools.cache
def _fused() -> ModuleType | None:
    try:
        from quire.kernels.cpu import fused, threads

        threads.check()
    except (ImportError, OSError, AttributeError) as error:
        logger.warning("norms, activations and products run uncompiled: %s", error)
        return None
    return fused
