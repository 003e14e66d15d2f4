"""Memory that shows what was written where: results of kernels begin as NaN, and lie in the middle of NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

MARGIN = 1 << 15
"""Elements on either side; alignment stays what it would be."""


@contextmanager
def guarded_results() -> Iterator[None]:
    """Inside, `torch.empty` of a named type and device gives such memory; its surroundings must stay intact."""
    plain, made = torch.empty, []

    def empty(*shape: Any, **kwargs: Any) -> torch.Tensor:
        if set(kwargs) != {"dtype", "device"}:
            return plain(*shape, **kwargs)
        size = tuple(shape) if shape and isinstance(shape[0], int) else tuple(shape[0])
        whole = torch.full((math.prod(size) + 2 * MARGIN,), torch.nan, **kwargs)
        made.append(whole)
        return whole[MARGIN : whole.numel() - MARGIN].view(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    for whole in made:
        assert whole[:MARGIN].isnan().all() and whole[-MARGIN:].isnan().all(), "written outside the result"


def apart(x: torch.Tensor, gap: int = 11) -> torch.Tensor:
    """The same values in rows that lie apart, with NaN around them; the last dimension stays contiguous."""
    shape = [n + gap for n in x.shape]
    wide = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    inner = wide[tuple(slice(gap // 2, gap // 2 + n) for n in x.shape)]
    inner.copy_(x)
    return inner
