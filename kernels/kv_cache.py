"""Writing keys and values to their slots in the paged pool.

A layer of the pool is a strided view [block, K/V, token, head, dim] of the whole; it is written in place and never
copied.
"""

from __future__ import annotations

import torch


def write_kv(
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    slots: torch.Tensor,  # [T] int64: block * block_size + offset
) -> None:
    block_size = kv_layer.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    kv_layer[:, 0].index_put_((blocks, offsets), k)
    kv_layer[:, 1].index_put_((blocks, offsets), v)
