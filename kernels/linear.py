"""Products of linear layers that are not left to torch.

`linear_invariant`: every row is bit for bit the same whatever else is in the batch: the number of rows, their values,
and the row's place among them; on a CPU also on any number of threads. Libraries choose their way of summing by the
shape, and share sums out among threads. With this product a sequence gets the same tokens in whatever company.

`packed_product`: bfloat16 on a CPU, from a copy of the weight that a loop of ours reads. It is invariant too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.kernels import dispatch


def linear_invariant(
    x: torch.Tensor,  # [T, K]; rows may lie apart
    weight: torch.Tensor,  # [N, K], contiguous; on a CPU also in oneDNN's layout
    bias: torch.Tensor | None = None,  # [N]
) -> torch.Tensor:  # [T, N]
    if dispatch.on_gpu(x):
        from quire.kernels.gpu import linear as form
    else:
        from quire.kernels.cpu import linear as form  # type: ignore[no-redef]
    return form.linear_invariant(x, weight, bias)


def packed_product(
    weight: torch.Tensor,  # [N, K]
) -> tuple[Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor], torch.Tensor] | None:
    """A product, from x [T, K], the copy and a bias [N] to [T, N], and the copy of the weight that it reads; None where
    torch's libraries have the better one, or the only one."""
    module = dispatch.blocked_linear()
    blocked = module.blocked(weight) if module is not None else None
    return None if blocked is None else (blocked.multiply, blocked.packed)
