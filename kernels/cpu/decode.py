"""Paged attention of single queries on a CPU: a compiled loop that reads each block once, with an online softmax.

A row's context is cut at fixed positions into splits of SPLIT tokens; (split, head) pairs are shared out among the
threads, and the splits of a row, where it has several, merged afterwards. The cuts depend on nothing but the position,
so a row's result depends neither on the batch nor on the number of threads. Compiled at the first use of a head size
and element type, and cached on disk where possible.

The memory that it reads is what bounds it. So the next tile is asked for while one is computed, across the ends of
blocks and of rows.
"""

# mypy: disable-error-code="call-arg, attr-defined, unreachable, import-untyped"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit

from quire.kernels.attention import SharedPrefixes
from quire.kernels.cpu import threads
from quire.kernels.cpu.packed import packs
from quire.kernels.cpu.shared import shared_region
from quire.kernels.cpu.threads import pointer, thread
from quire.kernels.cpu.threads import threads as num_threads
from quire.kernels.cpu.tile import (
    TOTALS,
    Form,
    attend_tile,
    clear,
    finish_head,
    form_of,
    go_on,
    state_size,
    total_weight,
)
from quire.kernels.cpu.vector import BYTES, KINDS, LOG2E, WIDENED

NUMBERS = 23
"""A region's arguments."""

SPLIT = 256

MOST_STATES = 64 << 20
"""Bytes of states of a program, which has to have room for the longest sequences."""

FEW_HEADS = 64
"""States that one thread finishes sooner than it wakes the others."""


@njit
def _merge(states, first, count, size):  # type: ignore[no-untyped-def]
    """One head's states [n, size + ...] of a row's splits into the first of them; returns the sum of all weights."""
    top = np.float32(-np.inf)
    for s in range(first, first + count):
        top = max(top, states[s, size + 2 * TOTALS])
    everything = np.float32(0)
    for s in range(first, first + count):
        weight = np.float32(2) ** (states[s, size + 2 * TOTALS] - top)
        everything += total_weight(states[s].ctypes.data, size) * weight
        for d in range(size):
            value = states[s, d] * weight
            states[first, d] = value if s == first else states[first, d] + value
    return everything


