"""Writing keys and values to their slots in the paged pool.

A layer of the pool is a strided view [block, K/V, token, head, dim] of the whole; it is written in place and never
copied.
"""

from __future__ import annotations

import torch

FLOAT8 = torch.float8_e4m3fn
"""The one 8-bit type that a pool may have: 4 bits of exponent, no infinity."""

FLOAT8_MAX = 448.0

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "fp8": FLOAT8}
"""What a pool may hold, by the names of `--kv-cache-dtype` and `--dtype`."""


def write_kv(
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]; dtype of k and v, or FLOAT8
    slots: torch.Tensor,  # [T] int64: block * block_size + offset; negative: nothing is written
    scales: torch.Tensor | None = None,  # [2, Hkv] float32, FLOAT8 only: what is stored times this is the value
) -> None:
    kept = slots >= 0
    if not kept.all():
        k, v, slots = k[kept], v[kept], slots[kept]
    block_size = kv_layer.shape[2]
    where = (slots // block_size, slots % block_size)
    if kv_layer.dtype == FLOAT8:
        k, v = (to_float8(x, None if scales is None else scales[i]).view(torch.uint8) for i, x in enumerate((k, v)))
        kv_layer = kv_layer.view(torch.uint8)
    kv_layer[:, 0].index_put_(where, k)
    kv_layer[:, 1].index_put_(where, v)


def to_float8(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """[T, H, D] over [H] float32, or over 1, to FLOAT8; what is too large becomes the largest."""
    wide = x.float()
    if scale is not None:
        wide = wide * scale.reciprocal()[:, None]
    return wide.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
