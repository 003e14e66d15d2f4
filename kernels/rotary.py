"""Rotary position embedding: pairs of a head's dimensions turn by an angle that grows with the token's position.

NeoX pairs dimension i with i + R/2, GPT-J (`interleaved`) 2i with 2i + 1; the first R dimensions turn, the others pass.
The table of cosines and sines is built and applied in float32 and the result rounded once.
"""

from __future__ import annotations

import torch


def cos_sin_table(inverse_frequencies: torch.Tensor, num_positions: int, scale: float = 1.0) -> torch.Tensor:
    """[R/2] -> [num_positions, R] float32: cosines, then sines, both times `scale`."""
    positions = torch.arange(num_positions, dtype=torch.float32, device=inverse_frequencies.device)
    angles = torch.outer(positions, inverse_frequencies.float())
    return torch.cat((angles.cos(), angles.sin()), -1) * scale


def apply_rotary(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    positions: torch.Tensor,  # [T]
    cos_sin: torch.Tensor,  # [P, R] float32, R <= D
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated q and k, new tensors."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)  # [T, 1, R/2]
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    size = 2 * cos.shape[-1]
    turning = x[..., :size].float()
    if interleaved:
        a, b = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), -1)
