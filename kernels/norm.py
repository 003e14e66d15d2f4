"""RMSNorm and layer norm, alone and after a residual sum; over the last dimension, in float32.

RMSNorm is rounded before it is multiplied with its weight, as Hugging Face's models do. A residual sum is rounded to
the element type, and what is normalised is the rounded sum.

A row's result does not depend on the rows beside it: on a GPU each row is summed in the same order, and so it is by
torch on a CPU, in rows of up to 32768 elements.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from quire.kernels import dispatch


def rms_norm(
    x: torch.Tensor,  # [T, H] or [T, heads, H], strided; the last dimension contiguous
    weight: torch.Tensor,  # [H]
    eps: float,
) -> torch.Tensor:  # like x, contiguous
    if dispatch.on_gpu(x):
        from quire.kernels.gpu import norm as gpu

        return gpu.rms_norm(x, weight, eps)
    fused = dispatch.compiled(x, weight)
    if fused is not None:
        normed: torch.Tensor = fused.rms_norm(x, weight, eps)
        return normed
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor,  # [T, H]
    residual: torch.Tensor,  # [T, H]
    weight: torch.Tensor,  # [H]
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised sum, and the sum, which is the next residual; new tensors."""
    if dispatch.on_gpu(x):
        from quire.kernels.gpu import norm as gpu

        return gpu.add_rms_norm(x, residual, weight, eps)
    fused = dispatch.compiled(x, residual, weight)
    if fused is not None:
        pair: tuple[torch.Tensor, torch.Tensor] = fused.add_rms_norm(x, residual, weight, eps)
        return pair
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(
    x: torch.Tensor,  # [T, H]
    weight: torch.Tensor | None,  # [H]
    bias: torch.Tensor | None,  # [H]
    eps: float,
) -> torch.Tensor:  # [T, H]
    if dispatch.on_gpu(x):
        from quire.kernels.gpu import norm as gpu

        return gpu.layer_norm(x, weight, bias, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,  # [T, H]
    residual: torch.Tensor,  # [T, H]
    weight: torch.Tensor | None,  # [H]
    bias: torch.Tensor | None,  # [H]
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised sum, and the sum, which is the next residual; new tensors."""
    if dispatch.on_gpu(x):
        from quire.kernels.gpu import norm as gpu

        return gpu.add_layer_norm(x, residual, weight, bias, eps)
    total = x + residual
    return layer_norm(total, weight, bias, eps), total
