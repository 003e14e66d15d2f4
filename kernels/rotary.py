"""Rotary position embedding, NeoX pairing: dimension i turns with dimension i + D/2.

The table of cosines and sines is built and applied in float32 and the result rounded once.
"""

from __future__ import annotations

import torch


def cos_sin_table(inverse_frequencies: torch.Tensor, num_positions: int, scale: float = 1.0) -> torch.Tensor:
    """[D/2] -> [num_positions, D] float32: cosines, then sines, both times `scale`."""
    positions = torch.arange(num_positions, dtype=torch.float32, device=inverse_frequencies.device)
    angles = torch.outer(positions, inverse_frequencies.float())
    return torch.cat((angles.cos(), angles.sin()), -1) * scale


def apply_rotary(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    positions: torch.Tensor,  # [T]
    cos_sin: torch.Tensor,  # [P, D] float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated q and k, new tensors."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)  # [T, 1, D/2]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
