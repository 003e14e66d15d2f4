"""The feed-forward part of a layer: gated (gate and up fused in one projection) or plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from quire.kernels.activation import gelu, relu, silu_and_mul
from quire.worker.layers.linear import Linear, RowParallelLinear
from quire.worker.models.spec import ModelSpec
from quire.worker.parallel import TensorParallel

ACTIVATIONS: dict[tuple[str, bool], Callable[..., torch.Tensor]] = {
    ("silu", True): silu_and_mul,
    ("gelu", False): gelu,
    ("gelu_tanh", False): partial(gelu, tanh=True),
    ("relu", False): relu,
}
"""By name and whether gated; ModelSpec lets no other pair through."""


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec, tp: TensorParallel, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        start, stop = tp.split(spec.intermediate_size)
        width = stop - start
        self.activation = ACTIVATIONS[spec.activation, spec.gated]
        self.up = Linear(spec.hidden_size, 2 * width if spec.gated else width, spec.mlp_bias, dtype, device)
        self.down = RowParallelLinear(width, spec.hidden_size, spec.mlp_bias, tp, dtype, device)

    def pack(self, deterministic: bool = False) -> None:
        """After filling: settles the form of the activation; relu rounds nothing and has but one. The linear layers
        are packed by themselves."""
        if deterministic and self.activation is not relu:
            self.activation = partial(self.activation, deterministic=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]"""
        out: torch.Tensor = self.down(self.activation(self.up(x)))
        return out
