"""A linear layer's product in bfloat16, as fast for few rows as memory gives the weight.

The weight is read as oneDNN lays it out for itself, so that either can multiply with the one copy there is:

    [outputs / 64][inputs / 2][64][2]

The few rows of a decoding step cost what reading the weight costs, and oneDNN reads it at half to two thirds of the
memory's pace. Here a block of 64 outputs is read once, from its beginning to its end; rows are multiplied in groups
whose sums fill the registers, and while the last ones multiply what the cache holds, the next block comes.

Blocks are taken by whichever thread is free: one that the system holds up for a moment does not hold up the others.
Each output is one sum in one order, whatever the number of rows and of threads: rows do not depend on each other.

Measured on two cores with AVX-512, against oneDNN, weights of 768 x 768 to 14336 x 4096: 1.3 to 1.6 times as fast for
one row, 1.2 to 1.4 for 8 to 24, 1.1 for 32, and never slower for hundreds.
"""

# mypy: disable-error-code="call-arg, attr-defined, unreachable, import-untyped, no-untyped-call"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from quire.kernels.cpu import threads
from quire.kernels.cpu.threads import pointer
from quire.kernels.cpu.vector import BFLOAT16, CACHE_LINE, HALVES, I32, I64, Code, features, has_dot

OUTPUTS = 64
"""Of a block."""

LANES = 16

PAIR_BYTES = 4 * OUTPUTS
"""Two inputs of all outputs of a block."""

UNROLLED = 4
"""Pairs of inputs of one turn of the loop."""

LINES = UNROLLED * PAIR_BYTES // CACHE_LINE
"""That one turn reads."""

GROUP = 6
"""Rows that are multiplied at once: 24 vectors of sums and 4 of weights."""

LEAST_OF_SEVERAL = 3
"""Rows that a group has at least where there are several: more than GROUP are shared out evenly."""

AHEAD = 4096
"""Bytes by which the block itself is asked for ahead, where there is one group only."""

ALONE = 1 << 15
"""Elements of a weight up to which the calling thread multiplies alone: waking the others takes longer."""


