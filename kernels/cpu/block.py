"""A few rows times one block of 64 outputs of a weight, as vector code: what the loop of blocked_linear.py is made of.

A block holds the weights of two neighbouring inputs side by side, for 64 outputs: [inputs / 2][64][2], bfloat16.

Where the processor multiplies pairs of bfloat16, a word of the block is such a pair, and so is one of a row. Elsewhere
a shift makes a float32 of a word's lower half, a mask of its upper one, and rows are float32. With fewer registers a
block is walked in several passes, of some of its outputs each.

Either way every output is one sum in one order, whatever the number of rows.
"""

# mypy: disable-error-code="call-arg, attr-defined, import-untyped, no-untyped-call"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quire.kernels.cpu.vector import (
    BFLOAT16,
    BYTES,
    CACHE_LINE,
    FLOAT32,
    HALVES,
    I32,
    I64,
    Code,
    features,
    has_dot,
)

OUTPUTS = 64

PAIR_BYTES = 4 * OUTPUTS
"""Two inputs of all outputs of a block."""

UNROLLED = 4
"""Pairs of inputs of one turn of the loop."""

LINES = UNROLLED * PAIR_BYTES // CACHE_LINE
"""That one turn reads."""

GROUP = 6
"""Rows that are multiplied at once, at most."""

WIDE_LANES = 16

LANES = WIDE_LANES if "+avx512f" in features() else WIDE_LANES // 2
SUMS = 24 if WIDE_LANES == LANES else 12
"""Vectors of sums that registers hold, beside those of weights and of a row."""

ROW_KIND = BFLOAT16 if has_dot() else FLOAT32
"""Of the rows that are multiplied."""


def suits_processor() -> bool:
    """It multiplies vectors, and not whole tiles of bfloat16: those are oneDNN's."""
    return (has_dot() or {"+avx2", "+fma"} <= features()) and "+amx-bf16" not in features()


def passes(rows: int) -> int:
    """In which a block is walked for so many rows."""
    vectors = OUTPUTS // LANES
    count = 1
    while rows * (vectors // count) > SUMS:
        count *= 2
    return count


ROWS_OF_ONE_PASS = max(rows for rows in range(1, GROUP + 1) if passes(rows) == 1)


@intrinsic(prefer_literal=True)
def multiply_block(
    typing_context: Any, rows: Any,
    x: Any, stride: Any, weight: Any, pairs: Any, bias: Any, out: Any, out_stride: Any, fetched: Any, lines: Any,
) -> Any:  # fmt: skip
    """`rows` rows of x, `stride` bytes apart, times one block of `pairs` pairs of inputs, plus the block's bias unless
    its address is 0. Meanwhile `lines` cache lines for each turn of the block, from `fetched` on, are asked for: LINES
    for one row or two in one pass, which then need no loop of their own."""
    num_rows = rows.literal_value

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x, stride, weight, pairs, bias, out, out_stride, fetched, lines = arguments[1:]
        b, code, count = builder, Code(builder, LANES), passes(num_rows)
        vectors = OUTPUTS // LANES // count
        starts = [b.add(x, b.mul(stride, I64(row))) for row in range(num_rows)]
        places = [b.add(out, b.mul(out_stride, I64(row))) for row in range(num_rows)]
        turns = b.udiv(pairs, I64(UNROLLED))
        few = b.udiv(lines, I64(count))
        each = b.select(b.icmp_unsigned(">", few, I64(0)), few, I64(1))
        sums = [[cgutils.alloca_once(b, code.floats) for _ in range(vectors)] for _ in range(num_rows)]
        with cgutils.for_range(b, I64(count)) as walk:
            for of_row in sums:
                for total in of_row:
                    b.store(code.splat(0.0), total)
            here = b.add(weight, b.mul(walk.index, I64(PAIR_BYTES // count)))
            done = b.mul(walk.index, each)
            asked = b.select(b.icmp_unsigned("<", done, lines), each, I64(0))
            ahead = b.add(fetched, b.mul(b.mul(done, turns), I64(CACHE_LINE)))
            with cgutils.for_range(b, turns) as turn:
                if num_rows < 3 and count == 1:
                    code.prefetch(b.add(ahead, b.mul(turn.index, I64(LINES * CACHE_LINE))), LINES * CACHE_LINE)
                else:
                    first = b.add(ahead, b.mul(turn.index, b.mul(asked, I64(CACHE_LINE))))
                    with cgutils.for_range(b, asked) as line:
                        code.prefetch(b.add(first, b.mul(line.index, I64(CACHE_LINE))), CACHE_LINE)
                words_at = b.add(here, b.mul(turn.index, I64(PAIR_BYTES * UNROLLED)))
                rows_at = [b.add(at, b.mul(turn.index, I64(2 * BYTES[ROW_KIND] * UNROLLED))) for at in starts]
                for i in range(UNROLLED):
                    words = [code.load(words_at, code.words, i * PAIR_BYTES + 4 * LANES * v) for v in range(vectors)]
                    _add_products(code, words, rows_at, 2 * BYTES[ROW_KIND] * i, sums)
            of_pass = b.mul(walk.index, I64(2 * OUTPUTS // count))
            with b.if_then(b.icmp_signed("!=", bias, I64(0))):
                for v in range(0, vectors, 2):
                    both = code.load_pair(BFLOAT16, HALVES, b.add(bias, of_pass), 2 * LANES * v)
                    for of_row in sums:
                        for total, of_bias in zip(of_row[v : v + 2], both, strict=True):
                            b.store(code.add(b.load(total), of_bias), total)
            for place, of_row in zip(places, sums, strict=True):
                for v in range(0, vectors, 2):
                    pair = b.load(of_row[v]), b.load(of_row[v + 1])
                    code.store_pair(pair, BFLOAT16, HALVES, b.add(place, of_pass), 2 * LANES * v)

    return types.void(rows, *[types.int64] * 9), generate


def _add_products(code: Code, words: list[Any], rows_at: list[Any], offset: int, sums: list[list[Any]]) -> None:
    """Of a pair of inputs, to all rows' sums."""
    b = code.builder
    if has_dot():
        for at, of_row in zip(rows_at, sums, strict=True):
            pair = code.splat_word(code.load(at, I32, offset, 2))
            for total, word in zip(of_row, words, strict=True):
                b.store(code.dot(b.load(total), word, pair), total)
        return
    for half in (0, 1):
        weights = [code.widened(word, half) for word in words]
        for at, of_row in zip(rows_at, sums, strict=True):
            x = code.splat(code.load(at, ir.FloatType(), offset + half * BYTES[FLOAT32]))
            for total, weight in zip(of_row, weights, strict=True):
                b.store(code.fma(x, weight, b.load(total)), total)
