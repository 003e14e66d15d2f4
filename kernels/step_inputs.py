"""What a step's kernels read of the persistent rows: the controller's differences written into them, the flat inputs
derived from them, and sampled tokens put back.

A row's tokens and block table stay on the device for the sequence's life. A step brings a few integers per row, and
everything else is derived where it is used, so that the same launches serve every step of a recorded graph.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch

from quire.kernels import dispatch

SEGMENT = 8
"""Integers per segment of `write_rows`: table (0: tokens, 1: blocks), row, first column, offset of the values, number
of values; the rest is not looked at."""

COPY = 4
"""Integers per entry of `copy_rows`: row that is copied, row that becomes its copy, tokens, blocks."""

LONGEST_SEGMENT = 4096
"""Values that one program writes; longer ones are cut by whoever lists them."""


class Arrays:
    """The fields of a dataclass of tensors on the CPU, as NumPy sees them."""

    def __init__(self, tensors: RowTensors | StepTensors) -> None:
        for each in fields(tensors):
            setattr(self, each.name, getattr(tensors, each.name).numpy())

    def __getattr__(self, name: str) -> np.ndarray:
        raise AttributeError(name)


@dataclass(frozen=True)
class RowTensors:
    """The persistent rows, where kernels read them."""

    token_ids: torch.Tensor
    """[rows, tokens] int32."""
    block_tables: torch.Tensor
    """[rows, M] int32."""

    @cached_property
    def arrays(self) -> Arrays:
        return Arrays(self)


@dataclass(frozen=True)
class StepTensors:
    """Of one step, with room for the largest: B rows and T tokens, S rows of which sample. Each begins at a multiple of
    128 bytes: kernels are compiled anew for pointers of another alignment."""

    # From the host.
    report: torch.Tensor
    """[1] int32: the line of `results` that takes the step's tokens."""
    rows: torch.Tensor
    """[B] int32: each one's row of the tables; -1: padding, which computes and leaves no trace."""
    starts: torch.Tensor
    """[B] int32: tokens computed before."""
    query_starts: torch.Tensor
    """[B + 1] int32: row i's tokens are query_starts[i]:query_starts[i + 1]."""
    sampling: torch.Tensor
    """[S] int32: index among the B rows; of rows whose logits several sample from, more than once."""
    sampling_rows: torch.Tensor
    """[S] int32: the row of the tables that takes each sampled token."""

    # Derived.
    token_ids: torch.Tensor
    """[T] int64; of padding 0."""
    positions: torch.Tensor
    """[T] int64; of padding 0."""
    slots: torch.Tensor
    """[T] int64: block * block_size + offset; of padding -1."""
    seq_lens: torch.Tensor
    """[B] int32: with the new tokens; of padding 0."""
    sample_index: torch.Tensor
    """[S] int64: index among the T tokens of the last one of each row that samples."""
    block_tables: torch.Tensor
    """[B, M] int32; entries past a sequence's last block keep what was there."""

    results: torch.Tensor
    """[lines, rows] int32: sampled tokens, -1 where the logits were not numbers."""

    @cached_property
    def arrays(self) -> Arrays:
        return Arrays(self)


def write_rows(tables: RowTensors, segments: torch.Tensor, values: torch.Tensor) -> None:
    """Writes segments [n, SEGMENT] int32 of `values` int32. No two may overlap."""
    if dispatch.on_gpu(tables.token_ids):
        from quire.kernels.gpu import step_inputs as gpu

        return gpu.write_rows(tables, segments, values)
    for table, row, column, offset, count, *_ in segments.tolist():
        target = tables.block_tables if table else tables.token_ids
        target[row, column : column + count] = values[offset : offset + count]


def copy_rows(tables: RowTensors, copies: torch.Tensor) -> None:
    """Copies [n, COPY] int32, all at once: no row that is copied becomes a copy, and none becomes one twice."""
    if dispatch.on_gpu(tables.token_ids):
        from quire.kernels.gpu import step_inputs as gpu

        return gpu.copy_rows(tables, copies)
    for source, target, num_tokens, num_blocks in copies.tolist():
        for table, count in ((tables.token_ids, num_tokens), (tables.block_tables, num_blocks)):
            table[target, :count] = table[source, :count]


def derive_inputs(
    tables: RowTensors, step: StepTensors, num_rows: int, num_tokens: int, num_sampling: int, block_size: int
) -> None:
    """Fills what is derived. As many tokens as rows: each row brings one, and `query_starts` is not read. Where
    `num_sampling` is 0 neither is `sampling`."""
    if dispatch.on_gpu(tables.token_ids):
        from quire.kernels.gpu import step_inputs as gpu

        return gpu.derive_inputs(tables, step, num_rows, num_tokens, num_sampling, block_size)
    here, blocks = step.arrays, tables.arrays.block_tables
    rows, starts, seq_lens = here.rows[:num_rows], here.starts[:num_rows], here.seq_lens[:num_rows]
    if num_tokens == num_rows:
        token_rows, positions, ends = rows, starts, None
        np.add(starts, 1, out=seq_lens)
    else:
        query_starts = here.query_starts[: num_rows + 1]
        counts = np.diff(query_starts)
        np.add(starts, counts, out=seq_lens)
        token_rows, ends = np.repeat(rows, counts), query_starts[1:] - 1
        positions = np.arange(num_tokens, dtype=np.int32) - np.repeat(query_starts[:-1] - starts, counts)
    columns, offsets = positions // block_size, positions % block_size
    here.token_ids[:num_tokens] = tables.arrays.token_ids[token_rows, positions]
    here.positions[:num_tokens] = positions
    # Slots of a large pool need more than 32 bits.
    slots = here.slots[:num_tokens]
    slots[:] = blocks[token_rows, columns]
    slots *= block_size
    slots += offsets
    if num_sampling:
        sampling = here.sampling[:num_sampling]
        here.sample_index[:num_sampling] = sampling if ends is None else ends[sampling]
    width = -(-int(seq_lens.max(initial=0)) // block_size)
    here.block_tables[:num_rows, :width] = blocks[rows, :width]
    if rows.min(initial=0) < 0:
        seq_lens[rows < 0] = 0
        padded = np.flatnonzero(token_rows < 0)
        for target, value in ((here.token_ids, 0), (here.positions, 0), (here.slots, -1)):
            target[padded] = value


def store_tokens(
    tables: RowTensors,
    step: StepTensors,
    tokens: torch.Tensor,  # [S] int64, -1: could not be sampled
    are_some: bool,
) -> None:
    """Each token goes behind its row's last, where a step sent ahead looks it up, and into the results. They belong to
    `sampling_rows` if `are_some`, else to all rows of the step in their order, padding too."""
    if dispatch.on_gpu(tables.token_ids):
        from quire.kernels.gpu import step_inputs as gpu

        return gpu.store_tokens(tables, step, tokens, are_some)
    here, sampled = step.arrays, tokens.numpy()
    count = len(sampled)
    rows, lengths = here.rows[:count], here.seq_lens[:count]
    if are_some:
        rows, lengths = here.sampling_rows[:count], here.seq_lens[here.sampling[:count]]
    here.results[here.report[0], :count] = sampled
    if rows.min(initial=0) < 0:
        exists = rows >= 0
        rows, lengths, sampled = rows[exists], lengths[exists], sampled[exists]
    # What could not be sampled is still a token: it may be looked up.
    tables.arrays.token_ids[rows, lengths] = np.maximum(sampled, 0)