@intrinsic(prefer_literal=True)
def _multiply(
    typing_context: Any, rows: Any,
    x: Any, stride: Any, weight: Any, pairs: Any, bias: Any, out: Any, out_stride: Any, fetched: Any, lines: Any,
) -> Any:  # fmt: skip
    """`rows` rows of x, `stride` bytes apart, times one block of `pairs` pairs of inputs, plus the block's bias unless
    its address is 0. Meanwhile `lines` cache lines from `fetched` on are asked for in every turn: LINES for so
    few rows that they are the only group, which then need no loop of their own."""
    num_rows, vectors = rows.literal_value, range(OUTPUTS // LANES)

    def generate(_context: Any, b: Any, _signature: Any, arguments: Any) -> Any:
        x, stride, weight, pairs, bias, out, out_stride, fetched, lines = arguments[1:]
        code = Code(b, LANES)
        row_starts = [b.add(x, b.mul(stride, I64(row))) for row in range(num_rows)]
        sums = [[cgutils.alloca_once_value(b, code.splat(0.0)) for _ in vectors] for _ in range(num_rows)]
        with cgutils.for_range(b, b.udiv(pairs, I64(UNROLLED))) as turn:
            first = b.add(fetched, b.mul(turn.index, b.mul(lines, I64(CACHE_LINE))))
            if num_rows < LEAST_OF_SEVERAL:
                code.prefetch(first, LINES * CACHE_LINE)
            else:
                with cgutils.for_range(b, lines) as line:
                    code.prefetch(b.add(first, b.mul(line.index, I64(CACHE_LINE))), CACHE_LINE)
            words_at = b.add(weight, b.mul(turn.index, I64(PAIR_BYTES * UNROLLED)))
            pairs_at = [b.add(start, b.mul(turn.index, I64(4 * UNROLLED))) for start in row_starts]
            for i in range(UNROLLED):
                words = [code.load(words_at, code.words, i * PAIR_BYTES + 4 * LANES * v) for v in vectors]
                for at, of_row in zip(pairs_at, sums, strict=True):
                    pair = code.splat_word(code.load(at, I32, 4 * i, 2))
                    for total, word in zip(of_row, words, strict=True):
                        b.store(code.dot(b.load(total), word, pair), total)
        with b.if_then(b.icmp_signed("!=", bias, I64(0))):
            for v in vectors[::2]:
                both = code.load_pair(BFLOAT16, HALVES, bias, 2 * LANES * v)
                for of_row in sums:
                    for total, of_bias in zip(of_row[v : v + 2], both, strict=True):
                        b.store(code.add(b.load(total), of_bias), total)
        for row, of_row in enumerate(sums):
            place = b.add(out, b.mul(out_stride, I64(row)))
            for v in vectors[::2]:
                pair = b.load(of_row[v]), b.load(of_row[v + 1])
                code.store_pair(pair, BFLOAT16, HALVES, place, 2 * LANES * v)

    return types.void(rows, *[types.int64] * 9), generate


@intrinsic
def _take(typing_context: Any, counter: Any) -> Any:
    """What the int64 at this address holds; it is one more from then on, for all threads."""

    def generate(_context: Any, b: Any, _signature: Any, arguments: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(arguments[0], ir.PointerType(I64)), I64(1), "monotonic")

    return types.int64(types.int64), generate


@functools.cache
def multiply_region() -> int:
    version = threads.version()

    def body(address):  # type: ignore[no-untyped-def]
        a = carray(pointer(address), (10,), np.int64)
        if version == 0:
            return
        rows, pairs, blocks = a[1], a[2], a[3]
        stride, out_stride = a[5], a[9]
        block_bytes = pairs * PAIR_BYTES
        groups = -(-rows // GROUP)
        lines = max(1, LINES // groups)
        of_group = lines * CACHE_LINE * (pairs // UNROLLED)
        block = _take(address)
        while block < blocks:
            following = _take(address)
            weight, following_weight = a[6] + block * block_bytes, a[6] + min(following, blocks - 1) * block_bytes
            bias = a[7] + block * 2 * OUTPUTS if a[7] != 0 else 0
            first = 0
            for group in range(groups):
                end = rows * (group + 1) // groups
                x, out = a[4] + first * stride, a[8] + block * 2 * OUTPUTS + first * out_stride
                count = end - first
                fetched = weight + AHEAD
                if groups > 1:
                    fetched = following_weight + min(group * of_group, block_bytes - of_group)
                if count == 1:
                    _multiply(1, x, stride, weight, pairs, bias, out, out_stride, fetched, lines)
                elif count == 2:
                    _multiply(2, x, stride, weight, pairs, bias, out, out_stride, fetched, lines)
                elif count == 3:
                    _multiply(3, x, stride, weight, pairs, bias, out, out_stride, fetched, lines)
                elif count == 4:
                    _multiply(4, x, stride, weight, pairs, bias, out, out_stride, fetched, lines)
                elif count == 5:
                    _multiply(5, x, stride, weight, pairs, bias, out, out_stride, fetched, lines)
                else:
                    _multiply(6, x, stride, weight, pairs, bias, out, out_stride, fetched, lines)
                first = end
            block = following

    return threads.region(body)


class BlockedWeight:
    """A weight that oneDNN has laid out, and the product with it."""

    def __init__(self, packed: torch.Tensor, outputs: int, inputs: int) -> None:
        self._packed = packed  # kept: an address does not hold its memory
        self._address: int = torch.ops.mkldnn.data_ptr(packed)
        self._outputs, self._inputs = outputs, inputs
        self._region = multiply_region()

    def multiply(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, K] and a bias [N] -> [T, N]; `packed` is the weight that this was made from."""
        assert packed is self._packed and x.dtype == torch.bfloat16
        if x.stride(-1) != 1:
            x = x.contiguous()
        rows, outputs, blocks = len(x), self._outputs, self._outputs // OUTPUTS
        out = threads.empty((rows, outputs), x.dtype)
        arguments = threads.pack(
            0, rows, self._inputs // 2, blocks, x.data_ptr(), 2 * x.stride(0), self._address,
            0 if bias is None else bias.data_ptr(), out.data_ptr(), 2 * outputs,
        )  # fmt: skip
        if rows:
            threads.run(self._region, arguments, 1 if outputs * self._inputs <= ALONE else None, counts=True)
        return out


def blocked(weight: torch.Tensor, packed: torch.Tensor) -> BlockedWeight | None:
    """`packed` is oneDNN's copy of `weight` [N, K]. None where this loop could not read it, or would not be faster: the
    processor multiplies no pairs of bfloat16, or whole tiles of them; the layout is another; there are fewer blocks
    than threads."""
    outputs, inputs = weight.shape
    if not suits_processor() or weight.dtype != torch.bfloat16:
        return None
    if outputs % OUTPUTS or inputs % (2 * UNROLLED) or outputs // OUTPUTS < torch.get_num_threads():
        return None
    if not _is_laid_out(weight, torch.ops.mkldnn.data_ptr(packed)):
        return None
    return BlockedWeight(packed, outputs, inputs)


def suits_processor() -> bool:
    """It multiplies pairs of bfloat16, and not whole tiles of them, and torch tells where oneDNN's copies lie."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "data_ptr")
    return there and has_dot() and not _has_tiles()


def _has_tiles() -> bool:
    return "+amx-bf16" in features()


def _is_laid_out(weight: torch.Tensor, address: int) -> bool:
    """Whether the first and the last block are where they are looked for; nobody promises it."""
    outputs, inputs = weight.shape
    words = weight.data.view(torch.int16)
    for start in (0, outputs - OUTPUTS):
        wanted = words[start : start + OUTPUTS].view(OUTPUTS, inputs // 2, 2).transpose(0, 1).contiguous()
        size = 2 * OUTPUTS * inputs
        if ctypes.string_at(address + 2 * start * inputs, size) != wanted.numpy().tobytes():
            return False
    return True
