"""Linear layers. A column-parallel one holds a part of the outputs, a row-parallel one a part of the inputs and ends
in an all-reduce; the bias of the latter is added once, after the sum.

Parameters are created empty, in their final place: whoever builds a layer fills it, and may then `pack` it, which
settles how it multiplies: bfloat16 on a CPU runs faster on weights that are laid out anew, by our own loop where the
processor suits it, elsewhere by oneDNN; a deterministic layer computes each row of its input as if it were alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from quire.kernels.linear import linear_invariant, packed_product
from quire.worker.parallel import TensorParallel

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x [T, inputs], a weight [outputs, inputs] in the layout of this product and a bias [outputs] -> [T, outputs]."""


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def pack_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """A copy in oneDNN's layout; None where there is nothing to gain."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return None
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.data, None)
    return packed


def linear_packed(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = _pointwise()(x, packed, bias, "none", [], "")
    return out


@functools.cache
def _pointwise() -> Callable[..., torch.Tensor]:
    """The one overload: finding it anew costs microseconds in each of fifty calls of a step."""
    found: Callable[..., torch.Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return found


def choose_product(weight: torch.Tensor, deterministic: bool) -> tuple[Product, torch.Tensor | None]:
    """How to multiply with a filled weight, and the copy that this product reads, which then takes its place."""
    found = packed_product(weight)
    if found is not None:
        return found
    packed = pack_weight(weight)
    if deterministic:
        return linear_invariant, packed
    return (F.linear if packed is None else linear_packed), packed


class Linear(nn.Module):
    """Replicated, or column-parallel when built with this rank's number of outputs."""

    weight: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(outputs, inputs, dtype=dtype, device=device)
        self.bias = empty_parameter(outputs, dtype=dtype, device=device) if bias else None
        self.product: Product = F.linear
        self.packed: torch.Tensor | None = None

    def pack(self, deterministic: bool = False) -> None:
        """After filling: the packed weight takes the place of the plain one, where that is faster."""
        assert self.weight is not None
        self.product, self.packed = choose_product(self.weight, deterministic)
        if self.packed is not None:
            self.weight = None

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight = self.weight if self.packed is None else self.packed
        assert weight is not None
        return self.product(x, weight, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, self.bias)


class RowParallelLinear(Linear):
    """Built with this rank's number of inputs; the result is whole on every rank."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, tp: TensorParallel, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(inputs, outputs, bias, dtype, device)
        self.tp = tp
        self.reduce = tp.all_reduce

    def pack(self, deterministic: bool = False) -> None:
        super().pack(deterministic)
        self.reduce = self.tp.sum_in_order if deterministic else self.tp.all_reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return super().forward(x)
        out = self.reduce(self.multiply(x, None))
        return out if self.bias is None else out + self.bias
