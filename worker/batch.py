"""One step's flat tensors: what the decoder and the kernels read, passed explicitly.

Rows of a batch are sequences; each brings one or more new tokens, laid end to end. Nothing distinguishes prefill
from decode but the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from quire.kernels import dispatch
from quire.kernels.attention import PagedRows
from quire.kernels.shared_prefix import find_shared_prefixes

if TYPE_CHECKING:  # the decoder needs the batch and not the table
    from quire.worker.table import RowTable, Work


@dataclass(slots=True)
class Batch:
    """Inputs of one forward pass; T new tokens of B rows, S of which sample."""

    token_ids: torch.Tensor
    """[T] int64."""

    positions: torch.Tensor
    """[T] int64: index of each token in its sequence."""

    slots: torch.Tensor
    """[T] int64: where each token's K/V goes: block * block_size + offset."""

    rows: PagedRows
    """What attention needs to know of the B rows."""

    sample_index: torch.Tensor
    """[S] int64: index among the T tokens of the last token of each row that samples."""


def build_batch(table: RowTable, work: Work, deterministic: bool = False) -> Batch:
    """The tensors of one step, from the rows as they are. Everything the device needs travels in one copy."""
    num_rows, block_size = len(work.rows), table.size.block_size
    ends = work.starts + work.num_tokens
    query_starts = np.zeros(num_rows + 1, np.int32)
    np.cumsum(work.num_tokens, out=query_starts[1:])
    token_rows, positions = work.rows, work.starts
    if query_starts[-1] != num_rows:
        token_rows = np.repeat(work.rows, work.num_tokens)
        positions = np.arange(query_starts[-1]) - np.repeat(query_starts[:-1] - work.starts, work.num_tokens)
    sample_index = query_starts[1:][work.sampling] - 1
    num_blocks = -(-int(ends.max()) // block_size)

    token_rows_, positions_, rows_, sample_index_, starts_, ends_ = _upload(
        table.device, token_rows, positions, work.rows, sample_index, query_starts, ends
    )
    on_gpu = dispatch.on_gpu(starts_)
    shared = None
    if on_gpu and not deterministic:
        shared = find_shared_prefixes(table.host_blocks[work.rows, :num_blocks], ends, work.num_tokens, block_size)
    blocks = table.block_table[token_rows_, positions_ // block_size]
    return Batch(
        token_ids=table.token_ids[token_rows_, positions_].long(),
        positions=positions_,
        slots=blocks.long() * block_size + positions_ % block_size,
        rows=PagedRows(
            block_tables=table.block_table[:, :num_blocks].index_select(0, rows_),
            query_starts=query_starts,
            seq_lens=ends.astype(np.int32),
            deterministic=deterministic,
            shared=shared,
            on_device=(starts_.int(), ends_.int()) if on_gpu else None,
        ),
        sample_index=sample_index_,
    )


def _upload(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Integer arrays as int64 tensors on the device, by one copy.

    Each starts at a multiple of 128 bytes: kernels are compiled anew for pointers of another alignment.
    """
    starts = np.cumsum([0, *(-(-len(array) // 16) * 16 for array in arrays)]).tolist()
    packed = np.zeros(starts[-1], np.int64)
    for start, array in zip(starts, arrays, strict=False):
        packed[start : start + len(array)] = array
    tensor = torch.from_numpy(packed).to(device, non_blocking=True)
    return [tensor[start : start + len(array)] for start, array in zip(starts, arrays, strict=False)]
