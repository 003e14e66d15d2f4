"""Self-attention over the paged pool: project, rotate, write K/V to their slots, attend, project back.

A rank holds whole heads: a share of the query heads and the key-value heads that they read, which are repeated on
several ranks where there are fewer of them than ranks.
"""

from __future__ import annotations

import torch
from torch import nn

from quire.kernels.attention import paged_attention
from quire.kernels.qkv import norm_rotate_write
from quire.worker.batch import Batch
from quire.worker.layers.linear import Linear, RowParallelLinear
from quire.worker.layers.norm import RMSNorm
from quire.worker.models.checkpoint import kv_head_share
from quire.worker.models.spec import ModelSpec
from quire.worker.parallel import TensorParallel


class Attention(nn.Module):
    def __init__(
        self, spec: ModelSpec, layer: int, tp: TensorParallel, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        start, stop = tp.split(spec.num_heads)
        kv_start, kv_stop = kv_head_share(spec.num_kv_heads, tp.rank, tp.size)
        self.num_heads, self.num_kv_heads, self.head_dim = stop - start, kv_stop - kv_start, spec.head_dim
        self.scale = spec.head_dim**-0.5
        self.window = spec.windows[layer]
        self.norm_eps = spec.norm_eps
        query_size = self.num_heads * spec.head_dim
        kv_size = self.num_kv_heads * spec.head_dim
        self.qkv = Linear(spec.hidden_size, query_size + 2 * kv_size, spec.qkv_bias, dtype, device)
        self.out = RowParallelLinear(query_size, spec.hidden_size, spec.out_bias, tp, dtype, device)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps, dtype, device) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps, dtype, device) if spec.qk_norm else None

    def forward(
        self,
        x: torch.Tensor,  # [T, hidden]
        batch: Batch,
        kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
        cos_sin: torch.Tensor | None,  # [P, D]; None: positions are not rotary
        select: torch.Tensor | None,  # [S]: tokens whose result is wanted; None: all
    ) -> torch.Tensor:  # [T or S, hidden]
        q = norm_rotate_write(
            self.qkv(x).unflatten(-1, (-1, self.head_dim)),
            kv_layer,
            batch.slots,
            batch.positions,
            cos_sin,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=self.norm_eps,
        )
        out = paged_attention(q, kv_layer, batch.rows, self.scale, self.window).flatten(1)
        result: torch.Tensor = self.out(out if select is None else out[select])
        return result
