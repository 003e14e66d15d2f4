"""The small operations of a layer on a CPU, each in one pass over its rows: residual sum and RMSNorm, rotation and
writing of K and V, gated SiLU. torch makes several passes of each, through memory that the rest of the step needs.

Rounded wherever the separate operations round. Rows are shared out among the threads, and a row's result depends
neither on the rows beside it nor on the number of threads. Compiled at the first use of an element type.
"""

# mypy: disable-error-code="call-arg, attr-defined, unreachable, import-untyped, var-annotated"
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from quire.kernels.cpu import threads
from quire.kernels.cpu.threads import pointer, thread
from quire.kernels.cpu.threads import threads as num_threads

FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
ELEMENTS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}
"""numba has no small floats: their patterns travel as integers, whose type says which they are."""

PARALLEL_ELEMENTS = 1 << 14
"""Work of fewer is done by the calling thread: waking the others takes longer."""


# -- elements


@intrinsic
def _widen(typing_context: Any, x: Any) -> Any:
    """An element as float32."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if x == types.uint16:
            return b.bitcast(b.shl(b.zext(value, ir.IntType(32)), ir.IntType(32)(16)), ir.FloatType())
        if x == types.int16:
            return b.fpext(b.bitcast(value, ir.HalfType()), ir.FloatType())
        return value

    return types.float32(x), generate


@intrinsic
def _narrow(typing_context: Any, x: Any, like: Any) -> Any:
    """float32 rounded to the nearest, ties to even, as an element of the type of `like`; NaN stays NaN."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        if like == types.uint16:
            word = ir.IntType(32)
            bits = b.bitcast(value, word)
            tie = b.and_(b.lshr(bits, word(16)), word(1))
            rounded = b.lshr(b.add(bits, b.add(tie, word(0x7FFF))), word(16))
            kept = b.select(b.fcmp_ordered("ord", value, value), rounded, word(0x7FC0))
            return b.trunc(kept, ir.IntType(16))
        if like == types.int16:
            return b.bitcast(b.fptrunc(value, ir.HalfType()), ir.IntType(16))
        return value

    return like(x, like), generate


@intrinsic
def _power_of_two(typing_context: Any, exponent: Any) -> Any:
    """2.0 ** exponent as float32, from the bit pattern; exponent is an int32 from -126 to 127."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        return b.bitcast(b.shl(b.add(arguments[0], word(127)), word(23)), ir.FloatType())

    return types.float32(types.int32), generate


@njit(fastmath=FASTMATH, error_model="numpy")
def _exp(x):
    """e ** x in float32, saturating at 2 ** -126 and 2 ** 126; libm's would not be vectorised. NaN gives a number."""
    y = x * np.float32(math.log2(math.e))
    y = min(max(y, np.float32(-126)), np.float32(126))
    whole = np.floor(y)
    f = (y - whole) * np.float32(math.log(2))
    p = np.float32(1 / 5040)
    p = p * f + np.float32(1 / 720)
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    return p * _power_of_two(np.int32(whole))


# -- rows


@njit(fastmath=FASTMATH, error_model="numpy")
def _norm_row(x, weight, eps, out):
    """RMSNorm of one row, rounded before the product with its weight."""
    squares = np.float32(0)
    for i in range(len(x)):
        value = _widen(x[i])
        squares += value * value
    factor = np.float32(1) / np.sqrt(squares / np.float32(len(x)) + eps)
    for i in range(len(x)):
        normed = _widen(_narrow(_widen(x[i]) * factor, x[i]))
        out[i] = _narrow(normed * _widen(weight[i]), x[i])


@njit(fastmath=FASTMATH, error_model="numpy")
def _add_row(x, residual, total):
    for i in range(len(x)):
        total[i] = _narrow(_widen(x[i]) + _widen(residual[i]), x[i])


@njit(fastmath=FASTMATH, error_model="numpy")
def _silu_row(gate, up, out):
    for i in range(len(out)):
        x = _widen(gate[i])
        # Where e ** -x saturates, x would still grow.
        bounded = np.float32(-88) if x < np.float32(-88) else x
        activated = _widen(_narrow(bounded / (np.float32(1) + _exp(-bounded)), gate[i]))
        out[i] = _narrow(activated * _widen(up[i]), gate[i])


