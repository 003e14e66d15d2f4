"""Paged attention of many queries of a sequence on a CPU: prompts and their chunks, straight from the pool.

Queries go in groups, so that a tile of keys is in the first-level cache for all of a group's queries and heads; groups
and KV heads are shared out among the threads by the number of keys they see.
"""

# mypy: disable-error-code="call-arg, attr-defined, unreachable, import-untyped"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numba import carray

from quire.kernels.cpu import threads
from quire.kernels.cpu.decode import head_factors
from quire.kernels.cpu.threads import pointer, thread
from quire.kernels.cpu.threads import threads as num_threads
from quire.kernels.cpu.tile import MAX_TILE, attend_tile, clear, dots, finish_head, state_size, total_weight
from quire.kernels.cpu.vector import BYTES, KINDS, WIDENED

STATES = 32
"""Queries times heads of a group: their states fit the first-level cache beside a tile."""


@functools.cache
def _region(size: int, tile: int, q_kind: int, kv_kind: int, dot: int) -> int:
    version, floats, q_bytes = threads.version(), state_size(size), BYTES[q_kind]

    # Cached on disk by what it closes over: numbers alone.
    def attend(address):  # type: ignore[no-untyped-def]
        if version == 0:
            return
        a = carray(pointer(address), (20,), np.int64)
        num_rows, heads, kv_heads, block_size, window = a[0], a[1], a[2], a[3], a[4]
        of_block, of_half, of_token, of_head = a[5], a[6], a[7], a[8]
        tables = carray(pointer(a[11]), (num_rows * a[12],), np.int32)
        lengths = carray(pointer(a[13]), (num_rows,), np.int32)
        scales = carray(pointer(a[14]), (heads,), np.float32)
        factors = carray(pointer(a[15]), (heads,), np.float32)
        starts = carray(pointer(a[16]), (num_rows,), np.int32)
        counts = carray(pointer(a[18]), (num_rows,), np.int32)
        group = heads // kv_heads
        together = max(1, STATES // group)
        storage = np.empty((together * group + 1) * floats, np.float32)
        states = (storage.ctypes.data + 63) // 64 * 64
        everything = np.int64(0)
        for row in range(num_rows):
            count = np.int64(counts[row])
            for query in range(0, count, together):
                everything += min(lengths[row] - count + query + together, window + together) * kv_heads
        before = np.int64(0)
        for row in range(num_rows):
            count = np.int64(counts[row])
            prefix = lengths[row] - count
            for query in range(0, count, together):
                cost = min(prefix + query + together, window + together)
                for kv_head in range(kv_heads):
                    mine = before * num_threads() // everything == thread()
                    before += cost
                    if not mine:
                        continue
                    queries = min(together, count - query)
                    for i in range(queries * group):
                        clear(states + i * floats * 4, size)
                    position = max(np.int64(0), prefix + query - window + 1)
                    last = prefix + query + queries
                    while position < last:
                        inside = position % block_size
                        start = inside % tile
                        origin = position - start
                        key = (
                            a[10] + np.int64(tables[row * a[12] + position // block_size]) * of_block
                            + (inside - start) * of_token + kv_head * of_head
                        )  # fmt: skip
                        for i in range(queries):
                            place = prefix + query + i
                            first = max(start, place - window + 1 - origin)
                            stop = min(np.int64(tile), place + 1 - origin)
                            if first < stop:
                                for j in range(group):
                                    head = kv_head * group + j
                                    at = (np.int64(starts[row]) + query + i) * heads + head
                                    attend_tile(
                                        size, tile, q_kind, kv_kind, dot, a[9] + at * size * q_bytes, scales[head],
                                        key, key + of_half, of_token, np.int32(first), np.int32(stop), 0, 0,
                                        states + (i * group + j) * floats * 4,
                                    )  # fmt: skip
                        position = origin + tile
                    for i in range(queries):
                        for j in range(group):
                            head = kv_head * group + j
                            at = (np.int64(starts[row]) + query + i) * heads + head
                            state = states + (i * group + j) * floats * 4
                            finish_head(
                                size, q_kind, kv_kind, dot, state, factors[head] / total_weight(state, size),
                                a[17] + at * size * q_bytes,
                            )  # fmt: skip
        storage[0] = 0  # numba frees an array after its last use

    return threads.region(attend)


def prefill(
    q: torch.Tensor,  # [T, Hq, D], contiguous
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    block_tables: torch.Tensor,  # [B, M] int32
    query_starts: np.ndarray,  # [B]: where a row's queries begin
    num_queries: np.ndarray,  # [B]
    seq_lens: np.ndarray,  # [B]
    scale: float,
    window: int | None,
    kv_scales: torch.Tensor | None,  # [2, Hkv]
    out: torch.Tensor,  # [T, Hq, D], contiguous: where the rows' results go
) -> None:
    assert kv_layer.stride(-1) == 1 and q.is_contiguous() and out.is_contiguous()
    assert block_tables.dtype == torch.int32 and block_tables.stride(1) == 1
    heads, size = q.shape[1:]
    block_size, kv_heads = kv_layer.shape[2:4]
    starts, counts, lengths = (np.ascontiguousarray(x, np.int32) for x in (query_starts, num_queries, seq_lens))
    q_kind, kv_kind = KINDS[q.dtype], KINDS[kv_layer.dtype]
    factors = head_factors(heads, scale, WIDENED.get(kv_kind, 1.0), kv_scales)
    element = BYTES[kv_kind]
    arguments = threads.pack(
        len(lengths), heads, kv_heads, block_size, int(lengths.max()) if window is None else window,
        *(stride * element for stride in kv_layer.stride()[:4]),
        q.data_ptr(), kv_layer.data_ptr(), block_tables.data_ptr(), block_tables.stride(0), lengths.ctypes.data,
        factors.ctypes.data, factors.ctypes.data + 4 * heads, starts.ctypes.data, out.data_ptr(), counts.ctypes.data, 0,
    )  # fmt: skip
    tile = math.gcd(block_size, MAX_TILE)
    threads.run(_region(size, tile, q_kind, kv_kind, dots(size, tile, q_kind, kv_kind)), arguments)
