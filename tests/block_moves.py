"""Moves of whole blocks against their naive twins; bytes are compared, so every element type is alike."""

from __future__ import annotations

from typing import Any

import torch

from quire.kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8]


def noise(shape: tuple[int, ...], dtype: torch.dtype, device: str, lead: int = 0) -> torch.Tensor:
    """Any bit patterns, NaN among them, `lead` elements into memory."""
    count = lead + torch.Size(shape).numel()
    whole = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    return whole.to(device)[lead:].view(shape)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.view(torch.uint8).cpu(), want.view(torch.uint8).cpu())


def check_moves(
    form: Any, shape: tuple[int, ...], dtype: torch.dtype, num_moved: int, device: str = "cpu", lead: int = 0
) -> None:
    """Copies, then gathers what was copied, then scatters it elsewhere; the pool has `num_moved` blocks on either side
    and some that nothing touches. Ids are of either type."""
    order = torch.randperm(3 * num_moved + 2)
    pairs = order[: 2 * num_moved].view(2, num_moved).T.contiguous()
    others = order[num_moved : 2 * num_moved].flip(0)
    pool = noise((len(order), *shape), dtype, device, lead)
    # In the middle of a larger pool: nothing before or behind it may change.
    around = noise((len(order) + 4, *shape), dtype, device, lead)
    around[2:-2] = pool
    pool, twin = around[2:-2], around.clone()
    form.copy_blocks(pool, pairs.int().to(device))
    reference.copy_blocks(twin[2:-2], pairs)
    assert same(around, twin)

    staging, twin_staging = (noise((num_moved, *shape), dtype, device, lead) for _ in range(2))
    form.gather_blocks(pool, others.to(device), staging)
    reference.gather_blocks(pool, others, twin_staging)
    assert same(staging, twin_staging) and same(around, twin)

    last = order[2 * num_moved : 3 * num_moved]
    form.scatter_blocks(pool, last.int().to(device), staging)
    reference.scatter_blocks(twin[2:-2], last, staging)
    assert same(around, twin)
