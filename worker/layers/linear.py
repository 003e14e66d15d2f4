"""Linear layers. A column-parallel one holds a part of the outputs, a row-parallel one a part of the inputs and ends
in an all-reduce; the bias of the latter is added once, after the sum.

Parameters are created empty, in their final place: whoever builds a layer fills it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from quire.worker.parallel import TensorParallel


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """Replicated, or column-parallel when built with this rank's number of outputs."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(outputs, inputs, dtype=dtype, device=device)
        self.bias = empty_parameter(outputs, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """Built with this rank's number of inputs; the result is whole on every rank."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, tp: TensorParallel, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.tp = tp
        self.weight = empty_parameter(outputs, inputs, dtype=dtype, device=device)
        self.bias = empty_parameter(outputs, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        out = self.tp.all_reduce(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias
