"""Attention of one query to one tile of keys, as vector code: what the loops of decode.py and prefill.py are made of.

A tile is up to 16 tokens of one block, and one KV head. Scores are products in float32, summed across lanes for all
tokens of the tile together; weights exp2(score - top), with the online softmax's running top; values are added in
registers. What a head has summed up so far is its state: SIZE sums of values, TOTALS sums of weights, one for each
place in a tile, TOTALS floats of scratch, and the top.

Where the processor has products of bfloat16 pairs, and everything is bfloat16, they are used: for scores by pairs of a
head's elements, for values by pairs of tokens, with weights rounded to bfloat16.
"""

# mypy: disable-error-code="call-arg, attr-defined, unreachable, import-untyped"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from quire.kernels.cpu.threads import pointer
from quire.kernels.cpu.vector import BFLOAT16, BYTES, EVEN_ODD, F32, HALVES, I16, I32, I64, SPREAD, Code, has_dot, width

MAX_TILE = 16
TOTALS = MAX_TILE
LINE_FLOATS = 16
"""Floats of a cache line: what a state's size is a multiple of."""


def state_size(head_size: int) -> int:
    """Floats of a head's state."""
    return -(-(head_size + 2 * TOTALS + 1) // LINE_FLOATS) * LINE_FLOATS


class Form(NamedTuple):
    """What the loops of attention are compiled for."""

    size: int
    """Elements of a head."""
    tile: int
    q_kind: int
    kv_kind: int
    dot: int
    """1 where pairs of bfloat16 are multiplied, else 0; a number, as numba wants it."""


def form_of(size: int, block_size: int, q_kind: int, kv_kind: int) -> Form:
    tile = math.gcd(block_size, MAX_TILE)
    fit = q_kind == kv_kind == BFLOAT16 and width(size) >= 4 and tile % 2 == 0
    return Form(size, tile, q_kind, kv_kind, int(fit and has_dot()))


@njit
def clear(state, size):  # type: ignore[no-untyped-def]
    """Before a head's first tile; `state` is an address."""
    floats = carray(pointer(state), (size + 2 * TOTALS + 1,), np.float32)
    floats[: size + TOTALS] = 0
    floats[size + 2 * TOTALS] = -np.inf


@njit
def go_on(state, begun, size):  # type: ignore[no-untyped-def]
    """The state of a head that has been begun elsewhere, in place of clear()."""
    floats = carray(pointer(state), (size + 2 * TOTALS + 1,), np.float32)
    there = carray(pointer(begun), (size + 2 * TOTALS + 1,), np.float32)
    for i in range(size + 2 * TOTALS + 1):
        floats[i] = there[i]


@njit
def total_weight(state, size):  # type: ignore[no-untyped-def]
    floats = carray(pointer(state), (size + TOTALS,), np.float32)
    total = np.float32(0)
    for i in range(size, size + TOTALS):
        total += floats[i]
    return total


@intrinsic(prefer_literal=True)
def attend_tile(
    typing_context: Any, size: Any, tile: Any, q_kind: Any, kv_kind: Any, dot: Any,
    q: Any, scale: Any, keys: Any, values: Any, stride: Any, start: Any, stop: Any,
    following: Any, zero: Any, state: Any,
) -> Any:  # fmt: skip
    """One head against the tokens start <= t < stop of a tile, whose K lie at keys + t * stride and V likewise. Updates
    the head's state.

    K of the whole tile is read, and what lies outside [start, stop) forgotten; V is read inside only. The same places
    of the tile that is read next, whose K lie at `following`, are asked for meanwhile: a block is too short for the
    processor to find out by itself where the reading goes on. The literal 0: there is none to ask for. `zero` is 0, but
    the compiler must not know."""
    numbers = tuple(x.literal_value for x in (size, tile, q_kind, kv_kind, dot))
    is_ahead = not (isinstance(following, types.Literal) and following.literal_value == 0)
    places = (types.int64, types.float32, *[types.int64] * 3, types.int32, types.int32, following, *[types.int64] * 2)
    signature = types.void(size, tile, q_kind, kv_kind, dot, *places)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        q, scale, keys, values, stride, start, stop, following, zero, state = arguments[5:]
        form = Tile(builder, *numbers, stride, start, stop, state)
        form.emit(q, scale, keys, values, builder.sub(following, keys) if is_ahead else None, zero)

    return signature, generate


class Tile:
    """Emits the code of one tile."""

    def __init__(
        self, builder: Any, size: int, tile: int, q_kind: int, kv_kind: int, dot: int,
        stride: Any, start: Any, stop: Any, state: Any,
    ) -> None:  # fmt: skip
        self.builder, self.size, self.tile, self.q_kind, self.kv_kind, self.dot = (
            builder, size, tile, q_kind, kv_kind, bool(dot),
        )  # fmt: skip
        self.stride, self.start, self.stop, self.state = stride, start, stop, state
        self.rows, self.tokens = Code(builder, width(size)), Code(builder, tile)
        self.order = order(q_kind, kv_kind, dot)
        self.row_bytes = size * BYTES[kv_kind]
        self.scratch_at = scratch_at(size)

    def emit(self, q: Any, scale: Any, keys: Any, values: Any, ahead: Any, zero: Any) -> None:
        self.ahead, self.zero = ahead, zero
        scores = self.tokens.mul(self._products(q, keys), self.tokens.splat(scale))
        weights, shrink = weigh(self.tokens, [scores], self.start, self.stop, self.state, self.size, self.dot)
        self._add_values(values, weights, shrink)

    def _products(self, q: Any, keys: Any) -> Any:
        """q times each token's K, a lane each."""
        rows, key, partial = self.rows, keys, []
        chunks = range(0, self.size, 2 * rows.lanes)
        if self.dot:
            query = [rows.load(q, rows.words, i * BYTES[BFLOAT16], 2) for i in chunks]
        else:
            query = [
                half for i in chunks for half in rows.load_pair(self.q_kind, self.order, q, i * BYTES[self.q_kind])
            ]
        for _ in range(self.tile):
            total = None
            if self.dot:
                total = rows.splat(0.0)
                for of_q, i in zip(query, chunks, strict=True):
                    total = rows.dot(total, of_q, rows.load(key, rows.words, i * BYTES[BFLOAT16], 2))
            else:
                for of_q, of_k in zip(query, self._row(key), strict=True):
                    total = rows.mul(of_q, of_k) if total is None else rows.fma(of_q, of_k, total)
            partial.append(total)
            key = self._next_row(key)
        return rows.sums(partial)

    def _row(self, address: Any) -> list[Any]:
        """A row of K or V, as float32."""
        rows = self.rows
        chunks = range(0, self.row_bytes, 2 * rows.lanes * BYTES[self.kv_kind])
        return [half for i in chunks for half in rows.load_pair(self.kv_kind, self.order, address, i)]

    def _ask_ahead(self, address: Any) -> None:
        """For what lies in the tile that is read next where this row lies in this one. Not before this row has come: if
        all were asked for at once, the processor would have no room left to await anything else."""
        if self.ahead is not None:
            b = self.builder
            word = b.zext(self.rows.load(address, I16, 0, 1), I64)
            self.rows.prefetch(b.add(b.add(address, self.ahead), b.and_(word, self.zero)), self.row_bytes)

    def _next_row(self, address: Any) -> Any:
        """Asks ahead, and goes on. The compiler would compute all addresses first, and have no registers for them."""
        self._ask_ahead(address)
        return self.rows.opaque(self.builder.add(address, self.stride))

    def _add_values(self, values: Any, weights: Any, shrink: Any) -> None:
        """Every token's V times its weight to the head's sums. A whole tile in one go: a loop's load would tell the
        processor to fetch on at the same stride, into memory that is not read next."""
        b, rows = self.builder, self.rows
        places = range(0, 4 * self.size, 4 * rows.lanes)
        factor = rows.splat(shrink)
        sums = [rows.mul(rows.load(self.state, rows.floats, at), factor) for at in places]
        is_whole = b.icmp_signed("==", b.sub(self.stop, self.start), I32(self.tile))
        whole, part, done = (b.append_basic_block(name) for name in ("whole", "part", "summed"))
        b.cbranch(is_whole, whole, part)

        b.position_at_end(whole)
        of_whole = self._add_whole(values, weights, sums)
        end_of_whole = b.block
        b.branch(done)

        b.position_at_end(part)
        self.tokens.store(weights, self.state, self.scratch_at)
        of_part = self._add_part(values, sums)
        end_of_part = b.block
        b.branch(done)

        b.position_at_end(done)
        results = []
        for one, other in zip(of_whole, of_part, strict=True):
            results.append(b.phi(rows.floats))
            results[-1].add_incoming(one, end_of_whole)
            results[-1].add_incoming(other, end_of_part)
        for result, at in zip(results, places, strict=True):
            rows.store(result, self.state, at)

    def _add_whole(self, values: Any, weights: Any, sums: Sequence[Any]) -> list[Any]:
        rows, value, sums = self.rows, values, list(sums)
        if not self.dot:
            self.tokens.store(weights, self.state, self.scratch_at)
            for token in range(self.tile):
                weight = rows.splat(rows.load(self.state, F32, self.scratch_at + 4 * token))
                sums = [rows.fma(weight, x, total) for x, total in zip(self._row(value), sums, strict=True)]
                value = self._next_row(value)
            return sums
        self.tokens.store_pairs(weights, self.state, self.scratch_at)
        chunks = range(0, self.row_bytes, 2 * rows.lanes * BYTES[BFLOAT16])
        for pair in range(self.tile // 2):
            weight = rows.splat_word(rows.load(self.state, I32, self.scratch_at + 4 * pair))
            one = [rows.load(value, rows.words, at, 2) for at in chunks]
            value = self._next_row(value)
            other = [rows.load(value, rows.words, at, 2) for at in chunks]
            value = self._next_row(value)
            both = [x for pair in zip(one, other, strict=True) for x in rows.interleave(*pair)]
            sums = [rows.dot(total, weight, x) for x, total in zip(both, sums, strict=True)]
        return sums

    def _add_part(self, values: Any, sums: Sequence[Any]) -> list[Any]:
        """A loop over the tokens that count."""
        b, rows = self.builder, self.rows
        entry, loop, after = b.block, b.append_basic_block("values"), b.append_basic_block("added")
        b.branch(loop)  # a tile has at least one token
        b.position_at_end(loop)
        token = b.phi(I32)
        carried = [b.phi(rows.floats) for _ in sums]
        wide = b.sext(token, I64)
        weight = rows.splat(rows.load(b.add(self.state, b.mul(wide, I64(4))), F32, self.scratch_at))
        value = b.add(values, b.mul(wide, self.stride))
        results = [rows.fma(weight, x, total) for x, total in zip(self._row(value), carried, strict=True)]
        self._ask_ahead(value)
        following = b.add(token, I32(1))
        token.add_incoming(self.start, entry)
        token.add_incoming(following, loop)
        for phi, before, result in zip(carried, sums, results, strict=True):
            phi.add_incoming(before, entry)
            phi.add_incoming(result, loop)
        b.cbranch(b.icmp_signed("<", following, self.stop), loop, after)
        b.position_at_end(after)
        return results


def scratch_at(size: int) -> int:
    """Where in a state, in bytes, there is room for the weights of a tile."""
    return 4 * (size + TOTALS)


def weigh(
    tokens: Code, scores: Sequence[Any], start: Any, stop: Any, state: Any, size: int, rounded: bool
) -> list[Any]:
    """The weights of the tokens of one tile or of several, a lane each and 0 outside [start, stop); and at last the
    factor by which what the state has summed up shrinks. Counts them in; the sums of values are left to the caller."""
    b = tokens.builder
    totals_at, top_at = 4 * size, 4 * (size + 2 * TOTALS)
    first, end, lowest = tokens.splat_word(start), tokens.splat_word(stop), tokens.splat(-math.inf)
    places = [tokens.words_of(range(i * tokens.lanes, (i + 1) * tokens.lanes)) for i in range(len(scores))]
    seen = [b.and_(b.icmp_signed(">=", place, first), b.icmp_signed("<", place, end)) for place in places]
    scores = [b.select(which, x, lowest) for which, x in zip(seen, scores, strict=True)]
    before = tokens.load(state, F32, top_at)
    highest = tokens.fold(functools.reduce(tokens.maximum, scores), tokens.maximum)
    top = b.select(b.fcmp_ordered(">", highest, before), highest, before)
    tokens.store(top, state, top_at)
    weights = [tokens.exp2(tokens.sub(x, tokens.splat(top))) for x in scores]
    weights = [b.select(which, x, tokens.splat(0.0)) for which, x in zip(seen, weights, strict=True)]
    if rounded:
        weights = [b.bitcast(tokens.rounded(x), tokens.floats) for x in weights]
    # Before the first tile `before` is -inf, and what is shrunk is 0.
    single = Code(b, 1)
    shrink = b.extract_element(single.exp2(single.splat(b.fsub(before, top))), I32(0))
    totals = tokens.load(state, tokens.floats, totals_at)
    totals = tokens.fma(totals, tokens.splat(shrink), functools.reduce(tokens.add, weights))
    tokens.store(totals, state, totals_at)
    return [*weights, shrink]


def order(q_kind: int, kv_kind: int, dot: int) -> int:
    """In which a head's numbers lie in the vectors of its sums."""
    if dot:
        return SPREAD
    return EVEN_ODD if q_kind == kv_kind == BFLOAT16 else HALVES


@intrinsic(prefer_literal=True)
def finish_head(
    typing_context: Any,
    size: Any,
    q_kind: Any,
    kv_kind: Any,
    dot: Any,
    state: Any,
    factor: Any,
    out: Any,
) -> Any:
    """A head's sums of values, times a factor, to where its result goes."""
    size_, q_kind_, kv_kind_, dot_ = (x.literal_value for x in (size, q_kind, kv_kind, dot))

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows = Code(builder, width(size_))
        state, factor, out = arguments[4:]
        factors = rows.splat(factor)
        for i in range(0, size_, 2 * rows.lanes):
            pair = [rows.mul(rows.load(state, rows.floats, 4 * (i + half * rows.lanes)), factors) for half in (0, 1)]
            rows.store_pair((pair[0], pair[1]), q_kind_, order(q_kind_, kv_kind_, dot_), out, i * BYTES[q_kind_])

    return types.void(size, q_kind, kv_kind, dot, types.int64, types.float32, types.int64), generate
