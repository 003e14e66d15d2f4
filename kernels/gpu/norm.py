"""RMSNorm and layer norm, alone and after a residual sum, in one kernel.

A program holds whole rows in registers, one long row or several short ones: each element is read once. How many depends
on the rows' length alone, so that a row is summed in the same order whatever is beside it.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

from quire.kernels.gpu.device import Device, Variant, device_for

PROGRAM_VALUES = 1024
"""Short rows are taken together up to so many elements."""

THREAD_VALUES = 16
"""Of a row, per thread: two loads of 16 bytes for 16-bit types. Rows of more than 8192 elements have more."""

MOST_THREADS = 512

LONGEST_ROW = 16384


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x,  # rows outer * inner, of SIZE elements each
    residual,  # [rows, SIZE] or None: nothing is added
    weight,  # [SIZE] or None
    bias,  # [SIZE] or None
    normed,  # [rows, SIZE], contiguous
    total,  # [rows, SIZE], contiguous; None: without residual
    rows,
    inner,  # row r lies at (r // inner) * outer_stride + (r % inner) * inner_stride
    outer_stride,
    inner_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,  # the power of two that holds SIZE
    ROWS: tl.constexpr,  # of one program
    CENTRED: tl.constexpr,  # layer norm
):
    index = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    row = index.to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (index < rows) & (column < SIZE)
    source = x + (index // inner).to(tl.int64) * outer_stride + index % inner * inner_stride + column
    values = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    # All that is read is asked for before the first sum, which waits.
    if weight is not None:
        factor = tl.load(weight + column, mask=column < SIZE, other=0.0)
    if bias is not None:
        shift = tl.load(bias + column, mask=column < SIZE, other=0.0)
    if residual is not None:
        values += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * SIZE + column, rounded, mask=inside)
        values = rounded.to(tl.float32)
    if CENTRED:
        mean = tl.sum(values, axis=1, keep_dims=True) * (1.0 / SIZE)
        # Zeros past the end would count as -mean each.
        values = tl.where(column < SIZE, values - mean, 0.0)
    values *= tl.rsqrt(tl.sum(values * values, axis=1, keep_dims=True) * (1.0 / SIZE) + eps)
    if not CENTRED:
        values = values.to(normed.dtype.element_ty).to(tl.float32)
    if weight is not None:
        values *= factor.to(tl.float32)
    if bias is not None:
        values += shift.to(tl.float32)
    tl.store(normed + row * SIZE + column, values.to(normed.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch(x, None, weight, None, eps, centred=False)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(x, residual, weight, None, eps, centred=False)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return _launch(x, None, weight, bias, eps, centred=True)[0]


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(x, residual, weight, bias, eps, centred=True)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and what was normalised."""
    size = x.shape[-1]
    assert size <= LONGEST_ROW, f"rows of {size} elements do not fit into registers"
    assert all(p is None or (p.dtype == x.dtype and p.is_contiguous()) for p in (weight, bias))
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = normed.numel() // size
    if rows:
        # Rows of heads keep their two strides; anything else becomes a matrix.
        source = x if x.dim() == 3 and x.stride(-1) == 1 else _matrix(x).unsqueeze(1)
        added = None if residual is None else _matrix(residual)
        constants = sizes(size)
        norm_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
            source,
            added,
            weight,
            bias,
            normed,
            total,
            rows,
            source.shape[1],
            source.stride(0),
            source.stride(1),
            0 if added is None else added.stride(0),
            eps,
            SIZE=size,
            CENTRED=centred,
            num_warps=num_warps(device_for(x), size),
            **constants,
        )
    return normed, x if total is None else total


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """[..., H] to [rows, H]; a copy only where strides make it necessary."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def sizes(size: int) -> dict[str, int]:
    columns = triton.next_power_of_2(size)
    return {"COLUMNS": columns, "ROWS": max(1, PROGRAM_VALUES // columns)}


def num_warps(device: Device, size: int) -> int:
    values = max(PROGRAM_VALUES, triton.next_power_of_2(size))
    return int(min(MOST_THREADS, values // THREAD_VALUES) // device.warp_size)


def variants(device: Device) -> list[Variant]:
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(size, bfloat16) for size in (2048, 4096, 5120, LONGEST_ROW)] + [(4096, float16), (4096, float32)]
    return [
        *(_variant(device, dtype, size, added=True, centred=False) for size, dtype in cases),
        *(_variant(device, dtype, size, added=True, centred=True) for size, dtype in cases),
        _variant(device, bfloat16, 4096, added=False, centred=False),
        _variant(device, bfloat16, 4096, added=False, centred=True),
        _variant(device, bfloat16, 4096, added=False, centred=True, affine=False),
        *(_variant(device, dtype, 128, added=False, centred=False, heads=16) for dtype in (bfloat16, float16, float32)),
        _variant(device, bfloat16, 96, added=False, centred=False, heads=16),
    ]


def _variant(
    device: Device,
    dtype: torch.dtype,
    size: int,
    added: bool,
    centred: bool,
    affine: bool = True,
    heads: int = 1,
) -> Variant:
    name = ("add_" if added else "") + ("layer_norm" if centred else "rms_norm")
    arguments: dict[str, Any] = {
        "x": dtype,
        "residual": dtype if added else None,
        "weight": dtype if affine else None,
        "bias": dtype if affine and centred else None,
        "normed": dtype,
        "total": dtype if added else None,
        "rows": 61,
        "inner": heads,
        "outer_stride": 3 * heads * size,
        "inner_stride": size,
        "residual_stride": size if added else 0,
        "eps": 1e-6,
        "SIZE": size,
        **sizes(size),
        "CENTRED": centred,
    }
    return Variant(
        f"{name}: {size} {str(dtype).removeprefix('torch.')}{'' if affine else ', plain'}",
        norm_kernel,
        arguments,
        num_warps=num_warps(device, size),
        hot=True,
    )
