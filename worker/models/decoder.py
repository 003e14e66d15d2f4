"""One decoder for all families: what differs between them is data, in ModelSpec.

Invariant: every rank holds the same hidden states between layers; inside attention and MLP each holds its share.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from quire.worker.batch import Batch
from quire.worker.layers.attention import Attention
from quire.worker.layers.embedding import Head, PositionEmbedding, TokenEmbedding
from quire.worker.layers.linear import Linear
from quire.worker.layers.mlp import MLP
from quire.worker.layers.norm import make_norm
from quire.worker.models.checkpoint import bytes_by_group, kv_head_share
from quire.worker.models.rope import rotary_table
from quire.worker.models.spec import ModelSpec
from quire.worker.parallel import TensorParallel


class DecoderLayer(nn.Module):
    """Hidden states travel as a pair: what the last part added, and the residual that it has yet to be added to
    (None before the first layer, and always with norms that follow the sum)."""

    def __init__(
        self, spec: ModelSpec, index: int, tp: TensorParallel, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.norm_first = spec.norm_first
        self.attention_norm = make_norm(spec, dtype, device)
        self.attention = Attention(spec, index, tp, dtype, device)
        self.mlp_norm = make_norm(spec, dtype, device)
        self.mlp = MLP(spec, tp, dtype, device)

    def forward(
        self,
        delta: torch.Tensor,  # [T, hidden]
        residual: torch.Tensor | None,  # [T, hidden]
        batch: Batch,
        kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
        cos_sin: torch.Tensor | None,  # [P, D]
        select: torch.Tensor | None,  # [S]: tokens that go on after attention; None: all
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # [T or S, hidden] each
        if self.norm_first:
            x, residual = self.attention_norm.add(delta, residual)
        else:
            x = residual = delta
        delta = self.attention(x, batch, kv_layer, cos_sin, select)
        if select is not None:
            residual = residual[select]
        if self.norm_first:
            x, residual = self.mlp_norm.add(delta, residual)
            return self.mlp(x), residual
        x = self.attention_norm(residual + delta)
        return self.mlp_norm(x + self.mlp(x)), None


class Decoder(nn.Module):
    """Parameters are created empty; `weights.load_model` fills them."""

    def __init__(
        self,
        spec: ModelSpec,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        max_positions: int | None = None,
    ) -> None:
        """`max_positions` bounds the rotary table; None: all positions that the model knows."""
        super().__init__()
        device = torch.device(device)
        hidden, width = spec.hidden_size, spec.embedding_size
        self.spec = spec
        self._count_bytes = partial(bytes_by_group, spec, str(dtype).removeprefix("torch."), tp.rank, tp.size)
        self.weight_bytes = sum(self._count_bytes().values())
        """Of this rank; a tied head counts once, unless it is packed."""
        self.num_local_kv_heads = len(range(*kv_head_share(spec.num_kv_heads, tp.rank, tp.size)))
        self.embedding = TokenEmbedding(spec.vocab_size, width, tp, dtype, device)
        self.positions = self.cos_sin = None
        if spec.rope is None:
            self.positions = PositionEmbedding(
                spec.max_position_embeddings, hidden, spec.position_offset, dtype, device
            )
        else:
            length = max_positions or spec.max_position_embeddings
            self.cos_sin = rotary_table(spec.rope, spec.head_dim, length, device)
        projected = width != hidden
        self.project_in = Linear(width, hidden, False, dtype, device) if projected else None
        self.layers = nn.ModuleList(DecoderLayer(spec, i, tp, dtype, device) for i in range(spec.num_layers))
        self.norm = make_norm(spec, dtype, device) if spec.final_norm else None
        self.project_out = Linear(hidden, width, False, dtype, device) if projected else None
        tied = self.embedding.weight if spec.tied_head else None
        self.head = Head(spec.vocab_size, width, tp, dtype, device, tied)

    def pack(self, deterministic: bool = False) -> None:
        """After filling: lays weights out for the device's fastest products, and settles whether operations are to be
        those of which each row depends on itself alone."""
        for module in self.modules():
            if isinstance(module, Linear | Head | MLP):
                module.pack(deterministic)
        self.weight_bytes = sum(self._count_bytes(packed=self.head.packed is not None).values())

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: torch.Tensor) -> torch.Tensor:
        """Computes the batch's tokens and writes their K/V to `kv` [N, L, 2, block, Hkv, D]. Returns the hidden states
        [S, hidden] of the tokens that sample, ready for `logits`."""
        delta = self.embedding(batch.token_ids)
        if self.project_in is not None:
            delta = self.project_in(delta)
        if self.positions is not None:
            delta = delta + self.positions(batch.positions)
        residual = None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            # After the last layer's attention only the sampling tokens matter.
            select = batch.sample_index if index == last else None
            delta, residual = layer(delta, residual, batch, kv[:, index], self.cos_sin, select)
        if self.norm is not None:
            delta, _ = self.norm.add(delta, residual)
        elif residual is not None:
            delta = delta + residual
        hidden: torch.Tensor = delta
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] -> [S, vocab_size] float32, whole on every rank."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits
