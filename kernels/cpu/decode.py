"""Paged attention of single queries on a CPU: a compiled loop that reads each block once, with an online softmax.

A row's context is cut at fixed positions into splits of SPLIT tokens; (split, head) pairs are shared out among the
threads, and the splits of a row merged afterwards. The cuts depend on nothing but the position, so a row's result
depends neither on the batch nor on the number of threads. Compiled at the first use of a head size and element type,
and cached on disk where possible.
"""

# mypy: disable-error-code="call-arg, attr-defined, unreachable, import-untyped"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numba import carray, njit

from quire.kernels.cpu import threads
from quire.kernels.cpu.threads import pointer, thread
from quire.kernels.cpu.threads import threads as num_threads
from quire.kernels.cpu.tile import MAX_TILE, TOTALS, attend_tile, clear, finish_head, state_size, total_weight
from quire.kernels.cpu.vector import BYTES, KINDS, LOG2E, WIDENED

SPLIT = 256
FEW_HEADS = 64
"""States that one thread finishes sooner than it wakes the others."""


@njit
def _merge(states, first, count, size):  # type: ignore[no-untyped-def]
    """One head's states [n, size + ...] of a row's splits into the first of them; returns the sum of all weights."""
    top = np.float32(-np.inf)
    for s in range(first, first + count):
        top = max(top, states[s, size + TOTALS])
    everything = np.float32(0)
    for s in range(first, first + count):
        weight = np.float32(1)
        if count > 1:
            weight = np.float32(2) ** (states[s, size + TOTALS] - top)
        everything += total_weight(states[s], size) * weight
        if count > 1:
            for d in range(size):
                value = states[s, d] * weight
                states[first, d] = value if s == first else states[first, d] + value
    return everything


@functools.cache
def _attend_region(size: int, tile: int, q_kind: int, kv_kind: int) -> int:
    """Every split's and head's state. Cached on disk by what the body closes over: numbers alone."""
    version, floats, q_bytes = threads.version(), state_size(size), BYTES[q_kind]

    def attend(address):  # type: ignore[no-untyped-def]
        if version == 0:
            return
        a = carray(pointer(address), (20,), np.int64)
        num_rows, heads, kv_heads, block_size, window = a[0], a[1], a[2], a[3], a[4]
        of_block, of_half, of_token, of_head = a[5], a[6], a[7], a[8]
        q, pool = a[9], a[10]
        tables = carray(pointer(a[11]), (num_rows * a[12],), np.int32)
        lengths = carray(pointer(a[13]), (num_rows,), np.int32)
        scales = carray(pointer(a[14]), (heads,), np.float32)
        states = carray(pointer(a[15]), (a[16] * heads, floats), np.float32)
        group = heads // kv_heads
        everything = np.int64(0)
        for row in range(num_rows):
            everything += min(np.int64(lengths[row]), window) * kv_heads
        low = everything * thread() // num_threads()
        high = everything * (thread() + 1) // num_threads()
        before = np.int64(0)
        split = np.int64(0)
        for row in range(num_rows):
            length = np.int64(lengths[row])
            first = max(np.int64(0), length - window)
            while first < length:
                last = min(length, (first // SPLIT + 1) * SPLIT)
                cost = last - first
                # A head is this thread's where its work begins within the thread's part of all work.
                begin = min(max((low - before + cost - 1) // cost, np.int64(0)), kv_heads)
                end = min(max((high - before + cost - 1) // cost, np.int64(0)), kv_heads)
                before += cost * kv_heads
                if begin < end:
                    for head in range(begin * group, end * group):
                        clear(states[split * heads + head], size)
                    position = first
                    while position < last:
                        inside = position % block_size
                        start = inside % tile
                        stop = min(np.int64(tile), start + last - position)
                        block = np.int64(tables[row * a[12] + position // block_size])
                        at = pool + block * of_block + (inside - start) * of_token
                        after = position + stop - start
                        following = at
                        if after < last:
                            block = np.int64(tables[row * a[12] + after // block_size])
                            following = pool + block * of_block + (after % block_size) * of_token
                        for kv_head in range(begin, end):
                            key = at + kv_head * of_head
                            for head in range(kv_head * group, (kv_head + 1) * group):
                                attend_tile(
                                    size, tile, q_kind, kv_kind,
                                    q + (row * heads + head) * size * q_bytes, scales[head],
                                    key, key + of_half, of_token, np.int32(start), np.int32(stop),
                                    following + kv_head * of_head,
                                    a[15] + (split * heads + head) * floats * 4,
                                )  # fmt: skip
                        position = after
                first = last
                split += 1

    return threads.region(attend)


@functools.cache
def _finish_region(size: int, q_kind: int, kv_kind: int) -> int:
    """From the states to the rows' results."""
    version, floats, q_bytes = threads.version(), state_size(size), BYTES[q_kind]

    def finish(address):  # type: ignore[no-untyped-def]
        if version == 0:
            return
        a = carray(pointer(address), (20,), np.int64)
        num_rows, heads, window, out = a[0], a[1], a[4], a[17]
        lengths = carray(pointer(a[13]), (num_rows,), np.int32)
        factors = carray(pointer(a[18]), (heads,), np.float32)
        flat = carray(pointer(a[15]), (a[16], heads, floats), np.float32)
        split = np.int64(0)
        for row in range(num_rows):
            length = np.int64(lengths[row])
            first = max(np.int64(0), length - window)
            count = (length - 1) // SPLIT - first // SPLIT + 1
            if row % num_threads() == thread():
                for head in range(heads):
                    total = _merge(flat[:, head], split, count, size)
                    finish_head(
                        size, q_kind, kv_kind, a[15] + (split * heads + head) * floats * 4,
                        factors[head] / total, out + (row * heads + head) * size * q_bytes,
                    )  # fmt: skip
            split += count

    return threads.region(finish)


def decode(
    q: torch.Tensor,  # [B, Hq, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    block_tables: torch.Tensor,  # [B, M] int32
    seq_lens: np.ndarray,  # [B] int32
    scale: float,
    window: int | None,
    kv_scales: torch.Tensor | None = None,  # [2, Hkv]
) -> torch.Tensor:  # [B, Hq, D]
    assert kv_layer.stride(-1) == 1
    assert block_tables.dtype == torch.int32 and block_tables.stride(1) == 1
    num_rows, heads, size = q.shape
    block_size, kv_heads = kv_layer.shape[2:4]
    q = q.contiguous()
    lengths = np.ascontiguousarray(seq_lens, np.int32)
    if window is None:
        visible = int(lengths.max())
        num_splits = int(((lengths - 1) // SPLIT).sum()) + num_rows
    else:
        visible = window
        num_splits = int(((lengths - 1) // SPLIT - np.maximum(lengths - window, 0) // SPLIT + 1).sum())
    q_kind, kv_kind = KINDS[q.dtype], KINDS[kv_layer.dtype]
    factors = head_factors(heads, scale * LOG2E, WIDENED.get(kv_kind, 1.0), kv_scales)
    out = torch.empty_like(q)
    states = torch.empty((num_splits, heads, state_size(size)))
    element, of_scores = BYTES[kv_kind], factors.ctypes.data
    arguments = np.array(
        [
            num_rows, heads, kv_heads, block_size, visible,
            *(stride * element for stride in kv_layer.stride()[:4]),
            q.data_ptr(), kv_layer.data_ptr(), block_tables.data_ptr(), block_tables.stride(0), lengths.ctypes.data,
            of_scores, states.data_ptr(), num_splits, out.data_ptr(), of_scores + 4 * heads, 0,
        ],
        np.int64,
    )  # fmt: skip
    threads.run(_attend_region(size, math.gcd(block_size, MAX_TILE), q_kind, kv_kind), arguments)
    threads.run(_finish_region(size, q_kind, kv_kind), arguments, 1 if num_splits * heads < FEW_HEADS else None)
    return out


def head_factors(heads: int, scale: float, widened: float, kv_scales: torch.Tensor | None) -> np.ndarray:
    """[2, Hq] float32: what scores and what values are multiplied with."""
    if kv_scales is None:
        return _plain_factors(heads, scale, widened)
    of_heads: np.ndarray = kv_scales.float().numpy().repeat(heads // kv_scales.shape[1], 1)
    scaled: np.ndarray = _plain_factors(heads, scale, widened) * of_heads
    return scaled


@functools.lru_cache(maxsize=64)
def _plain_factors(heads: int, scale: float, widened: float) -> np.ndarray:
    return np.repeat(np.array([[scale * widened], [widened]], np.float32), heads, 1)
