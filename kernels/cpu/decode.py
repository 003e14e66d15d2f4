"""The decode form of paged attention on a CPU: a compiled loop that reads each block once, in the order in which it
lies in memory, with an online softmax.

A row's context is cut at fixed positions into splits of SPLIT tokens, which are shared out among the threads and merged
afterwards. The cuts depend on nothing but the position, so a row's result depends neither on the batch nor on the
number of threads.

The threads are those of torch's own OpenMP pool. numba's would be a second pool, and each would spin on the other's
cores between its turns. Compilation happens at the first use of an element type and is cached on disk where possible.
"""

# mypy: disable-error-code="call-arg, attr-defined, unreachable, import-untyped"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

SPLIT = 256
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
RAW = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16, torch.float8_e4m3fn: np.uint8}
"""Elements of a pool. numba has no small floats: their patterns travel as integers, whose type says which they are."""

WIDENED = {torch.float8_e4m3fn: 256.0}
"""What `_widen` makes of an element, times this, is its value; 1 where not listed."""


@intrinsic
def _widen(typing_context: Any, x: Any) -> Any:  # noqa: ARG001
    """An element of the pool as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        (value,) = arguments
        if x == types.uint16:
            pattern = builder.shl(builder.zext(value, ir.IntType(32)), ir.IntType(32)(16))
            return builder.bitcast(pattern, ir.FloatType())
        if x == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if x == types.uint8:
            # e4m3's bits, moved, are those of a float16 2^8 times smaller; between them stays a copy of the sign.
            word = ir.IntType(16)
            moved = builder.and_(builder.shl(builder.sext(value, word), word(7)), word(0xBFFF))
            return builder.fpext(builder.bitcast(moved, ir.HalfType()), ir.FloatType())
        return value

    return types.float32(x), generate


@intrinsic
def _power_of_two(typing_context: Any, exponent: Any) -> Any:  # noqa: ARG001
    """2.0 ** exponent as float32, from the bit pattern; exponent is an int32 from -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        (value,) = arguments
        pattern = builder.shl(builder.add(value, ir.IntType(32)(127)), ir.IntType(32)(23))
        return builder.bitcast(pattern, ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


@numba.njit(fastmath=FASTMATH)
def _exp(x):  # type: ignore[no-untyped-def]
    """e ** x for x <= 0 in float32; libm's would not be vectorised."""
    y = max(x * np.float32(math.log2(math.e)), np.float32(-126))
    whole = math.floor(y)
    f = (y - np.float32(whole)) * np.float32(math.log(2))
    p = np.float32(1 / 5040)
    p = p * f + np.float32(1 / 720)
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    return p * _power_of_two(np.int32(whole))


@numba.njit(fastmath=FASTMATH)
def _score(q, pool, at, strides, kv_heads, start, stop, scores):  # type: ignore[no-untyped-def]
    """Products of q [Hq, D] with the keys of one block's tokens start <= t < stop, into scores [Hq, block]."""
    heads, size = q.shape
    group = heads // kv_heads
    for t in range(start, stop):
        for h in range(kv_heads):
            first = at + t * strides[2] + h * strides[3]
            key = pool[first : first + size]
            for head in range(h * group, (h + 1) * group):
                query = q[head]
                score = np.float32(0)
                for d in range(size):
                    score += query[d] * _widen(key[d])
                scores[head, t] = score


@numba.njit(fastmath=FASTMATH)
def _weigh(scores, start, stop, acc, top, total):  # type: ignore[no-untyped-def]
    """Turns the scores of tokens start <= t < stop into weights exp(score - top), after raising top to the highest of
    them and shrinking what was summed before."""
    for head in range(len(scores)):
        row = scores[head, start:stop]
        highest = top[head]
        for t in range(len(row)):
            highest = max(highest, row[t])
        weights = np.float32(0)
        for t in range(len(row)):
            row[t] = _exp(row[t] - highest)
            weights += row[t]
        if highest > top[head]:
            shrink = _exp(top[head] - highest)
            top[head] = highest
            total[head] *= shrink
            for d in range(acc.shape[1]):
                acc[head, d] *= shrink
        total[head] += weights


@numba.njit(fastmath=FASTMATH)
def _add_values(weights, pool, at, strides, kv_heads, start, stop, acc):  # type: ignore[no-untyped-def]
    """Adds the values of one block's tokens start <= t < stop, weighted, to acc [Hq, D]."""
    heads, size = acc.shape
    group = heads // kv_heads
    for t in range(start, stop):
        for h in range(kv_heads):
            first = at + t * strides[2] + h * strides[3]
            value = pool[first : first + size]
            for head in range(h * group, (h + 1) * group):
                weight = weights[head, t]
                sums = acc[head]
                for d in range(size):
                    sums[d] += weight * _widen(value[d])


@numba.njit(fastmath=FASTMATH)
def _attend(q, pool, strides, kv_heads, table, first, last, scores, acc, top, total):  # type: ignore[no-untyped-def]
    """Positions first <= p < last of one row: acc [Hq, D] becomes the sum of the values weighted by exp(score - top),
    total [Hq] the sum of the weights. Scratch: scores [Hq, block]."""
    block_size = scores.shape[1]
    acc[:] = 0
    top[:] = -np.inf
    total[:] = 0
    position = first
    while position < last:
        start = position % block_size
        stop = min(block_size, start + last - position)
        block = table[position // block_size] * strides[0]
        _score(q, pool, block, strides, kv_heads, start, stop, scores)
        _weigh(scores, start, stop, acc, top, total)
        _add_values(scores, pool, block + strides[1], strides, kv_heads, start, stop, acc)
        position += stop - start


@functools.cache
def _region(dtype: torch.dtype) -> Any:
    """The body of the parallel region, run by every thread on the same argument block (see `decode`)."""
    element = RAW[dtype]

    def body(address):  # type: ignore[no-untyped-def]
        arguments = carray(address, (18,), np.int64)
        rows, heads, size, kv_heads, block_size, table_stride, window = arguments[:7]
        strides = arguments[7:11]
        q = carray(_pointer(arguments[11]), (rows, heads, size), np.float32)
        pool = carray(_pointer(arguments[12]), (1 << 60,), element)
        tables = carray(_pointer(arguments[13]), (rows * table_stride,), np.int32)
        lengths = carray(_pointer(arguments[14]), (rows,), np.int32)
        out = carray(_pointer(arguments[15]), (arguments[17], heads, size), np.float32)
        sums = carray(_pointer(arguments[16]), (arguments[17], 2, heads), np.float32)
        everything = np.int64(0)
        for row in range(rows):
            everything += min(lengths[row], window)
        scores = np.empty((heads, block_size), np.float32)
        before = np.int64(0)
        split = 0
        for row in range(rows):
            stop = np.int64(lengths[row])
            first = max(np.int64(0), stop - window)
            table = tables[row * table_stride :]
            while first < stop:
                last = min(stop, (first // SPLIT + 1) * SPLIT)
                if before * _threads() // everything == _thread():
                    _attend(
                        q[row], pool, strides, kv_heads, table, first, last, scores,
                        out[split], sums[split, 0], sums[split, 1],
                    )  # fmt: skip
                before += last - first
                first = last
                split += 1

    signature = types.void(types.voidptr)
    try:
        return numba.cfunc(signature, cache=True, fastmath=FASTMATH)(body)
    except RuntimeError:  # there is no folder where numba could keep a cache
        return numba.cfunc(signature, fastmath=FASTMATH)(body)


@functools.cache
def _parallel() -> Any:
    """The entry of torch's OpenMP runtime, whichever it is; GNU's entry points are the ones that all of them have."""
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        address = ctypes.cast(torch_cpu[name], ctypes.c_void_p).value
        llvmlite.binding.add_symbol(name, address)
    function = torch_cpu["GOMP_parallel"]
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


def check() -> None:
    """Raises if torch's OpenMP has no entry for us (OSError, AttributeError)."""
    _parallel()


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
    rows, heads, size = q.shape
    lengths = np.ascontiguousarray(seq_lens, np.int32)
    visible = int(lengths.max()) if window is None else window
    first = np.maximum(lengths - visible, 0)
    counts = (lengths - 1) // SPLIT - first // SPLIT + 1
    num_splits = int(counts.sum())
    of_k: torch.Tensor | float
    of_v: torch.Tensor | float
    of_k = of_v = WIDENED.get(kv_layer.dtype, 1.0)
    if kv_scales is not None:
        of_k, of_v = kv_scales.repeat_interleave(heads // kv_layer.shape[3], 1)[..., None] * of_k
    scaled = (q.float() * (scale * of_k)).contiguous()
    out = torch.empty((num_splits, heads, size))
    sums = torch.empty((num_splits, 2, heads))
    parallel = _parallel()
    arguments = np.array(
        [
            rows, heads, size, kv_layer.shape[3], kv_layer.shape[2], block_tables.stride(0), visible,
            *kv_layer.stride()[:4],
            scaled.data_ptr(), kv_layer.data_ptr(), block_tables.data_ptr(), lengths.ctypes.data, out.data_ptr(),
            sums.data_ptr(), num_splits,
        ],
        np.int64,
    )  # fmt: skip
    parallel(_region(kv_layer.dtype).address, arguments.ctypes.data, torch.get_num_threads(), 0)
    merged = _merge(out, sums, counts)
    if isinstance(of_v, torch.Tensor) or of_v != 1.0:
        merged *= of_v
    return merged.to(q.dtype)


def _merge(out: torch.Tensor, sums: torch.Tensor, counts: np.ndarray) -> torch.Tensor:
    """[n, Hq, D] and [n, 2, Hq] of the splits -> [B, Hq, D] of the rows."""
    top, total = sums.unbind(1)
    if len(out) == len(counts):
        return out.div_(total[..., None])
    rows = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    index = rows[:, None].expand_as(top)
    highest = torch.full((len(counts), top.shape[1]), -torch.inf).scatter_reduce_(0, index, top, "amax")
    weight = (top - highest[rows]).exp_()
    shape = (len(counts), *out.shape[1:])
    merged = torch.zeros(shape).index_add_(0, rows, out * weight[..., None])
    return merged / torch.zeros_like(highest).index_add_(0, rows, total * weight)[..., None]
