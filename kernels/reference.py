"""The naive twin of every operation of this folder, written for reading: plain torch, one loop per thing.

The twins are what the tests compare with. They compute in float32 and round once, at the end.
"""

from __future__ import annotations

import math

import numpy as np
import torch


def paged_attention(
    q: torch.Tensor,  # [T, Hq, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    block_tables: torch.Tensor,  # [B, M]
    query_starts: np.ndarray,  # [B + 1]
    seq_lens: np.ndarray,  # [B]
    scale: float,
    window: int | None = None,
) -> torch.Tensor:  # [T, Hq, D]
    out = torch.empty_like(q)
    block_size, group = kv_layer.shape[2], q.shape[1] // kv_layer.shape[3]
    for row in range(len(seq_lens)):
        seq_len = int(seq_lens[row])
        tokens = range(int(query_starts[row]), int(query_starts[row + 1]))
        for i, token in enumerate(tokens):
            position = seq_len - len(tokens) + i
            first = 0 if window is None else max(0, position - window + 1)
            slots = [(int(block_tables[row, p // block_size]), p % block_size) for p in range(first, position + 1)]
            keys = torch.stack([kv_layer[block, 0, offset] for block, offset in slots]).float()  # [p, Hkv, D]
            values = torch.stack([kv_layer[block, 1, offset] for block, offset in slots]).float()
            for head in range(q.shape[1]):
                scores = keys[:, head // group] @ q[token, head].float() * scale
                out[token, head] = (torch.softmax(scores, 0) @ values[:, head // group]).to(q.dtype)
    return out


def write_kv(
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    slots: torch.Tensor,  # [T]: block * block_size + offset
) -> None:
    block_size = kv_layer.shape[2]
    for token, slot in enumerate(slots.tolist()):
        kv_layer[slot // block_size, 0, slot % block_size] = k[token]
        kv_layer[slot // block_size, 1, slot % block_size] = v[token]


def apply_rotary(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    positions: torch.Tensor,  # [T]
    cos_sin: torch.Tensor,  # [P, D] float32: cosines, then sines
) -> tuple[torch.Tensor, torch.Tensor]:
    def rotate(x: torch.Tensor) -> torch.Tensor:
        half, out = x.shape[-1] // 2, torch.empty_like(x)
        for token, position in enumerate(positions.tolist()):
            for i in range(half):
                cos, sin = cos_sin[position, i], cos_sin[position, half + i]
                a, b = x[token, :, i].float(), x[token, :, half + i].float()
                out[token, :, i] = (a * cos - b * sin).to(x.dtype)
                out[token, :, half + i] = (b * cos + a * sin).to(x.dtype)
        return out

    return rotate(q), rotate(k)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension; rounded before the weight, as Hugging Face's models do."""
    wide = x.float()
    return (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised sum, and the sum."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.float()
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """[T, 2 * I] gate and up -> [T, I]; the gate is rounded before the product, as Hugging Face's models do."""
    gate, up = x.chunk(2, -1)
    return (gate.float() / (1 + torch.exp(-gate.float()))).to(x.dtype) * up


def gelu(x: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    wide = x.float()
    if tanh:
        inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)
    return (0.5 * wide * (1 + torch.erf(wide / math.sqrt(2)))).to(x.dtype)


def relu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))
