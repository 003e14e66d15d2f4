"""The table of rotary positions that a model's `Rope` describes."""

from __future__ import annotations

import math

import torch

from quire.kernels.rotary import cos_sin_table
from quire.worker.models.spec import Rope


def rotary_table(rope: Rope, head_dim: int, num_positions: int, device: torch.device) -> torch.Tensor:
    """[num_positions, head_dim] float32: cosines, then sines."""
    frequencies = rope.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scale = 1.0
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies, scale = _yarn(rope, frequencies), _yarn_scale(rope)
    return cos_sin_table(frequencies.to(device), num_positions, scale)


def _llama3(rope: Rope, frequencies: torch.Tensor) -> torch.Tensor:
    """Long waves are stretched by the factor, short ones kept, those between interpolated by how often they turn in
    the original context."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(frequencies / rope.factor, frequencies, keep.clamp(0, 1))


def _yarn(rope: Rope, frequencies: torch.Tensor) -> torch.Tensor:
    """As above, but the ramp is linear in the dimension's index, between the dimensions that turn `beta_fast` and
    `beta_slow` times."""
    half = len(frequencies)

    def dimension(turns: float) -> float:
        return half * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    stretch = (torch.arange(half) - low) / ((high - low) or 0.001)
    return torch.lerp(frequencies, frequencies / rope.factor, stretch.clamp(0, 1))


def _yarn_scale(rope: Rope) -> float:
    def magnitude(m: float) -> float:
        return 0.1 * m * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
