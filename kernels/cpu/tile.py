"""Attention of one query to one tile of keys, as vector code: what the loops of decode.py and prefill.py are made of.

A tile is up to 16 tokens of one block, and one KV head. Scores are products in float32, summed across lanes for all
tokens of the tile together; weights exp2(score - top), with the online softmax's running top; values are added in
registers. What a head has summed up so far is its state: SIZE sums of values, TOTALS sums of weights, one for each
place in a tile, the top, and TOTALS floats of scratch.
"""

# mypy: disable-error-code="call-arg, attr-defined, unreachable, import-untyped"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from quire.kernels.cpu.vector import BFLOAT16, BYTES, F32, I32, Code, width

MAX_TILE = 16
TOTALS = MAX_TILE


def state_size(head_size: int) -> int:
    """Floats of a head's state."""
    return head_size + 2 * TOTALS + 1


@njit
def clear(state, size):  # type: ignore[no-untyped-def]
    """Before a head's first tile."""
    state[: size + TOTALS] = 0
    state[size + TOTALS] = -np.inf


@njit
def total_weight(state, size):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(size, size + TOTALS):
        total += state[i]
    return total


@intrinsic(prefer_literal=True)
def attend_tile(
    typing_context: Any, size: Any, tile: Any, q_kind: Any, kv_kind: Any,
    q: Any, scale: Any, keys: Any, values: Any, stride: Any, start: Any, stop: Any, following: Any, state: Any,
) -> Any:  # fmt: skip
    """One head against the tokens start <= t < stop of a tile, whose K lie at keys + t * stride and V likewise. Updates
    the head's state: SIZE sums of values, TOTALS sums of weights, the highest score, and TOTALS floats of scratch.

    K of the whole tile is read, and what lies outside [start, stop) forgotten; V is read inside only. The same places
    of the tile that is read next, whose K lie at `following`, are asked for meanwhile: a block is too short for the
    processor to find out by itself where the reading goes on. The literal 0: there is none to ask for."""
    numbers = tuple(x.literal_value for x in (size, tile, q_kind, kv_kind))
    is_ahead = not (isinstance(following, types.Literal) and following.literal_value == 0)
    places = (types.int64, types.float32, *[types.int64] * 3, types.int32, types.int32, following, types.int64)
    signature = types.void(size, tile, q_kind, kv_kind, *places)

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        _emit_tile(builder, *numbers, *values[4:11], values[11] if is_ahead else None, values[12])

    return signature, generate


