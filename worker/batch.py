"""One step's flat tensors: what the decoder and the kernels read, passed explicitly.

Rows of a batch are sequences; each brings one or more new tokens, laid end to end. Nothing distinguishes prefill
from decode but the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(slots=True)
class Batch:
    """Inputs of one forward pass; T new tokens of B rows, S of which sample."""

    token_ids: torch.Tensor
    """[T] int64."""

    positions: torch.Tensor
    """[T] int64: index of each token in its sequence."""

    slots: torch.Tensor
    """[T] int64: where each token's K/V goes: block * block_size + offset."""

    query_starts: np.ndarray
    """[B + 1] int32, on the host: row i's tokens are query_starts[i]:query_starts[i + 1]."""

    seq_lens: np.ndarray
    """[B] int32, on the host: tokens in each sequence's KV after this step, the new ones included."""

    block_tables: torch.Tensor
    """[B, M] int32: block ids in order; entries past a sequence's last block are arbitrary and never read."""

    sample_index: torch.Tensor
    """[S] int64: index among the T tokens of the last token of each row that samples."""
