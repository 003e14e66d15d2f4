"""The MLP's activations; a gated one multiplies what it activates with the second half of its input.

torch has two forms of each exponential on a CPU, one for whole vectors and one for what is left over, and they do not
always round alike; what is left over depends on the size of the tensor and on how threads share it. Where a row may not
depend on that, `deterministic` has everything computed in whole vectors, on one thread: half to a quarter of the speed.
On a GPU there is nothing to avoid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from quire.kernels import dispatch

PIECE = 1 << 13
"""Elements computed at once with `deterministic`: at most so many, of any type, torch leaves to one thread."""

VECTOR = 64
"""A multiple of the elements that torch's loops take at a time, for every type and instruction set."""


def silu_and_mul(x: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
    """[T, 2 * I] gate and up, rows may lie apart -> [T, I]; the activated gate is rounded before the product."""
    if dispatch.on_gpu(x):
        from quire.kernels.gpu import activation as gpu

        return gpu.silu_and_mul(x)
    fused = dispatch.compiled(x)
    if fused is not None:
        activated: torch.Tensor = fused.silu_and_mul(x)
        return activated
    gate, up = x.chunk(2, -1)
    return (in_whole_vectors(F.silu, gate) if deterministic else F.silu(gate)) * up


def gelu(x: torch.Tensor, tanh: bool = False, deterministic: bool = False) -> torch.Tensor:
    """[T, I], by the error function, or by its approximation with a hyperbolic tangent."""
    if dispatch.on_gpu(x):
        from quire.kernels.gpu import activation as gpu

        return gpu.gelu(x, tanh)

    def activate(values: torch.Tensor) -> torch.Tensor:
        return F.gelu(values, approximate="tanh" if tanh else "none")

    return in_whole_vectors(activate, x) if deterministic else activate(x)


def relu(x: torch.Tensor) -> torch.Tensor:
    """[T, I]; nothing is rounded."""
    if dispatch.on_gpu(x):
        from quire.kernels.gpu import activation as gpu

        return gpu.relu(x)
    return F.relu(x)


def in_whole_vectors(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """An elementwise function on a CPU, such that an element's result depends on the element alone."""
    values = x.reshape(-1)
    padded = F.pad(values, (0, -len(values) % VECTOR))
    return torch.cat([function(piece) for piece in padded.split(PIECE)])[: len(values)].view(x.shape)
