"""From the fused projection to attention in one kernel: heads are normed and rotated, K and V written to their slots.

A program takes some heads of one token, all of them queries, keys or values. A head's two rotating halves are tensors
of their own, so that a pair sits in one thread and memory is read and written 16 bytes at a time.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from quire.kernels.gpu.device import Device, Variant, device_for
from quire.kernels.gpu.float8 import encode_e4m3

PROGRAM_THREADS = 64
THREAD_VALUES = 16
"""Two loads of 16 bytes, for 16-bit types."""


@triton.jit
def _columns(zero, START: tl.constexpr, COUNT: tl.constexpr):
    """[HEADS, a power of two] int32: START, START + 1, ...; and which of them are among the COUNT that are meant.

    Broadcast by hand, so that every thread loads what it needs of a weight or of a table, and nothing is passed on
    through shared memory.
    """
    index = zero + tl.arange(0, triton.next_power_of_2(COUNT))[None, :]
    return START + index, index < COUNT


@triton.jit
def _normed(x, factor, weight, dtype: tl.constexpr):
    """float32 -> float32; rounded to `dtype` before the product with the weight, and after."""
    return ((x * factor).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _store(target, value, mask, inverse_scale, FLOAT8: tl.constexpr):
    if FLOAT8:
        wide = value.to(tl.float32)
        if inverse_scale is not None:
            wide *= inverse_scale
        tl.store(target, encode_e4m3(wide), mask=mask)
    else:
        tl.store(target, value, mask=mask)


@triton.jit
def norm_rotate_write_kernel(
    qkv,
    q_out,
    kv_layer,
    slots,
    positions,
    cos_sin,
    q_norm,
    k_norm,
    kv_scales,
    eps,
    token_stride,  # of qkv
    head_stride,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,  # 0: not rotary
    INTERLEAVED: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,  # of kv_layer
    KV_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    POOL_HEAD_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,  # of one program
):
    Q_PARTS: tl.constexpr = (HQ + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (HKV + HEADS - 1) // HEADS
    PARTS: tl.constexpr = Q_PARTS + 2 * KV_PARTS
    HALF: tl.constexpr = R // 2
    dtype: tl.constexpr = qkv.dtype.element_ty
    # Neighbouring programs take neighbouring heads.
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    is_q = part < Q_PARTS
    is_v = part >= Q_PARTS + KV_PARTS

    # What does not hang on another load is loaded first.
    index = tl.arange(0, HEADS)[:, None]
    head = (part - tl.where(is_q, 0, tl.where(is_v, Q_PARTS + KV_PARTS, Q_PARTS))) * HEADS + index
    inside = index >= 0
    if HQ % HEADS != 0 or HKV % HEADS != 0:
        inside = head < tl.where(is_q, HQ, HKV)
    row = head + tl.where(is_q, 0, tl.where(is_v, HQ + HKV, HQ))
    source = qkv + token * token_stride + row * head_stride
    zero = index * 0
    if R > 0:
        # One tensor of all columns that turn where pairs are neighbours, else one of each half.
        low_at, low_mask = _columns(zero, 0, R if INTERLEAVED else HALF)
        low_mask &= inside
        low = tl.load(source + low_at, mask=low_mask, other=0.0)
        if not INTERLEAVED:
            high = tl.load(source + low_at + HALF, mask=low_mask, other=0.0)
    if R < D:
        rest_at, rest_mask = _columns(zero, R, D - R)
        rest_mask &= inside
        rest = tl.load(source + rest_at, mask=rest_mask, other=0.0)

    if (R > 0 or q_norm is not None) and not is_v:
        if R > 0:
            pair, pair_mask = _columns(zero, 0, HALF)
            table = cos_sin + tl.load(positions + token) * R + pair
            cos = tl.load(table, mask=pair_mask, other=0.0)
            sin = tl.load(table + HALF, mask=pair_mask, other=0.0)
            if INTERLEAVED:
                a, b = tl.split(tl.reshape(low.to(tl.float32), (HEADS, low.shape[1] // 2, 2)))
            else:
                a, b = low.to(tl.float32), high.to(tl.float32)
        if q_norm is not None:
            weight = q_norm
            if not is_q:
                weight = k_norm
            squares = zero.to(tl.float32)
            if R > 0:
                squares += tl.sum(a * a + b * b, axis=1, keep_dims=True)
            if R < D:
                wide = rest.to(tl.float32)
                squares += tl.sum(wide * wide, axis=1, keep_dims=True)
            factor = tl.rsqrt(squares * (1.0 / D) + eps)
            if R > 0:
                a_at = 2 * pair if INTERLEAVED else pair
                b_at = a_at + (1 if INTERLEAVED else HALF)
                a = _normed(a, factor, tl.load(weight + a_at, mask=pair_mask, other=0.0), dtype)
                b = _normed(b, factor, tl.load(weight + b_at, mask=pair_mask, other=0.0), dtype)
            if R < D:
                rest = _normed(wide, factor, tl.load(weight + rest_at, mask=rest_mask, other=0.0), dtype).to(dtype)
        if R > 0:
            turned_a = (a * cos - b * sin).to(dtype)
            turned_b = (b * cos + a * sin).to(dtype)
            if INTERLEAVED:
                low = tl.interleave(turned_a, turned_b)
            else:
                low, high = turned_a, turned_b

    if is_q:
        q_target = q_out + (token * HQ + head) * D
        if R > 0:
            tl.store(q_target + low_at, low, mask=low_mask)
            if not INTERLEAVED:
                tl.store(q_target + low_at + HALF, high, mask=low_mask)
        if R < D:
            tl.store(q_target + rest_at, rest, mask=rest_mask)
    else:
        slot = tl.load(slots + token)
        kind = is_v.to(tl.int32)
        inverse_scale = None
        if kv_scales is not None:
            inverse_scale = tl.div_rn(1.0, tl.load(kv_scales + kind * HKV + head, mask=inside, other=1.0))
        target = kv_layer + slot // BLOCK_SIZE * BLOCK_STRIDE + slot % BLOCK_SIZE * SLOT_STRIDE
        target += kind * KV_STRIDE + head * POOL_HEAD_STRIDE
        if R > 0:
            low_mask &= slot >= 0
            _store(target + low_at, low, low_mask, inverse_scale, FLOAT8)
            if not INTERLEAVED:
                _store(target + low_at + HALF, high, low_mask, inverse_scale, FLOAT8)
        if R < D:
            _store(target + rest_at, rest, rest_mask & (slot >= 0), inverse_scale, FLOAT8)


def heads_of_program(size: int, rotating: int) -> int:
    """For heads of `size` values, of which the first `rotating` turn."""
    width = triton.next_power_of_2(rotating) if rotating else 0
    width += triton.next_power_of_2(size - rotating) if rotating < size else 0
    return 1 << max(0, (PROGRAM_THREADS * THREAD_VALUES // width).bit_length() - 1)


def norm_rotate_write(
    qkv: torch.Tensor,  # [T, Hq + 2 * Hkv, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    slots: torch.Tensor,  # [T] int64
    positions: torch.Tensor,  # [T] int64
    cos_sin: torch.Tensor | None = None,  # [P, R] float32
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None,  # [D]
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    kv_scales: torch.Tensor | None = None,  # [2, Hkv] float32
) -> torch.Tensor:  # q [T, Hq, D]
    """Products and sums are not fused into one rounding, so that the rotation is bit for bit that of the torch form."""
    num_tokens, num_heads, size = qkv.shape
    block_size, num_kv_heads = kv_layer.shape[2:4]
    num_q_heads = num_heads - 2 * num_kv_heads
    float8 = kv_layer.dtype == torch.float8_e4m3fn
    assert float8 or (kv_layer.dtype == qkv.dtype and kv_scales is None)
    assert qkv.stride(2) == kv_layer.stride(4) == 1
    assert slots.dtype == torch.int64 and slots.is_contiguous() and positions.is_contiguous()
    assert (q_norm is None) == (k_norm is None)
    assert all(x is None or x.is_contiguous() for x in (cos_sin, q_norm, k_norm, kv_scales))
    q = torch.empty(num_tokens, num_q_heads, size, dtype=qkv.dtype, device=qkv.device)
    if not num_tokens:
        return q
    rotating = 0 if cos_sin is None else cos_sin.shape[1]
    heads = heads_of_program(size, rotating)
    parts = triton.cdiv(num_q_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
    block_stride, kv_stride, slot_stride, pool_head_stride, _ = kv_layer.stride()
    norm_rotate_write_kernel[(num_tokens * parts,)](
        qkv,
        q,
        kv_layer.view(torch.uint8) if float8 else kv_layer,
        slots,
        positions,
        cos_sin,
        q_norm,
        k_norm,
        kv_scales,
        eps,
        qkv.stride(0),
        qkv.stride(1),
        HQ=num_q_heads,
        HKV=num_kv_heads,
        D=size,
        R=rotating,
        INTERLEAVED=interleaved,
        FLOAT8=float8,
        BLOCK_SIZE=block_size,
        BLOCK_STRIDE=block_stride,
        KV_STRIDE=kv_stride,
        SLOT_STRIDE=slot_stride,
        POOL_HEAD_STRIDE=pool_head_stride,
        HEADS=heads,
        num_warps=PROGRAM_THREADS // device_for(qkv).warp_size,
        enable_fp_fusion=False,
    )
    return q


def variants(device: Device) -> list[Variant]:
    return [
        _variant(device, "Llama 8B", 32, 8, 128),
        _variant(device, "Llama 8B, float8 pool", 32, 8, 128, float8=True),
        _variant(device, "Qwen3, heads normed", 16, 8, 128, normed=True),
        _variant(device, "OPT, not rotary", 40, 40, 128, rotating=0),
        _variant(device, "interleaved, a quarter turns", 16, 16, 256, rotating=64, interleaved=True),
    ]


def _variant(
    device: Device,
    name: str,
    num_q_heads: int,
    num_kv_heads: int,
    size: int,
    rotating: int | None = None,
    interleaved: bool = False,
    normed: bool = False,
    float8: bool = False,
) -> Variant:
    """32 layers, blocks of 16 tokens, bfloat16."""
    rotating = size if rotating is None else rotating
    slot_stride = num_kv_heads * size
    weight = torch.bfloat16 if normed else None
    arguments = {
        "qkv": torch.bfloat16,
        "q_out": torch.bfloat16,
        "kv_layer": torch.uint8 if float8 else torch.bfloat16,
        "slots": torch.int64,
        "positions": torch.int64,
        "cos_sin": torch.float32 if rotating else None,
        "q_norm": weight,
        "k_norm": weight,
        "kv_scales": torch.float32 if float8 else None,
        "eps": 1e-6,
        "token_stride": (num_q_heads + 2 * num_kv_heads) * size,
        "head_stride": size,
        "HQ": num_q_heads,
        "HKV": num_kv_heads,
        "D": size,
        "R": rotating,
        "INTERLEAVED": interleaved,
        "FLOAT8": float8,
        "BLOCK_SIZE": 16,
        "BLOCK_STRIDE": 32 * 2 * 16 * slot_stride,
        "KV_STRIDE": 16 * slot_stride,
        "SLOT_STRIDE": slot_stride,
        "POOL_HEAD_STRIDE": size,
        "HEADS": heads_of_program(size, rotating),
    }
    return Variant(
        f"norm_rotate_write: {name}",
        norm_rotate_write_kernel,
        arguments,
        num_warps=PROGRAM_THREADS // device.warp_size,
        hot=True,
    )
