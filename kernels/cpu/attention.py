"""Paged attention on a CPU, and in plain torch wherever nothing better can be built.

Rows with one new token (decode) are computed together, and rows with more (prefill, whole or in chunks) likewise, by
compiled loops; where those cannot be had, the latter one by one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from quire.kernels.attention import PagedRows, SharedPrefixes

logger = logging.getLogger(__name__)

QUERY_TILE = 512
"""Queries of one prefill row computed together: bounds the mask, and spares keys after the tile's last query."""

GATHERED_BYTES = 1 << 28
"""Keys and values, padding included, that `decode_gathered` copies at once, and scratch of the deterministic form; more
only for a single row."""


class Options(NamedTuple):
    """What all rows of a call have in common."""

    scale: float
    window: int | None
    slopes: torch.Tensor | None
    kv_scales: torch.Tensor | None


def paged_attention(
    q: torch.Tensor,  # [T, Hq, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    rows: PagedRows,
    scale: float,
    window: int | None = None,
    slopes: torch.Tensor | None = None,  # [Hq]
    kv_scales: torch.Tensor | None = None,  # [2, Hkv]
) -> torch.Tensor:  # [T, Hq, D]
    options = Options(scale, window, slopes, kv_scales)
    tables, starts, seq_lens = rows.block_tables, rows.query_starts, rows.seq_lens
    if rows.static:
        return _decode_static(q, kv_layer, rows, options)
    if _only_single(rows):
        return _decode(q, kv_layer, tables, seq_lens, options, rows.deterministic, rows.derived, rows.shared)
    lengths = np.diff(starts)
    if rows.deterministic:
        # Each token as a row of its own: what it computes is then what it would compute as a single new token.
        owner = np.repeat(np.arange(len(lengths)), lengths)
        ends = np.arange(len(q)) - starts[owner] + (seq_lens - lengths)[owner] + 1
        index = torch.from_numpy(owner).to(q.device)
        # Each row leaves a partial result for every split of its context.
        scratch = 4 * q[0].numel() * (1 + int(seq_lens.max()) // 256)
        parts = [
            _decode(q[part], kv_layer, tables[index[part]], ends[part].astype(np.int32), options, deterministic=True)
            for part in _slices(len(q), max(1, GATHERED_BYTES // scratch))
        ]
        return torch.cat(parts)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    told = _tell_apart(rows)
    if (few := told.of_single) is not None:
        out[told.single] = _decode(
            q[told.single], kv_layer, few.block_tables, few.seq_lens, options, False, few.derived, few.shared
        )
    if (compiled := _compiled(q, options)) is not None:
        compiled.prefill(
            q.contiguous(), kv_layer, told.tables, told.starts, told.lengths, told.seq_lens,
            options.scale, options.window, options.kv_scales, out, rows.derived,
        )  # fmt: skip
        return out
    for row in told.many:
        tokens = slice(int(starts[row]), int(starts[row + 1]))
        out[tokens] = _prefill(q[tokens], kv_layer, tables[row], int(seq_lens[row]), options)
    return out


def _only_single(rows: PagedRows) -> bool:
    """Whether each row brings one token; found out once a step."""
    known: bool | None = rows.derived.get(_only_single)
    if known is None:
        known = rows.derived[_only_single] = bool((np.diff(rows.query_starts) == 1).all())
    return known


class _Kinds(NamedTuple):
    """A step's rows by what they bring, told apart once a step."""

    single: torch.Tensor | slice
    """The tokens of rows that bring one; in a server's steps they are the first."""
    of_single: PagedRows | None
    """These rows; None: there are none."""
    many: np.ndarray
    """The rows that bring more; and what belongs to each of them."""
    tables: torch.Tensor
    starts: np.ndarray
    lengths: np.ndarray
    seq_lens: np.ndarray


def _tell_apart(rows: PagedRows) -> _Kinds:
    known: _Kinds | None = rows.derived.get(_tell_apart)
    if known is not None:
        return known
    tables, starts, seq_lens = rows.block_tables, rows.query_starts, rows.seq_lens
    lengths = np.diff(starts)
    decode, many = np.flatnonzero(lengths == 1), np.flatnonzero(lengths > 1)

    def index(places: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(places.astype(np.int64)).to(tables.device)

    of_single = None
    if len(decode):
        shared = rows.shared
        if shared is not None:
            members = np.searchsorted(decode, shared.rows).astype(np.int32)
            shared = SharedPrefixes(members, shared.starts, shared.lengths)
        query_starts = np.arange(len(decode) + 1, dtype=np.int32)
        of_single = PagedRows(tables[index(decode)], query_starts, seq_lens[decode], shared=shared)
    are_first = len(decode) > 0 and int(decode[-1]) == len(decode) - 1
    single = slice(len(decode)) if are_first else index(starts[decode])
    told = _Kinds(single, of_single, many, tables[index(many)], starts[many], lengths[many], seq_lens[many])
    rows.derived[_tell_apart] = told
    return told


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, total, size))


def _plain(kv: torch.Tensor, options: Options, half: int, dtype: torch.dtype) -> torch.Tensor:
    """K (half 0) or V [..., Hkv, D] as numbers of the queries' type: what is stored, times its scale."""
    if kv.dtype == dtype:
        return kv
    if options.kv_scales is None:
        return kv.to(dtype)
    return (kv.float() * options.kv_scales[half, :, None]).to(dtype)


def _prefill(
    q: torch.Tensor,  # [n, Hq, D]
    kv_layer: torch.Tensor,
    block_table: torch.Tensor,  # [M]
    seq_len: int,
    options: Options,
) -> torch.Tensor:  # [n, Hq, D]
    """One row, in tiles of queries, each against the keys from its first query's window to its last query."""
    block_size, window = kv_layer.shape[2], options.window
    prefix = seq_len - len(q)
    first = 0 if window is None else max(0, prefix - window + 1) // block_size
    blocks = block_table[first : -(-seq_len // block_size)]
    # [tokens from block `first` on, Hkv, D]
    k, v = (_plain(kv_layer[:, half][blocks].flatten(0, 1), options, half, q.dtype) for half in (0, 1))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start in range(0, len(q), QUERY_TILE):
        stop = min(start + QUERY_TILE, len(q))
        low = 0 if window is None else max(0, prefix + start - window + 1)
        keys = slice(low - first * block_size, prefix + stop - first * block_size)
        out[start:stop] = _attend(q[start:stop], k[keys], v[keys], options)
    return out


def _attend(
    q: torch.Tensor,  # [n, Hq, D]
    k: torch.Tensor,  # [m, Hkv, D]: the last key is at the last query's position
    v: torch.Tensor,  # [m, Hkv, D]
    options: Options,
) -> torch.Tensor:  # [n, Hq, D]
    n, m = len(q), len(k)
    window = options.window
    mask: torch.Tensor | None = None
    causal = n == m and (window is None or n <= window) and options.slopes is None
    if not causal:
        distance = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        if options.slopes is not None:
            bias = options.slopes[:, None, None] * -distance  # [Hq, n, m]
            mask = bias.masked_fill(~mask, -torch.inf).to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal,
        scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _decode(
    q: torch.Tensor,  # [B, Hq, D]
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,  # [B, M]
    seq_lens: np.ndarray,  # [B]
    options: Options,
    deterministic: bool,
    derived: dict[Hashable, Any] | None = None,  # of all rows of a step
    shared: SharedPrefixes | None = None,
) -> torch.Tensor:  # [B, Hq, D]
    if (compiled := _compiled(q, options)) is not None:
        scale, window, _, kv_scales = options
        prefixes = None if deterministic else shared
        return compiled.decode(q, kv_layer, block_tables, seq_lens, scale, window, kv_scales, derived, prefixes)
    if not deterministic:
        return decode_gathered(q, kv_layer, block_tables, seq_lens, options)
    # Shapes and the number of threads decide how torch sums: a row alone has the same shapes in every batch.
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for row in range(len(q)):
            one = slice(row, row + 1)
            out[one] = decode_gathered(q[one], kv_layer, block_tables[one], seq_lens[one], options)
    finally:
        torch.set_num_threads(threads)
    return out


def _decode_static(q: torch.Tensor, kv_layer: torch.Tensor, rows: PagedRows, options: Options) -> torch.Tensor:
    """For a program: lengths are those in memory at each of its runs, `rows.seq_lens` bound them."""
    compiled = _compiled(q, options)
    assert compiled is not None and rows.on_device is not None, "only compiled loops can be recorded"
    lengths, longest = rows.on_device[1].numpy(), int(rows.seq_lens.max())
    scale, window, _, kv_scales = options
    return compiled.decode(
        q, kv_layer, rows.block_tables, lengths, scale, window, kv_scales, rows.derived, None, longest
    )


class _Loops(NamedTuple):
    decode: Callable[..., torch.Tensor]
    prefill: Callable[..., None]


def _compiled(q: torch.Tensor, options: Options) -> _Loops | None:
    """The compiled loops where they apply: they know no ALiBi, and take heads in pairs of vectors."""
    if q.device.type != "cpu" or options.slopes is not None or q.shape[-1] % 2:
        return None
    return _compiled_loops()


@functools.cache
def _compiled_loops() -> _Loops | None:
    """Imported at first use; None where this machine cannot build them."""
    try:
        from quire.kernels.cpu import threads
        from quire.kernels.cpu.decode import decode
        from quire.kernels.cpu.prefill import prefill

        threads.check()
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        logger.warning("paged attention runs uncompiled, several times slower: %s", error)
        return None
    return _Loops(decode, prefill)


def decode_gathered(
    q: torch.Tensor,  # [B, Hq, D]
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,  # [B, M]
    seq_lens: np.ndarray,  # [B]
    options: Options,
) -> torch.Tensor:  # [B, Hq, D]
    """The form for any device: rows of similar length together, as many as GATHERED_BYTES allow."""
    slot_bytes = 2 * kv_layer.shape[3:].numel() * q.element_size()
    groups = list(_groups(seq_lens, kv_layer.shape[2], GATHERED_BYTES // slot_bytes))
    if len(groups) == 1:
        return _decode_padded(q, kv_layer, block_tables, seq_lens, options)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in groups:
        rows = torch.from_numpy(group).to(q.device)
        out[rows] = _decode_padded(q[rows], kv_layer, block_tables[rows], seq_lens[group], options)
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
    options: Options,
) -> torch.Tensor:  # [B, Hq, D]
    """All rows together, padded to the longest."""
    block_size, window = kv_layer.shape[2], options.window
    position = torch.arange(-(-int(seq_lens.max()) // block_size) * block_size, device=q.device)
    length = torch.from_numpy(seq_lens.astype(np.int64)).to(q.device)[:, None]
    visible = position < length  # [B, m]
    if window is not None:
        visible &= position >= length - window
    # Entries that are not followed may hold anything: read block 0 in their place.
    followed = visible.view(len(q), -1, block_size).any(-1)
    blocks = block_tables[:, : followed.shape[1]].masked_fill(~followed, 0)
    # [B, m, Hkv, D] each; what is not visible may be NaN, which a mask alone does not silence.
    hidden = ~visible[:, :, None, None]
    k, v = (
        _plain(kv_layer[:, half][blocks].flatten(1, 2), options, half, q.dtype).masked_fill_(hidden, 0)
        for half in (0, 1)
    )
    mask = visible[:, None, None]
    if options.slopes is not None:
        bias = options.slopes[:, None, None] * (position - length + 1)[:, None, None]  # [B, Hq, 1, m]
        mask = bias.masked_fill(~mask, -torch.inf).to(q.dtype)
    out = F.scaled_dot_product_attention(
        q[:, :, None],
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        scale=options.scale,
        enable_gqa=q.shape[1] != kv_layer.shape[3],
    )
    return out[:, :, 0]
