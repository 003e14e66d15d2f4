"""Paged attention of many queries of a sequence on a CPU: prompts and their chunks, straight from the pool.

Queries go in groups, so that a tile of keys is in the first-level cache for all of a group's queries and heads; groups
and KV heads are shared out among the threads by the number of keys they see.
"""

# mypy: disable-error-code="call-arg, attr-defined, unreachable, import-untyped"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray

from quire.kernels.cpu import threads
from quire.kernels.cpu.decode import head_factors
from quire.kernels.cpu.packed import attend_packed, attend_packed_four, pack_tile, packed_floats, packs
from quire.kernels.cpu.threads import pointer, thread
from quire.kernels.cpu.threads import threads as num_threads
from quire.kernels.cpu.tile import Form, attend_tile, clear, finish_head, form_of, state_size, total_weight
from quire.kernels.cpu.vector import BYTES, KINDS, WIDENED, width

STATES = 32
"""Queries times heads of a group: their states fit the first-level cache beside a tile."""
PACKED_STATES = 128
"""The same where tiles are packed, which takes as long as a dozen queries: the second-level cache has to do."""


@functools.cache
def prefill_region(form: Form) -> int:
    size, tile, q_kind, kv_kind, dot = form
    version, floats, q_bytes = threads.version(), state_size(size), BYTES[q_kind]
    packed_form, lanes = int(packs(form)), width(size)
    room, most = (packed_floats(size, tile), PACKED_STATES) if packed_form else (0, STATES)

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
        group, of_place = heads // kv_heads, heads * size * q_bytes
        together = max(1, most // group)
        none, whole, twice = np.int32(0), np.int32(tile), np.int32(2 * tile)
        storage = np.empty((together * group + 1) * floats + 2 * room, np.float32)
        states = (storage.ctypes.data + 63) // 64 * 64
        packed = states + together * group * floats * 4
        everything = np.int64(0)
        for row in range(num_rows):
            count = np.int64(counts[row])
            parts = (count + together - 1) // together
            for part in range(parts):
                query = count * part // parts
                queries = count * (part + 1) // parts - query
                seen = min(lengths[row] - count + query + queries, window + queries)
                everything += queries * seen * kv_heads
        before = np.int64(0)
        for row in range(num_rows):
            count = np.int64(counts[row])
            prefix = lengths[row] - count
            parts = (count + together - 1) // together
            for part in range(parts):
                query = count * part // parts
                queries = count * (part + 1) // parts - query
                cost = queries * min(prefix + query + queries, window + queries)
                for kv_head in range(kv_heads):
                    mine = before * num_threads() // everything == thread()
                    before += cost
                    if not mine:
                        continue
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
                        both = origin + 2 * tile
                        if packed_form and start == 0 and both <= prefix + query + 1 and last - window <= origin:
                            # Two tiles of which every query sees everything shrink what is summed up only once.
                            other = (
                                a[10] + np.int64(tables[row * a[12] + (origin + tile) // block_size]) * of_block
                                + (origin + tile) % block_size * of_token + kv_head * of_head
                            )  # fmt: skip
                            pack_tile(size, tile, lanes, key, key + of_half, of_token, 0, tile, packed)
                            pack_tile(size, tile, lanes, other, other + of_half, of_token, 0, tile, packed + room * 4)
                            for j in range(group):
                                head = kv_head * group + j
                                of_q = a[9] + ((np.int64(starts[row]) + query) * heads + head) * size * q_bytes
                                i = np.int64(0)
                                while i + 4 <= queries:
                                    q = of_q + i * of_place
                                    attend_packed_four(
                                        size, tile, 2, q, q + of_place, q + 2 * of_place, q + 3 * of_place,
                                        scales[head], packed, none, none, none, none, twice, twice, twice, twice,
                                        states + (i * group + j) * floats * 4, group * floats * 4,
                                    )  # fmt: skip
                                    i += 4
                                while i < queries:
                                    for k in range(2):
                                        attend_packed(
                                            size, tile, of_q + i * of_place, scales[head], packed + k * room * 4,
                                            none, whole, states + (i * group + j) * floats * 4,
                                        )  # fmt: skip
                                    i += 1
                            position = both
                            continue
                        if packed_form:
                            end = min(np.int64(tile), last - origin)
                            pack_tile(size, tile, lanes, key, key + of_half, of_token, start, end, packed)
                        i = np.int64(0)
                        while i < queries:
                            place = prefix + query + i
                            first = max(start, place - window + 1 - origin)
                            stop = min(np.int64(tile), place + 1 - origin)
                            # Four queries one after the other, when all of them see something of the tile.
                            low = max(start, place + 3 - window + 1 - origin)
                            if packed_form and i + 4 <= queries and low < stop:
                                for j in range(group):
                                    head = kv_head * group + j
                                    of_q = a[9] + ((np.int64(starts[row]) + query + i) * heads + head) * size * q_bytes
                                    attend_packed_four(
                                        size, tile, 1, of_q, of_q + of_place, of_q + 2 * of_place, of_q + 3 * of_place,
                                        scales[head], packed,
                                        np.int32(first), np.int32(max(start, low - 2)), np.int32(max(start, low - 1)),
                                        np.int32(low), np.int32(stop), np.int32(stop + 1), np.int32(stop + 2),
                                        np.int32(stop + 3), states + (i * group + j) * floats * 4, group * floats * 4,
                                    )  # fmt: skip
                                i += 4
                                continue
                            if first < stop:
                                for j in range(group):
                                    head = kv_head * group + j
                                    at = (np.int64(starts[row]) + query + i) * heads + head
                                    state = states + (i * group + j) * floats * 4
                                    if packed_form:
                                        attend_packed(
                                            size, tile, a[9] + at * size * q_bytes, scales[head],
                                            packed, np.int32(first), np.int32(stop), state,
                                        )  # fmt: skip
                                    else:
                                        attend_tile(
                                            size, tile, q_kind, kv_kind, dot, a[9] + at * size * q_bytes, scales[head],
                                            key, key + of_half, of_token, np.int32(first), np.int32(stop), 0, 0, state,
                                        )  # fmt: skip
                            i += 1
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


class _Call(NamedTuple):
    """What is alike in all layers of a step."""

    arguments: Any
    region: int
    kept: tuple[Any, ...]
    """What the arguments point at."""


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
    derived: dict[Hashable, Any] | None = None,  # of the same rows: kept here for the layers that follow
) -> None:
    assert q.is_contiguous() and out.is_contiguous()
    layout = (kv_layer.shape, kv_layer.stride(), kv_layer.dtype)
    key = (prefill, q.shape, q.dtype, layout, scale, window, kv_scales is None)
    call: _Call | None = None if derived is None else derived.get(key)
    if call is None:
        call = _prepare(q, kv_layer, block_tables, query_starts, num_queries, seq_lens, scale, window)
        if derived is not None:
            derived[key] = call
    arguments = call.arguments
    arguments[9], arguments[10], arguments[17] = q.data_ptr(), kv_layer.data_ptr(), out.data_ptr()
    if kv_scales is not None:
        heads = q.shape[1]
        factors = head_factors(heads, scale, WIDENED.get(KINDS[kv_layer.dtype], 1.0), kv_scales)
        arguments[14], arguments[15] = factors.ctypes.data, factors.ctypes.data + 4 * heads
    threads.run(call.region, arguments)


def _prepare(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: np.ndarray,
    num_queries: np.ndarray,
    seq_lens: np.ndarray,
    scale: float,
    window: int | None,
) -> _Call:
    assert kv_layer.stride(-1) == 1
    assert block_tables.dtype == torch.int32 and block_tables.stride(1) == 1
    heads, size = q.shape[1:]
    block_size, kv_heads = kv_layer.shape[2:4]
    starts, counts, lengths = (np.ascontiguousarray(x, np.int32) for x in (query_starts, num_queries, seq_lens))
    form = form_of(size, block_size, KINDS[q.dtype], KINDS[kv_layer.dtype])
    factors = head_factors(heads, scale, WIDENED.get(form.kv_kind, 1.0), None)
    element, of_scores = BYTES[form.kv_kind], factors.ctypes.data
    arguments = threads.pack(
        len(lengths), heads, kv_heads, block_size, int(lengths.max()) if window is None else window,
        *(stride * element for stride in kv_layer.stride()[:4]),
        0, 0, block_tables.data_ptr(), block_tables.stride(0), lengths.ctypes.data,
        of_scores, of_scores + 4 * heads, starts.ctypes.data, 0, counts.ctypes.data, 0,
    )  # fmt: skip
    return _Call(arguments, prefill_region(form), (block_tables, starts, counts, lengths, factors))