def _emit_tile(
    b: Any, size: int, tile: int, q_kind: int, kv_kind: int,
    q: Any, scale: Any, keys: Any, values: Any, stride: Any, start: Any, stop: Any, following: Any, state: Any,
) -> None:  # fmt: skip
    rows, tokens = Code(b, width(size)), Code(b, tile)
    mixed = kv_kind == BFLOAT16 and q_kind == BFLOAT16
    pairs = range(size // (2 * rows.lanes))
    totals_at, top_at, scratch_at = 4 * size, 4 * (size + TOTALS), 4 * (size + TOTALS + 1)

    def offset(kind: int, pair: int) -> int:
        return pair * 2 * rows.lanes * BYTES[kind]

    ahead = None if following is None else b.sub(following, keys)
    scaled = rows.splat(scale)
    query = [[rows.mul(half, scaled) for half in rows.load_pair(q_kind, mixed, q, offset(q_kind, i))] for i in pairs]
    partial = []
    for t in range(tile):
        key = b.add(keys, b.mul(stride, stride.type(t)))
        total = None
        for i in pairs:
            for of_q, of_k in zip(query[i], rows.load_pair(kv_kind, mixed, key, offset(kv_kind, i)), strict=True):
                total = rows.mul(of_q, of_k) if total is None else rows.fma(of_q, of_k, total)
        partial.append(total)
        if ahead is not None:
            rows.prefetch(b.add(key, ahead), size * BYTES[kv_kind])
    scores = rows.sums(partial)
    place, first, end = tokens.words_of(range(tile)), tokens.splat_word(start), tokens.splat_word(stop)
    seen = b.and_(b.icmp_signed(">=", place, first), b.icmp_signed("<", place, end))
    scores = b.select(seen, scores, tokens.splat(-math.inf))

    before = rows.load(state, F32, top_at)
    highest = tokens.fold(scores, tokens.maximum)
    top = b.select(b.fcmp_ordered(">", highest, before), highest, before)
    rows.store(top, state, top_at)
    weights = b.select(seen, tokens.exp2(tokens.sub(scores, tokens.splat(top))), tokens.splat(0.0))
    tokens.store(weights, state, scratch_at)
    # Before the first tile `before` is -inf, and what is shrunk is 0.
    single = Code(b, 1)
    shrink = b.extract_element(single.exp2(single.splat(b.fsub(before, top))), I32(0))
    totals = tokens.load(state, tokens.floats, totals_at)
    tokens.store(tokens.fma(totals, tokens.splat(shrink), weights), state, totals_at)
    _emit_values(b, rows, pairs, mixed, kv_kind, values, stride, start, stop, shrink, state, scratch_at, ahead)


def _emit_values(
    b: Any, rows: Code, pairs: range, mixed: bool, kv_kind: int,
    values: Any, stride: Any, start: Any, stop: Any, shrink: Any, state: Any, scratch_at: int, ahead: Any,
) -> None:  # fmt: skip
    """A loop over the tokens, with the head's sums in registers."""
    count = 2 * len(pairs)
    offsets = [4 * rows.lanes * i for i in range(count)]
    factor = rows.splat(shrink)
    sums = [rows.mul(rows.load(state, rows.floats, at), factor) for at in offsets]
    entry = b.block
    loop, after = b.append_basic_block("values"), b.append_basic_block("summed")
    b.branch(loop)  # a tile has at least one token
    b.position_at_end(loop)
    token = b.phi(I32)
    carried = [b.phi(rows.floats) for _ in sums]
    wide = b.sext(token, stride.type)
    weight = rows.load(b.add(state, b.mul(wide, stride.type(4))), F32, scratch_at)
    weights = rows.splat(weight)
    value = b.add(values, b.mul(wide, stride))
    if ahead is not None:
        rows.prefetch(b.add(value, ahead), count * rows.lanes * BYTES[kv_kind])
    loaded = [
        half for i in pairs for half in rows.load_pair(kv_kind, mixed, value, 2 * i * rows.lanes * BYTES[kv_kind])
    ]
    results = [rows.fma(weights, half, total) for half, total in zip(loaded, carried, strict=True)]
    following = b.add(token, I32(1))
    token.add_incoming(start, entry)
    token.add_incoming(following, loop)
    for phi, before, result in zip(carried, sums, results, strict=True):
        phi.add_incoming(before, entry)
        phi.add_incoming(result, loop)
    b.cbranch(b.icmp_signed("<", following, stop), loop, after)
    b.position_at_end(after)
    for at, result in zip(offsets, results, strict=True):
        rows.store(result, state, at)


@intrinsic(prefer_literal=True)
def finish_head(
    typing_context: Any,
    size: Any,
    q_kind: Any,
    kv_kind: Any,
    state: Any,
    factor: Any,
    out: Any,
) -> Any:
    """A head's sums of values, times a factor, to where its result goes."""
    size_, q_kind_, kv_kind_ = (x.literal_value for x in (size, q_kind, kv_kind))

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows = Code(builder, width(size_))
        mixed = q_kind_ == kv_kind_ == BFLOAT16
        state, factor, out = arguments[3:]
        factors = rows.splat(factor)
        for i in range(0, size_, 2 * rows.lanes):
            pair = [rows.mul(rows.load(state, rows.floats, 4 * (i + half * rows.lanes)), factors) for half in (0, 1)]
            rows.store_pair((pair[0], pair[1]), q_kind_, mixed, out, i * BYTES[q_kind_])

    return types.void(size, q_kind, kv_kind, types.int64, types.float32, types.int64), generate
