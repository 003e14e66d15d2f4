"""What rows share, on a CPU: all rows of a group against the prefix that they have in common, two tiles at a time.

The results are states, one for each row and head, from which `decode.py` goes on through what is the row's own. Only
where tiles can be packed: elsewhere rows that share a prefix find it in the cache, and that has to do.
"""

# mypy: disable-error-code="call-arg, attr-defined, unreachable, import-untyped"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import functools

import numpy as np
from numba import carray

from quire.kernels.cpu import threads
from quire.kernels.cpu.packed import attend_packed, attend_packed_four, pack_tile, packed_floats
from quire.kernels.cpu.threads import pointer, thread
from quire.kernels.cpu.threads import threads as num_threads
from quire.kernels.cpu.tile import Form, clear, state_size
from quire.kernels.cpu.vector import BFLOAT16, BYTES, width

STATES = 64
"""Rows times heads of a group that meet a packed tile together: their states fit the second-level cache."""


@functools.cache
def shared_region(form: Form) -> int:
    """Arguments: groups, Hq, Hkv, block, members; strides of block, half, token, head in bytes; q, pool, tables and
    their stride, starts, rows, lengths, scales, states."""
    size, tile, *_ = form
    version, floats, lanes, room = threads.version(), state_size(size), width(size), packed_floats(size, tile)
    q_bytes = BYTES[BFLOAT16]

    # Cached on disk by what it closes over: numbers alone.
    def attend(address):  # type: ignore[no-untyped-def]
        if version == 0:
            return
        a = carray(pointer(address), (18,), np.int64)
        num_groups, heads, kv_heads, block_size, num_members = a[0], a[1], a[2], a[3], a[4]
        of_block, of_half, of_token, of_head = a[5], a[6], a[7], a[8]
        starts = carray(pointer(a[13]), (num_groups + 1,), np.int32)
        rows = carray(pointer(a[14]), (num_members,), np.int32)
        lengths = carray(pointer(a[15]), (num_groups,), np.int32)
        scales = carray(pointer(a[16]), (heads,), np.float32)
        storage = np.empty(2 * room + 16, np.float32)
        packed = (storage.ctypes.data + 63) // 64 * 64
        heads_per = heads // kv_heads
        of_row = heads * size * q_bytes
        none, whole, twice = np.int32(0), np.int32(tile), np.int32(2 * tile)
        most = max(1, STATES // heads_per)
        everything = np.int64(0)
        for g in range(num_groups):
            everything += np.int64(starts[g + 1] - starts[g]) * lengths[g] * kv_heads
        before = np.int64(0)
        for g in range(num_groups):
            count = np.int64(starts[g + 1] - starts[g])
            parts = (count + most - 1) // most
            for kv_head in range(kv_heads):
                for part in range(parts):
                    first = starts[g] + count * part // parts
                    end = starts[g] + count * (part + 1) // parts
                    mine = before * num_threads() // everything == thread()
                    before += (end - first) * lengths[g]
                    if not mine:
                        continue
                    for member in range(first, end):
                        for head in range(kv_head * heads_per, (kv_head + 1) * heads_per):
                            clear(a[17] + (member * heads + head) * floats * 4, size)
                    table = a[11] + np.int64(rows[starts[g]]) * a[12] * 4
                    blocks = carray(pointer(table), (lengths[g] // block_size,), np.int32)
                    position = np.int64(0)
                    while position < lengths[g]:
                        # Two tiles, where there are two, shrink what is summed up only once.
                        tiles = min((lengths[g] - position) // tile, 2)
                        for k in range(tiles):
                            at = position + k * tile
                            key = (
                                a[10] + np.int64(blocks[at // block_size]) * of_block
                                + at % block_size * of_token + kv_head * of_head
                            )  # fmt: skip
                            place = packed + k * room * 4
                            pack_tile(size, tile, lanes, key, key + of_half, of_token, 0, tile, place)
                        position += tiles * tile
                        for head in range(kv_head * heads_per, (kv_head + 1) * heads_per):
                            q = a[9] + head * size * q_bytes
                            member = first
                            while tiles == 2 and member + 4 <= end:
                                attend_packed_four(
                                    size, tile, 2,
                                    q + rows[member] * of_row, q + rows[member + 1] * of_row,
                                    q + rows[member + 2] * of_row, q + rows[member + 3] * of_row,
                                    scales[head], packed, none, none, none, none, twice, twice, twice, twice,
                                    a[17] + (member * heads + head) * floats * 4, heads * floats * 4,
                                )  # fmt: skip
                                member += 4
                            while member < end:
                                for k in range(tiles):
                                    attend_packed(
                                        size, tile, q + rows[member] * of_row, scales[head],
                                        packed + k * room * 4, none, whole,
                                        a[17] + (member * heads + head) * floats * 4,
                                    )  # fmt: skip
                                member += 1
        storage[0] = 0  # numba frees an array after its last use

    return threads.region(attend)
