"""The MLP's activations, one element at a time: gated ones with their product in the same pass."""
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl

from quire.kernels.gpu.device import Device, Variant, device_for

THREAD_VALUES = 8
"""One load of 16 bytes of a 16-bit type."""

LOG2E = tl.constexpr(math.log2(math.e))
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
TANH_INNER = tl.constexpr(2 * math.sqrt(2 / math.pi) * math.log2(math.e))
"""2 * sqrt(2 / pi), for powers of two instead of e."""


@triton.jit
def silu_and_mul_kernel(
    x,  # [T, 2 * SIZE]
    out,  # [T, SIZE], contiguous
    stride,  # of x's rows
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < SIZE
    source = x + row * stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp2(-gate * LOG2E))).to(out.dtype.element_ty)
    tl.store(out + row * SIZE + column, (activated.to(tl.float32) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def activation_kernel(
    x,  # [T, SIZE]
    out,  # [T, SIZE], contiguous
    stride,  # of x's rows
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < SIZE
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if KIND == "gelu":
        result = 0.5 * value * (1.0 + tl.math.erf(value * SQRT_HALF))
    elif KIND == "gelu_tanh":
        # (1 + tanh u) / 2 is 1 / (1 + e^-2u), which loses nothing where tanh comes near -1.
        inner = TANH_INNER * (value + 0.044715 * value * value * value)
        result = value / (1.0 + tl.exp2(-inner))
    else:
        # Not a maximum: NaN stays NaN.
        result = tl.where(value <= 0.0, 0.0, value)
    tl.store(out + row * SIZE + column, result.to(out.dtype.element_ty), mask=inside)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    assert x.stride(1) == 1
    size = x.shape[1] // 2
    out = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
    if out.numel():
        warps, columns = program(device_for(x), size)
        grid = (len(x), triton.cdiv(size, columns))
        silu_and_mul_kernel[grid](x, out, x.stride(0), SIZE=size, COLUMNS=columns, num_warps=warps)
    return out


def gelu(x: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    return _activate(x, "gelu_tanh" if tanh else "gelu")


def relu(x: torch.Tensor) -> torch.Tensor:
    return _activate(x, "relu")


def _activate(x: torch.Tensor, kind: str) -> torch.Tensor:
    assert x.stride(1) == 1
    size = x.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        warps, columns = program(device_for(x), size)
        grid = (len(x), triton.cdiv(size, columns))
        activation_kernel[grid](x, out, x.stride(0), KIND=kind, SIZE=size, COLUMNS=columns, num_warps=warps)
    return out


def program(device: Device, size: int) -> tuple[int, int]:
    """Warps and columns. Up to four warps of 32 threads: enough programs for every multiprocessor at a few tokens."""
    columns = min(4 * 32 * THREAD_VALUES, max(64, triton.next_power_of_2(size)))
    return max(1, columns // (THREAD_VALUES * device.warp_size)), columns


def variants(device: Device) -> list[Variant]:
    cases = [(14336, torch.bfloat16), (11008, torch.bfloat16), (14336, torch.float16), (14336, torch.float32)]
    found = []
    for size, dtype in cases:
        warps, columns = program(device, size)
        name = f"{size} {str(dtype).removeprefix('torch.')}"
        gated = {"x": dtype, "out": dtype, "stride": 2 * size, "SIZE": size, "COLUMNS": columns}
        found.append(Variant(f"silu_and_mul: {name}", silu_and_mul_kernel, gated, num_warps=warps, hot=True))
        for kind in ("gelu", "gelu_tanh", "relu"):
            plain = {"x": dtype, "out": dtype, "stride": size, "KIND": kind, "SIZE": size, "COLUMNS": columns}
            found.append(Variant(f"{kind}: {name}", activation_kernel, plain, num_warps=warps, hot=True))
    return found
