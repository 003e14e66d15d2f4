"""Vector instructions that numba's loops are built from, where what LLVM finds by itself is several times slower.

Written as LLVM IR, which LLVM fits to the processor at hand. Vectors are float32; what lies in memory is widened on
its way in and rounded to nearest even on its way out. A head or a row of D numbers is walked in pairs of vectors of
`width(D)` lanes, which hold 2 * lanes neighbours in one of three orders. Everything that works on such pairs keeps to
their order, so that nothing ever needs to be sorted.

An address is an int64. A type is told by an integer, one of those of `KINDS`, so that numba takes it for a constant.
"""

# mypy: disable-error-code="import-untyped, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
import torch
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

FLOAT32, FLOAT16, BFLOAT16, FLOAT8 = range(4)
KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.float8_e4m3fn: FLOAT8}
BYTES = {FLOAT32: 4, FLOAT16: 2, BFLOAT16: 2, FLOAT8: 1}
WIDENED = {FLOAT8: 256.0}
"""What loading makes of an element, times this, is its value; 1 where not listed."""

HALVES, EVEN_ODD, SPREAD = range(3)
"""Which of its elements the first vector of a pair holds, the second the others: the first half; the even ones, which a
shift makes of a load of bfloat16, as a mask the odd ones; of every eight the first four, as processors interleave."""

MAX_LANES = 16
CACHE_LINE = 64
TO_SECOND_LEVEL = 2
"""Where to fetch ahead to: into the first level, more is asked for than it can await."""

FAST = ("contract", "nsz")
"""Products and sums may become one instruction. Nothing is reordered: a row's result is the same in every loop."""

LOG2E = 1.4426950408889634
EXP2 = (1.0, 0.6931471825, 0.2402265072, 0.0555036440, 0.0096181169, 0.0013339092, 0.0001546876)
"""2 ** f for |f| <= 1/2, to float32's precision."""

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()

Pair = tuple[Any, Any]


