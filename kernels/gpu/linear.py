"""A product whose rows do not depend on each other: one tile for all numbers of rows, K in one order, never split.

What that costs at few rows is parallelism: a tile's 64 rows are computed for a single one, and only N / 128 programs
read the weight.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quire.kernels.gpu.device import Device, Variant, device_for

GROUP = 8
"""Row tiles that share a sweep over the weight, so that it is read from memory once for all of them."""


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def tile(device: Device, dtype: torch.dtype) -> Tile:
    """The same for every shape: a row's bits are a promise, and another tile may sum in another order."""
    if dtype == torch.float32:
        return Tile(64, 64, 16, 4, 2)
    if device.backend == "hip":
        return Tile(64, 128, 64, 4, 2)
    return Tile(64, 128, 64, 4, 4)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x,  # [num_rows, K]
    weight,  # [N, K], contiguous
    bias,  # [N] or None
    out,  # [num_rows, N], contiguous
    num_rows,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    column_tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    row_tiles = tl.cdiv(num_rows, ROWS)
    # Down the rows of a group first, then along the columns.
    group = tl.program_id(0) // (GROUP * column_tiles)
    in_group = tl.program_id(0) % (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    row = (group * GROUP + in_group % height) * ROWS + tl.arange(0, ROWS)
    column = in_group // height * COLUMNS + tl.arange(0, COLUMNS)
    # Past the ends the last row and column are read again: nothing of theirs reaches the others, or is stored.
    x_row = x + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * x_stride
    weight_row = weight + tl.minimum(column, N - 1).to(tl.int64)[None, :] * K
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    WHOLE: tl.constexpr = K // DEPTH * DEPTH
    for start in range(0, WHOLE, DEPTH):
        a = tl.load(x_row + (start + depth)[None, :])
        b = tl.load(weight_row + (start + depth)[:, None])
        sums = tl.dot(a, b, sums, input_precision="ieee")
    if WHOLE < K:
        left = WHOLE + depth
        a = tl.load(x_row + left[None, :], mask=left[None, :] < K, other=0.0)
        b = tl.load(weight_row + left[:, None], mask=left[:, None] < K, other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    target = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=(row < num_rows)[:, None] & (column < N)[None, :])


def linear_invariant(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    num_rows, depth = x.shape
    columns = len(weight)
    assert x.dtype == weight.dtype and weight.is_contiguous() and (bias is None or bias.is_contiguous())
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(num_rows, columns, dtype=x.dtype, device=x.device)
    if out.numel():
        chosen = tile(device_for(x), x.dtype)
        linear_kernel[(triton.cdiv(num_rows, chosen.rows) * triton.cdiv(columns, chosen.columns),)](
            x,
            weight,
            bias,
            out,
            num_rows,
            x.stride(0) if num_rows > 1 else depth,
            N=columns,
            K=depth,
            ROWS=chosen.rows,
            COLUMNS=chosen.columns,
            DEPTH=chosen.depth,
            GROUP=GROUP,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
    return out


def variants(device: Device) -> list[Variant]:
    cases = [
        (4096, 6144, torch.bfloat16, False),
        (2048, 3072, torch.bfloat16, True),
        (4096, 6144, torch.float16, False),
        (100, 33, torch.float16, True),
        (4096, 6144, torch.float32, False),
        (100, 33, torch.float32, True),
    ]
    found = []
    for depth, columns, dtype, biased in cases:
        chosen = tile(device, dtype)
        arguments = {
            "x": dtype,
            "weight": dtype,
            "bias": dtype if biased else None,
            "out": dtype,
            "num_rows": 61,
            "x_stride": depth,
            "N": columns,
            "K": depth,
            "ROWS": chosen.rows,
            "COLUMNS": chosen.columns,
            "DEPTH": chosen.depth,
            "GROUP": GROUP,
        }
        name = f"linear_invariant: {depth} to {columns} {str(dtype).removeprefix('torch.')}{', bias' if biased else ''}"
        found.append(
            Variant(
                name,
                linear_kernel,
                arguments,
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
                hot=True,
                matrix=dtype != torch.float32,
            )
        )
    return found
