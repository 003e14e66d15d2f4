"""The norm between a model's parts: RMSNorm or layer norm, alone or on a residual sum."""

from __future__ import annotations

import torch
from torch import nn

from quire.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from quire.worker.layers.linear import empty_parameter
from quire.worker.models.spec import ModelSpec


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(size, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised sum, and the sum; there is nothing to add before the first layer."""
        if residual is None:
            return self(x), x
        return add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float, affine: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(size, dtype=dtype, device=device) if affine else None
        self.bias = empty_parameter(size, dtype=dtype, device=device) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As for RMSNorm."""
        if residual is None:
            return self(x), x
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


def make_norm(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> RMSNorm | LayerNorm:
    """The model's norm over hidden states."""
    if spec.norm == "rms":
        return RMSNorm(spec.hidden_size, spec.norm_eps, dtype, device)
    return LayerNorm(spec.hidden_size, spec.norm_eps, spec.norm_affine, dtype, device)