class _Bfloat(ir.Type):  # type: ignore[misc]
    """LLVM's name for the type, which llvmlite lacks."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


@functools.cache
def features() -> frozenset[str]:
    """Of the processor that numba compiles for, as LLVM names them: "+avx512bf16"."""
    return frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))


@functools.cache
def has_dot() -> bool:
    """Whether the processor that numba compiles for multiplies pairs of bfloat16, and LLVM knows the instruction by the
    types of today."""
    known = {"+avx512bf16", "+avx512vl"} <= features()
    return known and llvmlite.binding.llvm_version_info[0] >= 17


def width(size: int) -> int:
    """Lanes of the vectors that a row of `size` numbers, an even number, is walked in."""
    lanes = MAX_LANES
    while size % (2 * lanes):
        lanes //= 2
    return lanes


class Code:
    """Emits vector instructions of `lanes` lanes at a place in a function."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder = builder
        self.lanes = lanes
        self.floats = ir.VectorType(F32, lanes)
        self.words = ir.VectorType(I32, lanes)
        self.halves = ir.VectorType(I16, lanes)

    # -- memory

    def pointer(self, address: Any, offset: int = 0) -> Any:
        if offset:
            address = self.builder.add(address, I64(offset))
        return self.builder.inttoptr(address, ir.PointerType())

    def load(self, address: Any, kind: ir.Type, offset: int = 0, align: int = 4) -> Any:
        return self.builder.load(self.pointer(address, offset), align=align, typ=kind)

    def store(self, value: Any, address: Any, offset: int = 0, align: int = 4) -> None:
        self.builder.store(value, self.pointer(address, offset), align=align)

    def prefetch(self, address: Any, num_bytes: int) -> None:
        """Asks for the cache lines of `num_bytes` from an address on."""
        b = self.builder
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), I32, I32, I32])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        for offset in range(0, num_bytes, CACHE_LINE):
            b.call(function, [self.pointer(address, offset), I32(0), I32(TO_SECOND_LEVEL), I32(1)])

    def opaque(self, address: Any) -> Any:
        """The address, of which the compiler then knows nothing; it moves no reading or writing across this place. Not
        an instruction."""
        return self.builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0,~{memory}", [address], True)

    def load_pair(self, kind: int, order: int, address: Any, offset: int) -> Pair:
        """2 * lanes elements."""
        b, lanes = self.builder, self.lanes
        if order == HALVES:
            return self._load_half(kind, address, offset), self._load_half(kind, address, offset + lanes * BYTES[kind])
        assert kind == BFLOAT16
        words = self.load(address, self.words, offset, align=2)
        if order == SPREAD:
            first, second = self.interleave(ir.Constant(self.words, None), words)
            return b.bitcast(first, self.floats), b.bitcast(second, self.floats)
        return self.widened(words, 0), self.widened(words, 1)

    def widened(self, words: Any, half: int) -> Any:
        """Of words of two bfloat16 each, the lower ones (half 0) or the upper ones, as float32."""
        b = self.builder
        bits = b.and_(words, self._splat_word(0xFFFF0000)) if half else b.shl(words, self._splat_word(16))
        return b.bitcast(bits, self.floats)

    def interleave(self, low: Any, high: Any) -> Pair:
        """Words of 2 * lanes elements each -> words whose lower halves are those of `low`, and the upper those of
        `high`, in the order SPREAD."""
        b, both = self.builder, ir.VectorType(I16, 2 * self.lanes)
        low, high = b.bitcast(low, both), b.bitcast(high, both)
        parts = (self._spread(half) for half in (0, 1))
        mixed = ([x for i in part for x in (i, 2 * self.lanes + i)] for part in parts)
        first, second = (b.bitcast(b.shuffle_vector(low, high, self._indices(x)), self.words) for x in mixed)
        return first, second

    def _spread(self, half: int) -> list[int]:
        return [i for i in range(2 * self.lanes) if i // 4 % 2 == half]

    def _load_half(self, kind: int, address: Any, offset: int) -> Any:
        b = self.builder
        if kind == FLOAT32:
            return self.load(address, self.floats, offset)
        if kind == FLOAT16:
            return b.fpext(self.load(address, ir.VectorType(ir.HalfType(), self.lanes), offset, 2), self.floats)
        if kind == BFLOAT16:
            words = b.zext(self.load(address, self.halves, offset, 2), self.words)
            return b.bitcast(b.shl(words, self._splat_word(16)), self.floats)
        # e4m3's bits, moved, are those of a float16 2^8 times smaller; between them stays a copy of the sign.
        wide = b.sext(self.load(address, ir.VectorType(ir.IntType(8), self.lanes), offset, 1), self.halves)
        moved = b.and_(b.shl(wide, self._splat(I16, 7)), self._splat(I16, 0xBFFF))
        return b.fpext(b.bitcast(moved, ir.VectorType(ir.HalfType(), self.lanes)), self.floats)

    def store_pair(self, pair: Pair, kind: int, order: int, address: Any, offset: int) -> None:
        """Undoes load_pair, with rounding."""
        b, lanes = self.builder, self.lanes
        if order != HALVES:
            assert kind == BFLOAT16
            first, second = (self.rounded(half) for half in pair)
            packed = b.or_(b.lshr(first, self._splat_word(16)), second)
            if order == SPREAD:
                both = b.bitcast(packed, ir.VectorType(I16, 2 * lanes))
                packed = b.shuffle_vector(both, both, self._indices(self._gathered()))
            self.store(packed, address, offset, align=2)
            return
        for i, half in enumerate(pair):
            at = offset + i * lanes * BYTES[kind]
            if kind == FLOAT32:
                self.store(half, address, at)
            elif kind == FLOAT16:
                self.store(b.fptrunc(half, ir.VectorType(ir.HalfType(), lanes)), address, at, align=2)
            else:
                assert kind == BFLOAT16
                rounded = b.lshr(self.rounded(half), self._splat_word(16))
                self.store(b.trunc(rounded, self.halves), address, at, align=2)

    def _gathered(self) -> list[int]:
        """Where the elements lie, in their order, if those of the first vector of a SPREAD pair are the lower halves of
        words, and those of the second the upper."""
        places = {place: 2 * i + half for half in (0, 1) for i, place in enumerate(self._spread(half))}
        return [places[i] for i in range(2 * self.lanes)]

    def store_pairs(self, x: Any, address: Any, offset: int) -> None:
        """Floats that are bfloat16 already, two to a word, the first in its lower half."""
        b = self.builder
        halves = b.bitcast(x, ir.VectorType(I16, 2 * self.lanes))
        upper = self._indices(range(1, 2 * self.lanes, 2))
        self.store(b.shuffle_vector(halves, halves, upper), address, offset)

    def rounded(self, x: Any) -> Any:
        """Words: x as bfloat16 in their upper halves, and 0; NaN stays NaN."""
        b = self.builder
        bits = b.bitcast(x, self.words)
        tie = b.and_(b.lshr(bits, self._splat_word(16)), self._splat_word(1))
        rounded = b.add(bits, b.add(tie, self._splat_word(0x7FFF)))
        is_number = b.fcmp_ordered("ord", x, x)
        kept = b.and_(rounded, self._splat_word(0xFFFF0000))
        return b.select(is_number, kept, self._splat_word(0x7FC00000))

    # -- arithmetic

    def splat(self, value: Any) -> Any:
        """A scalar float, or a number of ours, in every lane."""
        if isinstance(value, (int, float)):
            return ir.Constant(self.floats, [ir.Constant(F32, float(value))] * self.lanes)
        b = self.builder
        single = b.insert_element(ir.Constant(self.floats, ir.Undefined), value, I32(0))
        return b.shuffle_vector(single, ir.Constant(self.floats, ir.Undefined), self._indices([0] * self.lanes))

    def splat_word(self, value: Any) -> Any:
        """An int32 in every lane."""
        b = self.builder
        undefined = ir.Constant(self.words, ir.Undefined)
        return b.shuffle_vector(b.insert_element(undefined, value, I32(0)), undefined, self._indices([0] * self.lanes))

    def words_of(self, values: Sequence[int] | range) -> Any:
        """A constant int32 for each lane."""
        return self._indices(values)

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=FAST)

    def sub(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b)

    def mul(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=FAST)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        kind = ir.FunctionType(self.floats, [self.floats] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fma.v{self.lanes}f32")
        return self.builder.call(function, [a, b, c])

    def dot(self, total: Any, a: Any, b: Any) -> Any:
        """Of words of two bfloat16: total + the products of the lower halves + those of the upper. Needs has_dot()."""
        pairs = ir.VectorType(_Bfloat(), 2 * self.lanes)
        kind = ir.FunctionType(self.floats, [self.floats, pairs, pairs])
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [total, *(self.builder.bitcast(x, pairs) for x in (a, b))])

    def maximum(self, a: Any, b: Any) -> Any:
        """The greater; b where a is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def exp2(self, x: Any) -> Any:
        """2 ** x for x <= 0; below 2 ** -126 it stays there. NaN stays NaN."""
        b = self.builder
        lowest = self.splat(-126.0)
        x = b.select(b.fcmp_ordered("<", x, lowest), lowest, x)
        # Added to 1.5 * 2^23, a number leaves its nearest integer in the lowest bits.
        magic = self.splat(12582912.0)
        shifted = b.fadd(x, magic)
        f = b.fsub(x, b.fsub(shifted, magic))
        result = self.splat(EXP2[-1])
        for coefficient in reversed(EXP2[:-1]):
            result = self.fma(result, f, self.splat(coefficient))
        exponent = b.shl(b.add(b.bitcast(shifted, self.words), self._splat_word(127)), self._splat_word(23))
        return self.mul(result, b.bitcast(exponent, self.floats))

    # -- across lanes

    def fold(self, x: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """All lanes of x combined, as a scalar: its halves first."""
        b, lanes = self.builder, self.lanes
        while lanes > 1:
            lanes //= 2
            low, high = (b.shuffle_vector(x, x, self._indices(range(i * lanes, (i + 1) * lanes))) for i in (0, 1))
            x = combine(low, high)
        return b.extract_element(x, I32(0))

    def sums(self, vectors: Sequence[Any]) -> Any:
        """The sum of the lanes of each of n vectors (n a power of two), as one vector of n lanes."""
        b, count, lanes = self.builder, len(vectors), self.lanes
        if count > lanes:
            parts = [self.sums(vectors[i : i + lanes]) for i in range(0, count, lanes)]
            while len(parts) > 1:
                joined = self._indices(range(2 * (count // len(parts))))
                parts = [b.shuffle_vector(parts[i], parts[i + 1], joined) for i in range(0, len(parts), 2)]
            return parts[0]
        rest = list(vectors)
        while lanes > count:  # the upper half of each onto the lower
            lanes //= 2
            halves = [self._indices(range(i * lanes, (i + 1) * lanes)) for i in (0, 1)]
            rest = [self.add(*(b.shuffle_vector(x, x, half) for half in halves)) for x in rest]
        while len(rest) > 1:  # neighbours of two vectors, side by side
            steps = [self._indices(range(i, 2 * lanes, 2)) for i in (0, 1)]
            rest = [
                self.add(*(b.shuffle_vector(rest[i], rest[i + 1], step) for step in steps))
                for i in range(0, len(rest), 2)
            ]
        return rest[0]

    # -- constants

    def _splat(self, kind: ir.Type, value: int) -> Any:
        return ir.Constant(ir.VectorType(kind, self.lanes), [ir.Constant(kind, value)] * self.lanes)

    def _splat_word(self, value: int) -> Any:
        return self._splat(I32, value)

    def _indices(self, values: Sequence[int] | range) -> Any:
        return ir.Constant(ir.VectorType(I32, len(values)), [ir.Constant(I32, value) for value in values])
