"""A tile of keys and values laid out anew, for many queries at once: prompts, and prefixes that rows share.

`attend_tile` of tile.py reads K and V as they lie in the pool: a score takes a sum across lanes, and V is sorted into
pairs of tokens for every query again. Where a tile meets dozens of queries it pays to do that once. Packed, K has the
tokens side by side, a pair of a head's elements each, so that a query's scores are summed lane by lane; V has pairs of
tokens, in the order of the state's sums. Three times as fast, for whoever multiplies pairs of bfloat16; others go
without. States are those of tile.py: either form goes on where the other has stopped.
"""

# mypy: disable-error-code="call-arg, attr-defined, unreachable, import-untyped"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from quire.kernels.cpu.threads import pointer
from quire.kernels.cpu.tile import Form, scratch_at, weigh
from quire.kernels.cpu.vector import I32, Code, width

LEAST_TILE = 4
"""Lanes of the narrowest product of pairs."""

CHAINS = 4
"""Sums under way at once: a product must wait for the one before it in its sum."""


def packs(form: Form) -> bool:
    """Whether its tiles can be packed."""
    return bool(form.dot) and form.tile >= LEAST_TILE


def packed_floats(size: int, tile: int) -> int:
    """Room for a packed tile: K, then V."""
    return size * tile


@njit
def pack_tile(size, tile, lanes, keys, values, stride, start, stop, packed):  # type: ignore[no-untyped-def]
    """Lays out K of the whole tile, and V of the tokens start <= t < stop, with zeros in place of the others. `lanes`
    is width(size); addresses as for attend_tile; `packed` has packed_floats(size, tile) floats."""
    pairs = carray(pointer(packed), (size // 2, tile), np.int32)
    sorted_values = carray(pointer(packed + 2 * size * tile), (tile // 2, size, 2), np.int16)
    for token in range(tile):
        key = carray(pointer(keys + token * stride), (size // 2,), np.int32)
        for i in range(size // 2):
            pairs[i, token] = key[i]
        half = token % 2
        row = token // 2
        if start <= token < stop:
            value = carray(pointer(values + token * stride), (size // 8, 2, 4), np.int16)
            # The order SPREAD: of every eight elements the first four go into the first vector of a pair.
            for eight in range(size // 8):
                at = eight // (lanes // 4) * 2 * lanes + eight % (lanes // 4) * 4
                for i in range(4):
                    sorted_values[row, at + i, half] = value[eight, 0, i]
                    sorted_values[row, at + lanes + i, half] = value[eight, 1, i]
        else:
            for i in range(size):
                sorted_values[row, i, half] = 0


@intrinsic(prefer_literal=True)
def attend_packed(
    typing_context: Any, size: Any, tile: Any,
    q: Any, scale: Any, packed: Any, start: Any, stop: Any, state: Any,
) -> Any:  # fmt: skip
    """One query of a head against the tokens start <= t < stop, of which there is one, of a packed tile. Updates its
    state."""
    sizes = size.literal_value, tile.literal_value
    places = (types.int64, types.float32, types.int64, types.int32, types.int32, types.int64)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        q, scale, packed, start, stop, state = arguments[2:]
        _emit(builder, *sizes, 1, [q], scale, packed, [start], [stop], [state])

    return types.void(size, tile, *places), generate


@intrinsic(prefer_literal=True)
def attend_packed_four(
    typing_context: Any, size: Any, tile: Any, tiles: Any,
    q0: Any, q1: Any, q2: Any, q3: Any, scale: Any, packed: Any,
    start0: Any, start1: Any, start2: Any, start3: Any, stop0: Any, stop1: Any, stop2: Any, stop3: Any,
    state: Any, stride: Any,
) -> Any:  # fmt: skip
    """Four queries of a head, whose states lie `stride` bytes apart, against one packed tile or two that lie side by
    side: what is read of them is read once."""
    sizes = size.literal_value, tile.literal_value, tiles.literal_value
    places = (*[types.int64] * 4, types.float32, types.int64, *[types.int32] * 8, types.int64, types.int64)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        scale, packed, state, stride = arguments[7], arguments[8], arguments[17], arguments[18]
        states = [state]
        for _ in range(3):
            states.append(builder.add(states[-1], stride))
        _emit(builder, *sizes, arguments[3:7], scale, packed, arguments[9:13], arguments[13:17], states)

    return types.void(size, tile, tiles, *places), generate


def _emit(
    builder: Any, size: int, tile: int, tiles: int,
    queries: Sequence[Any], scale: Any, packed: Any, starts: Sequence[Any], stops: Sequence[Any], states: Sequence[Any],
) -> None:  # fmt: skip
    rows, tokens = Code(builder, width(size)), Code(builder, tile)
    tile_bytes, half_bytes, scratch = 4 * packed_floats(size, tile), 2 * size * tile, scratch_at(size)
    chains = [[[tokens.splat(0.0)] * (CHAINS // len(queries)) for _ in range(tiles)] for _ in queries]
    for i in range(size // 2):
        of_tiles = [tokens.load(packed, tokens.words, k * tile_bytes + 4 * i * tile) for k in range(tiles)]
        for query, of_query in zip(queries, chains, strict=True):
            pair = tokens.splat_word(tokens.load(query, I32, 4 * i, 2))
            for of_tile, sums in zip(of_tiles, of_query, strict=True):
                at = i % len(sums)
                sums[at] = tokens.dot(sums[at], of_tile, pair)
    values, places = [], range(0, 4 * size, 4 * rows.lanes)
    for of_query, start, stop, state in zip(chains, starts, stops, states, strict=True):
        scores = [tokens.mul(functools.reduce(tokens.add, sums), tokens.splat(scale)) for sums in of_query]
        *weights, shrink = weigh(tokens, scores, start, stop, state, size, rounded=True)
        for k, x in enumerate(weights):
            tokens.store_pairs(x, state, scratch + 2 * k * tile)
        factor = rows.splat(shrink)
        values.append([rows.mul(rows.load(state, rows.floats, at), factor) for at in places])
    for pair in range(tiles * tile // 2):
        k, of_pair = divmod(pair, tile // 2)
        base = k * tile_bytes + half_bytes + 4 * size * of_pair
        of_tile = [rows.load(packed, rows.words, base + at) for at in places]
        for i, state in enumerate(states):
            weight = rows.splat_word(rows.load(state, I32, scratch + 4 * pair))
            values[i] = [rows.dot(total, weight, x) for total, x in zip(values[i], of_tile, strict=True)]
    for sums, state in zip(values, states, strict=True):
        for total, at in zip(sums, places, strict=True):
            rows.store(total, state, at)
