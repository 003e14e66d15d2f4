"""A linear layer's product of which every row is bit for bit the same whatever else is in the batch: the number of
rows, their values, and the row's place among them; on a CPU also on any number of threads.

Libraries choose their way of summing by the shape, and share sums out among threads. With this product a sequence gets
the same tokens in whatever company.
"""

from __future__ import annotations

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
