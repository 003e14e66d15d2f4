"""Paged attention over a ragged batch: each row's new tokens attend to what its block table reaches, themselves
included, causally.

Rows with one new token (decode) are computed together, rows with more (prefill, whole or in chunks) one by one.
Invariant: nothing is read but the slots of positions that some query of the row may see; block table entries before
the window and past the sequence's end are never followed, and a slot's stale content, NaN even, never shows.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional as F

logger = logging.getLogger(__name__)

QUERY_TILE = 512
"""Queries of one prefill row computed together: bounds the mask, and spares keys after the tile's last query."""

GATHERED_BYTES = 1 << 28
"""Keys and values, padding included, that `decode_gathered` copies at once; more only for a single row."""


def paged_attention(
    q: torch.Tensor,  # [T, Hq, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D], a strided view of the pool
    block_tables: torch.Tensor,  # [B, M] int32
    query_starts: np.ndarray,  # [B + 1] int32
    seq_lens: np.ndarray,  # [B] int32: the new tokens included
    scale: float,
    window: int | None = None,  # a query at p sees keys k with p - k < window
) -> torch.Tensor:  # [T, Hq, D]
    lengths = np.diff(query_starts)
    decode = np.flatnonzero(lengths == 1)
    if len(decode) == len(q):
        return _decode(q, kv_layer, block_tables, seq_lens, scale, window)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if len(decode):
        rows = torch.from_numpy(decode).to(q.device)
        single = torch.from_numpy(query_starts[decode].astype(np.int64)).to(q.device)
        out[single] = _decode(q[single], kv_layer, block_tables[rows], seq_lens[decode], scale, window)
    for row in np.flatnonzero(lengths > 1):
        tokens = slice(int(query_starts[row]), int(query_starts[row + 1]))
        out[tokens] = _prefill(q[tokens], kv_layer, block_tables[row], int(seq_lens[row]), scale, window)
    return out


def _prefill(
    q: torch.Tensor,  # [n, Hq, D]
    kv_layer: torch.Tensor,
    block_table: torch.Tensor,  # [M]
    seq_len: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:  # [n, Hq, D]
    """One row, in tiles of queries, each against the keys from its first query's window to its last query."""
    block_size = kv_layer.shape[2]
    prefix = seq_len - len(q)
    first = 0 if window is None else max(0, prefix - window + 1) // block_size
    blocks = block_table[first : -(-seq_len // block_size)]
    k = kv_layer[:, 0][blocks].flatten(0, 1)  # [tokens from block `first` on, Hkv, D]
    v = kv_layer[:, 1][blocks].flatten(0, 1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start in range(0, len(q), QUERY_TILE):
        stop = min(start + QUERY_TILE, len(q))
        low = 0 if window is None else max(0, prefix + start - window + 1)
        keys = slice(low - first * block_size, prefix + stop - first * block_size)
        out[start:stop] = _attend(q[start:stop], k[keys], v[keys], scale, window)
    return out


def _attend(
    q: torch.Tensor,  # [n, Hq, D]
    k: torch.Tensor,  # [m, Hkv, D]: the last key is at the last query's position
    v: torch.Tensor,  # [m, Hkv, D]
    scale: float,
    window: int | None,
) -> torch.Tensor:  # [n, Hq, D]
    n, m = len(q), len(k)
    mask = None
    causal = n == m and (window is None or n <= window)
    if not causal:
        distance = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _decode(
    q: torch.Tensor,  # [B, Hq, D]
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,  # [B, M]
    seq_lens: np.ndarray,  # [B]
    scale: float,
    window: int | None,
) -> torch.Tensor:  # [B, Hq, D]
    compiled = _compiled_decode() if q.device.type == "cpu" else None
    if compiled is None or q.dtype != kv_layer.dtype:
        return decode_gathered(q, kv_layer, block_tables, seq_lens, scale, window)
    return compiled(q, kv_layer, block_tables, seq_lens, scale, window)


@functools.cache
def _compiled_decode() -> Callable[..., torch.Tensor] | None:
    """The compiled form for the CPU, imported at first use; None where this machine cannot build it."""
    try:
        from quire.kernels import attention_cpu

        attention_cpu.check()
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        logger.warning("paged attention runs uncompiled, several times slower: %s", error)
        return None
    return attention_cpu.decode


def decode_gathered(
    q: torch.Tensor,  # [B, Hq, D]
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,  # [B, M]
    seq_lens: np.ndarray,  # [B]
    scale: float,
    window: int | None,
) -> torch.Tensor:  # [B, Hq, D]
    """The form for any device: rows of similar length together, as many as GATHERED_BYTES allow."""
    slot_bytes = 2 * kv_layer.shape[3:].numel() * kv_layer.element_size()
    groups = list(_groups(seq_lens, kv_layer.shape[2], GATHERED_BYTES // slot_bytes))
    if len(groups) == 1:
        return _decode_padded(q, kv_layer, block_tables, seq_lens, scale, window)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in groups:
        rows = torch.from_numpy(group).to(q.device)
        out[rows] = _decode_padded(q[rows], kv_layer, block_tables[rows], seq_lens[group], scale, window)
    return out


def _groups(seq_lens: np.ndarray, block_size: int, num_slots: int) -> Iterator[np.ndarray]:
    """Rows, the longest first, such that a group's rows times its longest, in whole blocks, are at most `num_slots`,
    or one row."""
    order = np.argsort(-seq_lens.astype(np.int64), kind="stable")
    start = 0
    while start < len(order):
        longest = -(-int(seq_lens[order[start]]) // block_size) * block_size
        stop = start + max(1, num_slots // longest)
        yield order[start:stop]
        start = stop


def _decode_padded(
    q: torch.Tensor,  # [B, Hq, D]
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,  # [B, M]
    seq_lens: np.ndarray,  # [B]
    scale: float,
    window: int | None,
) -> torch.Tensor:  # [B, Hq, D]
    """All rows together, padded to the longest."""
    block_size = kv_layer.shape[2]
    position = torch.arange(-(-int(seq_lens.max()) // block_size) * block_size, device=q.device)
    length = torch.from_numpy(seq_lens.astype(np.int64)).to(q.device)[:, None]
    visible = position < length  # [B, m]
    if window is not None:
        visible &= position >= length - window
    # Entries that are not followed may hold anything: read block 0 in their place.
    followed = visible.view(len(q), -1, block_size).any(-1)
    blocks = block_tables[:, : followed.shape[1]].masked_fill(~followed, 0)
    # [2, B, m, Hkv, D]; what is not visible may be NaN, which a mask alone does not silence.
    kv = kv_layer[blocks].permute(2, 0, 1, 3, 4, 5).flatten(2, 3)
    k, v = kv.masked_fill(~visible[None, :, :, None, None], 0)
    out = F.scaled_dot_product_attention(
        q[:, :, None],
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible[:, None, None],
        scale=scale,
        enable_gqa=q.shape[1] != kv_layer.shape[3],
    )
    return out[:, :, 0]
