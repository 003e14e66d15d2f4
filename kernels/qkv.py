"""From a layer's fused projection to attention: heads are normed and rotated, K and V written to their slots."""

from __future__ import annotations

import torch

from quire.kernels import dispatch
from quire.kernels.kv_cache import write_kv
from quire.kernels.norm import rms_norm
from quire.kernels.rotary import apply_rotary


def norm_rotate_write(
    qkv: torch.Tensor,  # [T, Hq + 2 * Hkv, D], the last dimension contiguous
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D], a strided view of the pool; dtype of qkv, or float8_e4m3fn
    slots: torch.Tensor,  # [T] int64: block * block_size + offset; negative: a token of padding, nothing is written
    positions: torch.Tensor,  # [T] int64, of padding too in range
    cos_sin: torch.Tensor | None = None,  # [P, R] float32: cosines, then sines, R <= D; None: positions are not rotary
    interleaved: bool = False,  # pairs (2i, 2i + 1) turn, else (i, i + R/2)
    q_norm: torch.Tensor | None = None,  # [D]: weight of RMSNorm over each head, with k_norm
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    kv_scales: torch.Tensor
    | None = None,  # [2, Hkv] float32, float8 pools only: what is stored times this is the value
) -> torch.Tensor:  # q [T, Hq, D], contiguous
    """One kernel on a GPU. Rounded wherever the separate operations round."""
    if dispatch.on_gpu(qkv):
        from quire.kernels.gpu import qkv as gpu

        return gpu.norm_rotate_write(
            qkv, kv_layer, slots, positions, cos_sin, interleaved, q_norm, k_norm, eps, kv_scales
        )
    fused = None if interleaved or cos_sin is None else dispatch.compiled(qkv, kv_layer)
    if fused is not None:
        rotated: torch.Tensor = fused.norm_rotate_write(qkv, kv_layer, slots, positions, cos_sin, q_norm, k_norm, eps)
        return rotated
    num_kv_heads = kv_layer.shape[3]
    q, k, v = qkv.split((qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    if cos_sin is not None:
        q, k = apply_rotary(q, k, positions, cos_sin, interleaved)
    write_kv(k, v, kv_layer, slots, kv_scales)
    result: torch.Tensor = q.contiguous()
    return result
