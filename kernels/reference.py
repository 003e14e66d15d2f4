"""The naive twin of every operation of this folder, written for reading: plain torch, one loop per thing.

The twins are what the tests compare with. They compute in float32 and round once, at the end.
"""

from __future__ import annotations

import math

import torch

from quire.kernels.attention import PagedRows


def paged_attention(
    q: torch.Tensor,  # [T, Hq, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    rows: PagedRows,
    scale: float,
    window: int | None = None,
    slopes: torch.Tensor | None = None,  # [Hq]
    kv_scales: torch.Tensor | None = None,  # [2, Hkv]
) -> torch.Tensor:  # [T, Hq, D]
    block_tables, query_starts, seq_lens = rows.block_tables, rows.query_starts, rows.seq_lens
    k_scale, v_scale = torch.ones(2, kv_layer.shape[3]) if kv_scales is None else kv_scales.cpu()
    q, kv_layer = q.cpu(), kv_layer.cpu()
    out = torch.empty_like(q)
    block_size, group = kv_layer.shape[2], q.shape[1] // kv_layer.shape[3]
    for row in range(len(seq_lens)):
        seq_len = int(seq_lens[row])
        tokens = range(int(query_starts[row]), int(query_starts[row + 1]))
        for i, token in enumerate(tokens):
            position = seq_len - len(tokens) + i
            first = 0 if window is None else max(0, position - window + 1)
            slots = [(int(block_tables[row, p // block_size]), p % block_size) for p in range(first, position + 1)]
            # [p, Hkv, D] each
            keys = torch.stack([kv_layer[block, 0, offset].float() for block, offset in slots]) * k_scale[:, None]
            values = torch.stack([kv_layer[block, 1, offset].float() for block, offset in slots]) * v_scale[:, None]
            for head in range(q.shape[1]):
                scores = keys[:, head // group] @ q[token, head].float() * scale
                if slopes is not None:
                    scores += slopes[head].cpu() * torch.arange(first - position, 1)
                out[token, head] = (torch.softmax(scores, 0) @ values[:, head // group]).to(q.dtype)
    return out


def write_kv(
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    slots: torch.Tensor,  # [T]: block * block_size + offset; negative: not written
    scales: torch.Tensor | None = None,  # [2, Hkv] float32: what is stored times this is the value
) -> None:
    block_size = kv_layer.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for i, x in enumerate((k[token], v[token])):
            if kv_layer.dtype == torch.float8_e4m3fn:
                wide = x.float() if scales is None else x.float() * (1 / scales[i, :, None])
                x = wide.clamp(-448, 448).to(kv_layer.dtype)
            kv_layer[slot // block_size, i, slot % block_size] = x


def apply_rotary(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    positions: torch.Tensor,  # [T]
    cos_sin: torch.Tensor,  # [P, R] float32: cosines, then sines; dimensions from R on stay
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    def rotate(x: torch.Tensor) -> torch.Tensor:
        half, out = cos_sin.shape[1] // 2, x.clone()
        for token, position in enumerate(positions.tolist()):
            for i in range(half):
                first, second = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
                cos, sin = cos_sin[position, i], cos_sin[position, half + i]
                a, b = x[token, :, first].float(), x[token, :, second].float()
                out[token, :, first] = (a * cos - b * sin).to(x.dtype)
                out[token, :, second] = (b * cos + a * sin).to(x.dtype)
        return out

    return rotate(q), rotate(k)


def norm_rotate_write(
    qkv: torch.Tensor,  # [T, Hq + 2 * Hkv, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    slots: torch.Tensor,  # [T]
    positions: torch.Tensor,  # [T]
    cos_sin: torch.Tensor | None = None,  # [P, R] float32
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None,  # [D]
    k_norm: torch.Tensor | None = None,  # [D]
    eps: float = 0.0,
    kv_scales: torch.Tensor | None = None,  # [2, Hkv] float32
) -> torch.Tensor:  # q [T, Hq, D]
    """The operations one after the other, each rounded on its own."""
    k_start, v_start = qkv.shape[1] - 2 * kv_layer.shape[3], qkv.shape[1] - kv_layer.shape[3]
    q, k, v = qkv[:, :k_start], qkv[:, k_start:v_start], qkv[:, v_start:]
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    if cos_sin is not None:
        q, k = apply_rotary(q, k, positions, cos_sin, interleaved)
    write_kv(k, v, kv_layer, slots, kv_scales)
    return q


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


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised sum, and the sum."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


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
    """NaN stays NaN."""
    return torch.where(x <= 0, torch.zeros_like(x), x)


def linear_invariant(
    x: torch.Tensor,  # [T, K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None = None,  # [N]
) -> torch.Tensor:  # [T, N]
    """Each row by itself."""
    out = torch.empty(len(x), len(weight), dtype=x.dtype)
    for token in range(len(x)):
        sums = (weight.float() * x[token].float()).sum(-1)
        out[token] = (sums if bias is None else sums + bias.float()).to(x.dtype)
    return out


def copy_blocks(pool: torch.Tensor, pairs: torch.Tensor) -> None:
    """[N, ...], and [n, 2] of source and destination."""
    for source, destination in pairs.tolist():
        pool[destination] = pool[source]


def gather_blocks(pool: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
    """[N, ...] -> [n, ...]."""
    for i, block in enumerate(ids.tolist()):
        out[i] = pool[block]


def scatter_blocks(pool: torch.Tensor, ids: torch.Tensor, source: torch.Tensor) -> None:
    """[n, ...] -> [N, ...]."""
    for i, block in enumerate(ids.tolist()):
        pool[block] = source[i]