@njit(error_model="numpy")
def _rotate_head(x, cos_sin, half, out):
    """Pairs (i, i + half) turn, what is left passes. Products are rounded before they are summed, as torch does it and
    the kernel for a GPU: there is no other order, and so all of them agree to the last bit."""
    for i in range(half):
        a, b = _widen(x[i]), _widen(x[i + half])
        cos, sin = cos_sin[i], cos_sin[i + half]
        out[i] = _narrow(a * cos - b * sin, x[i])
        out[i + half] = _narrow(b * cos + a * sin, x[i])
    for i in range(2 * half, len(x)):
        out[i] = x[i]


# -- regions


@functools.cache
def norm_region(dtype: torch.dtype) -> int:
    element, version = ELEMENTS[dtype], threads.version()

    def body(address):
        a = carray(pointer(address), (12,), np.int64)
        if version == 0:
            return
        rows, heads, size = a[0], a[1], a[2]
        eps = carray(pointer(address + 9 * 8), (1,), np.float32)[0]
        weight = carray(pointer(a[8]), (size,), element)
        for row in range(rows * thread() // num_threads(), rows * (thread() + 1) // num_threads()):
            for head in range(heads):
                at = a[3] + row * a[4] + head * a[5]
                x = carray(pointer(at), (size,), element)
                out = carray(pointer(a[6] + (row * heads + head) * a[7]), (size,), element)
                if a[10] != 0:
                    residual = carray(pointer(a[10] + row * a[7]), (size,), element)
                    total = carray(pointer(a[11] + row * a[7]), (size,), element)
                    _add_row(x, residual, total)
                    _norm_row(total, weight, eps, out)
                else:
                    _norm_row(x, weight, eps, out)

    return threads.region(body)


@functools.cache
def embed_region() -> int:
    version = threads.version()

    def body(address):
        a = carray(pointer(address), (6,), np.int64)
        if version == 0:
            return
        count, vocab, size = a[0], a[1], a[2]
        ids = carray(pointer(a[3]), (count,), np.int64)
        for i in range(count * thread() // num_threads(), count * (thread() + 1) // num_threads()):
            out = carray(pointer(a[5] + i * size), (size,), np.uint8)
            exists = 0 <= ids[i] < vocab
            row = carray(pointer(a[4] + (ids[i] if exists else 0) * size), (size,), np.uint8)
            for j in range(size):
                out[j] = row[j] if exists else np.uint8(0)

    return threads.region(body)


@functools.cache
def silu_region(dtype: torch.dtype) -> int:
    element, version = ELEMENTS[dtype], threads.version()

    def body(address):
        a = carray(pointer(address), (6,), np.int64)
        if version == 0:
            return
        rows, size, stride, item = a[0], a[1], a[3], a[5]
        for row in range(rows * thread() // num_threads(), rows * (thread() + 1) // num_threads()):
            gate = carray(pointer(a[2] + row * stride), (size,), element)
            up = carray(pointer(a[2] + row * stride + size * item), (size,), element)
            _silu_row(gate, up, carray(pointer(a[4] + row * size * item), (size,), element))

    return threads.region(body)


@functools.cache
def rotate_region(dtype: torch.dtype) -> int:
    element, version = ELEMENTS[dtype], threads.version()

    def body(address):
        a = carray(pointer(address), (23,), np.int64)
        if version == 0:
            return
        tokens, heads, kv_heads, size, half, item = a[0], a[1], a[2], a[3], a[4], a[5]
        of_token, of_head, block_size = a[7], a[8], a[9]
        eps = carray(pointer(address + 20 * 8), (1,), np.float32)[0]
        slots = carray(pointer(a[15]), (tokens,), np.int64)
        positions = carray(pointer(a[16]), (tokens,), np.int64)
        scratch = np.empty(size, element)
        for token in range(tokens * thread() // num_threads(), tokens * (thread() + 1) // num_threads()):
            angles = carray(pointer(a[17] + positions[token] * 8 * half), (2 * half,), np.float32)
            slot = slots[token]
            written = slot >= 0
            place = a[10] + (slot // block_size) * a[11] + (slot % block_size) * a[13]
            for head in range(heads + 2 * kv_heads):
                x = carray(pointer(a[6] + token * of_token + head * of_head), (size,), element)
                if head < heads:
                    out = carray(pointer(a[21] + (token * heads + head) * size * item), (size,), element)
                    if a[18] != 0:
                        _norm_row(x, carray(pointer(a[18]), (size,), element), eps, scratch)
                        _rotate_head(scratch, angles, half, out)
                    else:
                        _rotate_head(x, angles, half, out)
                elif written and head < heads + kv_heads:
                    out = carray(pointer(place + (head - heads) * a[14]), (size,), element)
                    if a[19] != 0:
                        _norm_row(x, carray(pointer(a[19]), (size,), element), eps, scratch)
                        _rotate_head(scratch, angles, half, out)
                    else:
                        _rotate_head(x, angles, half, out)
                elif written:
                    out = carray(pointer(place + a[12] + (head - heads - kv_heads) * a[14]), (size,), element)
                    for i in range(size):
                        out[i] = x[i]

    return threads.region(body)


def _run(region: int, num_elements: int, *arguments: int) -> None:
    threads.run(region, threads.pack(*arguments), 1 if num_elements < PARALLEL_ELEMENTS else None)


# -- what the doors call


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[T, H] or [T, heads, H], rows may lie apart -> alike, contiguous."""
    out = threads.empty(x.shape, x.dtype)
    if x.dim() not in (2, 3):
        x = x.reshape(-1, x.shape[-1])
    heads = x.shape[1] if x.dim() == 3 else 1
    size, item = x.shape[-1], x.element_size()
    of_head = x.stride(1) * item if x.dim() == 3 else 0
    _run(
        norm_region(x.dtype), x.numel(),
        x.shape[0], heads, size, x.data_ptr(), x.stride(0) * item, of_head, out.data_ptr(), size * item,
        weight.data_ptr(), threads.float_bits(eps), 0, 0,
    )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., H] each; see kernels/norm.py."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = threads.empty(x.shape, x.dtype), threads.empty(x.shape, x.dtype)
    size, count = x.shape[-1], x.numel()
    row_bytes = size * x.element_size()
    _run(
        norm_region(x.dtype), count,
        count // size, 1, size, x.data_ptr(), row_bytes, 0, out.data_ptr(), row_bytes, weight.data_ptr(),
        threads.float_bits(eps), residual.data_ptr(), total.data_ptr(),
    )  # fmt: skip
    return out, total


def embed(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T] int64 and [V, H], contiguous -> [T, H]; ids beyond V give zeros."""
    count, size = len(token_ids), weight.shape[1]
    out = threads.empty((count, size), weight.dtype)
    _run(
        embed_region(), count * size,
        count, weight.shape[0], size * weight.element_size(), token_ids.data_ptr(), weight.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """[T, 2 * I], rows may lie apart -> [T, I]."""
    rows, size = x.shape[0], x.shape[1] // 2
    out = threads.empty((rows, size), x.dtype)
    item = x.element_size()
    _run(silu_region(x.dtype), x.numel(), rows, size, x.data_ptr(), x.stride(0) * item, out.data_ptr(), item)
    return out


def norm_rotate_write(
    qkv: torch.Tensor,  # [T, Hq + 2 * Hkv, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D], of the same type
    slots: torch.Tensor,  # [T] int64
    positions: torch.Tensor,  # [T] int64
    cos_sin: torch.Tensor,  # [P, R] float32
    q_norm: torch.Tensor | None,  # [D]
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:  # [T, Hq, D]
    tokens, all_heads, size = qkv.shape
    kv_heads, item = kv_layer.shape[3], qkv.element_size()
    heads = all_heads - 2 * kv_heads
    out = threads.empty((tokens, heads, size), qkv.dtype)
    slots, positions, cos_sin = slots.contiguous(), positions.contiguous(), cos_sin.contiguous()
    _run(
        rotate_region(qkv.dtype), qkv.numel(),
        tokens, heads, kv_heads, size, cos_sin.shape[1] // 2, item,
        qkv.data_ptr(), qkv.stride(0) * item, qkv.stride(1) * item, kv_layer.shape[2],
        kv_layer.data_ptr(), *(stride * item for stride in kv_layer.stride()[:4]),
        slots.data_ptr(), positions.data_ptr(), cos_sin.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(), 0 if k_norm is None else k_norm.data_ptr(),
        threads.float_bits(eps), out.data_ptr(), 0,
    )  # fmt: skip
    return out