@functools.cache
def attend_region(form: Form) -> int:
    """Results of rows of one split; of the others, every split's and head's state. Cached on disk by what the body
    closes over: numbers alone."""
    size, tile, q_kind, kv_kind, dot = form
    version, floats, q_bytes = threads.version(), state_size(size), BYTES[q_kind]

    def attend(address):  # type: ignore[no-untyped-def]
        if version == 0:
            return
        a = carray(pointer(address), (NUMBERS,), np.int64)
        num_rows, heads, kv_heads, block_size, window = a[0], a[1], a[2], a[3], a[4]
        of_block, of_half, of_token, of_head = a[5], a[6], a[7], a[8]
        q, pool = a[9], a[10]
        tables = carray(pointer(a[11]), (num_rows * a[12],), np.int32)
        lengths = carray(pointer(a[13]), (num_rows,), np.int32)
        scales = carray(pointer(a[14]), (heads,), np.float32)
        factors = carray(pointer(a[18]), (heads,), np.float32)
        begins = carray(pointer(a[20]), (num_rows,), np.int32)
        members = carray(pointer(a[21]), (num_rows,), np.int32)
        # The states of a row of one split are this thread's alone, and stay in its first-level cache.
        storage = np.empty((heads + 1) * floats, np.float32)
        own = (storage.ctypes.data + 63) // 64 * 64
        group = heads // kv_heads
        everything = np.int64(0)
        for row in range(num_rows):
            everything += min(np.int64(lengths[row] - begins[row]), window) * kv_heads
        low = everything * thread() // num_threads()
        high = everything * (thread() + 1) // num_threads()
        before = np.int64(0)
        split = np.int64(0)
        for row in range(num_rows):
            length = np.int64(lengths[row])
            first = max(np.int64(begins[row]), length - window)
            is_begun = members[row] >= 0
            single = first // SPLIT == (length - 1) // SPLIT
            while first < length:
                last = min(length, (first // SPLIT + 1) * SPLIT)
                cost = last - first
                # A head is this thread's where its work begins within the thread's part of all work.
                begin = min(max((low - before + cost - 1) // cost, np.int64(0)), kv_heads)
                end = min(max((high - before + cost - 1) // cost, np.int64(0)), kv_heads)
                before += cost * kv_heads
                if begin < end:
                    states = own if single else a[15] + split * heads * floats * 4
                    for head in range(begin * group, end * group):
                        if is_begun:
                            begun = a[22] + (np.int64(members[row]) * heads + head) * floats * 4
                            go_on(states + head * floats * 4, begun, size)
                        else:
                            clear(states + head * floats * 4, size)
                    position = first
                    while position < last:
                        inside = position % block_size
                        start = inside % tile
                        stop = min(np.int64(tile), start + last - position)
                        block = np.int64(tables[row * a[12] + position // block_size])
                        at = pool + block * of_block + (inside - start) * of_token
                        # Where this thread reads next: here, or where the next row begins, or nowhere else.
                        after = position + stop - start
                        following = at
                        if after < last or before < high:
                            ahead, there = row, after
                            if there >= length:
                                ahead = row + 1
                                there = max(np.int64(begins[ahead]), np.int64(lengths[ahead]) - window)
                            block = np.int64(tables[ahead * a[12] + there // block_size])
                            following = pool + block * of_block + there % block_size // tile * tile * of_token
                        for kv_head in range(begin, end):
                            key = at + kv_head * of_head
                            for head in range(kv_head * group, (kv_head + 1) * group):
                                attend_tile(
                                    size, tile, q_kind, kv_kind, dot,
                                    q + (row * heads + head) * size * q_bytes, scales[head],
                                    key, key + of_half, of_token, np.int32(start), np.int32(stop),
                                    following + kv_head * of_head, a[19], states + head * floats * 4,
                                )  # fmt: skip
                        position = after
                    if single:
                        for head in range(begin * group, end * group):
                            state = states + head * floats * 4
                            finish_head(
                                size, q_kind, kv_kind, dot, state, factors[head] / total_weight(state, size),
                                a[17] + (row * heads + head) * size * q_bytes,
                            )  # fmt: skip
                first = last
                is_begun = False
                if not single:
                    split += 1
        storage[0] = 0  # numba frees an array after its last use

    return threads.region(attend)


@functools.cache
def finish_region(form: Form) -> int:
    """From the states to the results of rows of several splits."""
    size, _, q_kind, kv_kind, dot = form
    version, floats, q_bytes = threads.version(), state_size(size), BYTES[q_kind]

    def finish(address):  # type: ignore[no-untyped-def]
        if version == 0:
            return
        a = carray(pointer(address), (NUMBERS,), np.int64)
        num_rows, heads, window, out = a[0], a[1], a[4], a[17]
        lengths = carray(pointer(a[13]), (num_rows,), np.int32)
        factors = carray(pointer(a[18]), (heads,), np.float32)
        flat = carray(pointer(a[15]), (a[16], heads, floats), np.float32)
        begins = carray(pointer(a[20]), (num_rows,), np.int32)
        split = np.int64(0)
        for row in range(num_rows):
            length = np.int64(lengths[row])
            first = max(np.int64(begins[row]), length - window)
            count = (length - 1) // SPLIT - first // SPLIT + 1
            if count <= 1:  # 0: a row of padding
                continue
            if row * num_threads() // num_rows == thread():
                for head in range(heads):
                    total = _merge(flat[:, head], split, count, size)
                    finish_head(
                        size, q_kind, kv_kind, dot, a[15] + (split * heads + head) * floats * 4,
                        factors[head] / total, out + (row * heads + head) * size * q_bytes,
                    )  # fmt: skip
            split += count

    return threads.region(finish)


class _Call(NamedTuple):
    """What is alike in all layers of a step."""

    arguments: Any
    attend: int
    finish: int
    """0: no row has several splits."""
    finish_threads: int | None
    shared: int
    """0: no rows share a prefix."""
    of_shared: Any
    """Its arguments."""
    kept: tuple[Any, ...]
    """What the arguments point at."""
    states: tuple[torch.Tensor, ...]
    """Likewise, but of no use once the layer is done: a program need not keep them for itself."""


def decode(
    q: torch.Tensor,  # [B, Hq, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    block_tables: torch.Tensor,  # [B, M] int32
    seq_lens: np.ndarray,  # [B] int32
    scale: float,
    window: int | None,
    kv_scales: torch.Tensor | None = None,  # [2, Hkv]
    derived: dict[Hashable, Any] | None = None,  # of the same rows: kept here for the layers that follow
    prefixes: SharedPrefixes | None = None,  # of the same rows; used where there is no window and tiles can be packed
    longest: int | None = None,  # bounds seq_lens, which may be others at each replay of a program; None: they stay
) -> torch.Tensor:  # [B, Hq, D]
    q = q.contiguous()
    layout = (kv_layer.shape, kv_layer.stride(), kv_layer.dtype)
    key = (q.shape, q.dtype, layout, scale, window, kv_scales is None)
    call = None if derived is None else derived.get(key)
    if call is None:
        call = _prepare(q, kv_layer, block_tables, seq_lens, scale, window, prefixes, longest)
        if derived is not None:
            derived[key] = call
    threads.keep(call.kept)
    out = threads.empty(q.shape, q.dtype)
    arguments = call.arguments
    arguments[9], arguments[10], arguments[17] = q.data_ptr(), kv_layer.data_ptr(), out.data_ptr()
    if kv_scales is not None:
        heads = q.shape[1]
        factors = head_factors(heads, scale, WIDENED.get(KINDS[kv_layer.dtype], 1.0), kv_scales)
        arguments[14], arguments[18] = factors.ctypes.data, factors.ctypes.data + 4 * heads
        threads.keep(factors)
    if call.shared:
        of_shared = call.of_shared
        of_shared[9], of_shared[10], of_shared[16] = arguments[9], arguments[10], arguments[14]
        threads.run(call.shared, of_shared)
    threads.run(call.attend, arguments)
    if call.finish:
        threads.run(call.finish, arguments, call.finish_threads)
    return out


def _prepare(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: np.ndarray,
    scale: float,
    window: int | None,
    prefixes: SharedPrefixes | None,
    longest: int | None,
) -> _Call:
    assert kv_layer.stride(-1) == 1
    assert block_tables.dtype == torch.int32 and block_tables.stride(1) == 1
    num_rows, heads, size = q.shape
    block_size, kv_heads = kv_layer.shape[2:4]
    lengths = np.ascontiguousarray(seq_lens, np.int32)
    form = form_of(size, block_size, KINDS[q.dtype], KINDS[kv_layer.dtype])
    if window is not None or not packs(form):
        prefixes = None
    bounds = lengths if longest is None else np.full(num_rows, longest, np.int32)
    visible = int(bounds.max()) if window is None else window
    begins, members = np.zeros(num_rows, np.int32), np.full(num_rows, -1, np.int32)
    sharing: list[np.ndarray] = []
    if prefixes is not None:
        sharing = [np.ascontiguousarray(x, np.int32) for x in (prefixes.starts, prefixes.rows, prefixes.lengths)]
        begins[prefixes.rows] = np.repeat(prefixes.lengths, np.diff(prefixes.starts))
        members[prefixes.rows] = np.arange(len(prefixes.rows))
    counts = (bounds - 1) // SPLIT - np.maximum(bounds - visible, begins) // SPLIT + 1
    if longest is not None and window is not None:
        counts += 1  # elsewhere than at the bound, a window may reach into one more
    num_splits = int(counts[counts > 1].sum())
    if longest is not None and 4 * num_splits * heads * state_size(size) > MOST_STATES:
        raise threads.NotRecordable(f"{num_rows} rows of up to {longest} tokens leave too much to be put together")
    factors = head_factors(heads, scale, WIDENED.get(form.kv_kind, 1.0), None)
    states = threads.empty((num_splits, heads, state_size(size)), torch.float32)
    num_members = 0 if prefixes is None else len(prefixes.rows)
    begun = threads.empty((num_members, heads, state_size(size)), torch.float32)
    element, of_scores = BYTES[form.kv_kind], factors.ctypes.data
    strides = [stride * element for stride in kv_layer.stride()[:4]]
    arguments = threads.pack(
        num_rows, heads, kv_heads, block_size, visible, *strides,
        0, 0, block_tables.data_ptr(), block_tables.stride(0), lengths.ctypes.data,
        of_scores, states.data_ptr(), num_splits, 0, of_scores + 4 * heads, 0,
        begins.ctypes.data, members.ctypes.data, begun.data_ptr(),
    )  # fmt: skip
    # All now: whoever waits for a compilation waits at the start.
    attend, finish = attend_region(form), finish_region(form)
    shared = shared_region(form) if window is None and packs(form) else 0
    of_shared = None
    if prefixes is not None:
        of_shared = threads.pack(
            len(prefixes.lengths), heads, kv_heads, block_size, len(prefixes.rows), *strides,
            0, 0, block_tables.data_ptr(), block_tables.stride(0),
            *(x.ctypes.data for x in sharing), 0, begun.data_ptr(),
        )  # fmt: skip
    return _Call(
        arguments,
        attend,
        finish if num_splits else 0,
        1 if num_splits * heads < FEW_HEADS and longest is None else None,
        shared if prefixes is not None else 0,
        of_shared,
        (lengths, factors, block_tables, begins, members, *sharing),
        (states, begun),
    )


def head_factors(heads: int, scale: float, widened: float, kv_scales: torch.Tensor | None) -> np.ndarray:
    """[2, Hq] float32: what scores, as powers of 2, and what values are multiplied with."""
    if kv_scales is None:
        return _plain_factors(heads, scale, widened)
    of_heads: np.ndarray = kv_scales.float().numpy().repeat(heads // kv_scales.shape[1], 1)
    scaled: np.ndarray = _plain_factors(heads, scale, widened) * of_heads
    return scaled


@functools.lru_cache(maxsize=64)
def _plain_factors(heads: int, scale: float, widened: float) -> np.ndarray:
    return np.repeat(np.array([[scale * LOG2E * widened], [widened]], np.float32), heads, 1)
