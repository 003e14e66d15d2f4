"""Paged attention over a ragged batch: each row's new tokens attend to what its block table reaches, themselves
included, causally.

Invariant: nothing is read but the slots of positions that some query of the row may see; block table entries before
the window and past the sequence's end are never followed, and a slot's stale content, NaN even, never shows.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quire.kernels import dispatch


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Rows of one new token whose block tables begin alike, by group. They may attend to what they share together, so
    that it is read once; whether they do is for the device's form to decide."""

    rows: np.ndarray
    """[n] int32: the members, group after group; a row is in one group at most."""
    starts: np.ndarray
    """[G + 1] int32: group g's members are rows[starts[g]:starts[g + 1]]."""
    lengths: np.ndarray
    """[G] int32: tokens shared, in whole blocks and fewer than any member's sequence has."""


@dataclass(slots=True)
class PagedRows:
    """The rows of one step, as attention sees them. What a device derives from them is made at its first use and kept
    here for the layers that follow."""

    block_tables: torch.Tensor
    """[B, M] int32: block ids in order; entries past a sequence's last block are arbitrary and never read."""
    query_starts: np.ndarray
    """[B + 1] int32, on the host: row i's tokens are query_starts[i]:query_starts[i + 1]."""
    seq_lens: np.ndarray
    """[B] int32, on the host: tokens in each sequence's KV after this step, the new ones included."""
    deterministic: bool = False
    """A token's result depends neither on the other rows nor on how its sequence is cut into steps, to the last bit."""
    shared: SharedPrefixes | None = None
    on_device: tuple[torch.Tensor, torch.Tensor] | None = None
    """query_starts and seq_lens, int32, where the tables are; None: uploaded when a GPU needs them."""
    static: bool = False
    """The lengths on the device may change between replays of a recorded graph; the rows stay rows of one token each,
    and the lengths on the host bound them."""
    derived: dict[Hashable, Any] = field(default_factory=dict)


def paged_attention(
    q: torch.Tensor,  # [T, Hq, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D], a strided view of the pool; dtype of q, or float8_e4m3fn
    rows: PagedRows,
    scale: float,
    window: int | None = None,  # a query at p sees keys k with p - k < window
    slopes: torch.Tensor | None = None,  # [Hq] float32, ALiBi: slope * (k - p) is added to a score
    kv_scales: torch.Tensor | None = None,  # [2, Hkv] float32: what is stored, times this, is K and V; None: 1
) -> torch.Tensor:  # [T, Hq, D]
    if dispatch.on_gpu(q):
        from quire.kernels.gpu import attention as form
    else:
        from quire.kernels.cpu import attention as form  # type: ignore[no-redef]
    return form.paged_attention(q, kv_layer, rows, scale, window, slopes, kv_scales)
