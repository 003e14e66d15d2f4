"""This rank's shard of the paged KV pool: one tensor, cut into blocks that the controller hands out by number.

Invariant: a block is one contiguous range of memory, all layers, K and V; whoever copies or moves a block moves
`tensor[block]` in one piece. What the blocks hold and whose they are is known to the controller alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from quire.worker import pages


@dataclass(frozen=True, slots=True)
class BlockShape:
    num_layers: int
    block_size: int
    num_kv_heads: int
    """Of this rank."""
    head_dim: int
    dtype: torch.dtype

    @property
    def dimensions(self) -> tuple[int, int, int, int, int]:
        """[layer, K/V, token, head, dim]."""
        return self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim

    @property
    def num_bytes(self) -> int:
        return prod(self.dimensions) * self.dtype.itemsize


class KVPool:
    def __init__(self, shape: BlockShape, num_blocks: int, device: torch.device | str) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        # [block, layer, K/V, token, head, dim]. Not zeroed: no slot is read before it is written, and on a CPU memory
        # that nothing comes near is never taken.
        dimensions = (num_blocks, *shape.dimensions)
        if torch.device(device).type == "cpu":
            self.tensor = pages.allocate(num_blocks * shape.num_bytes).view(shape.dtype).view(dimensions)
        else:
            self.tensor = torch.empty(dimensions, dtype=shape.dtype, device=device)
