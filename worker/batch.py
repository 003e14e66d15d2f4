"""One step's inputs: a few integers per row on their way to the device, and the flat tensors that are derived from them
there, which the decoder and the kernels read.

Rows of a batch are sequences; each brings one or more new tokens, laid end to end. Nothing distinguishes prefill
from decode but the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from quire.kernels import dispatch
from quire.kernels.attention import PagedRows, SharedPrefixes
from quire.kernels.shared_prefix import FEWEST_ROWS, FEWEST_TOKENS, find_shared_prefixes
from quire.kernels.step_inputs import (
    COPY,
    LONGEST_SEGMENT,
    SEGMENT,
    StepTensors,
    copy_rows,
    derive_inputs,
    write_rows,
)

if TYPE_CHECKING:  # the decoder needs the batch and not the table
    from quire.worker.table import RowTable
    from quire.worker.transfer import Transfer
    from quire.worker.work import Changes, Work, Write

Words = TypeVar("Words", np.ndarray, torch.Tensor)

ALIGNED = 32
"""Words of int32: sections begin at multiples of 128 bytes."""

ROOM = 1 << 16
"""Words beside those of every step: settings, prompts, blocks. What does not fit travels by itself."""


@dataclass(slots=True)
class Batch:
    """Inputs of one forward pass; T new tokens of B rows, S of which sample. They are written anew for the next one."""

    token_ids: torch.Tensor
    """[T] int64."""

    positions: torch.Tensor
    """[T] int64: index of each token in its sequence."""

    slots: torch.Tensor
    """[T] int64: where each token's K/V goes: block * block_size + offset; of padding -1."""

    rows: PagedRows
    """What attention needs to know of the B rows."""

    sample_index: torch.Tensor | None
    """[S] int64: index among the T tokens of the last token of each row that samples; None: all tokens sample."""


class Parcel:
    """What one step sends to the device, in one copy."""

    def __init__(self, staging: torch.Tensor, device: torch.Tensor, used: int) -> None:
        self.staging, self.device, self.used = staging, device, used
        self.words: np.ndarray = staging.numpy()

    def place(self, array: np.ndarray) -> torch.Tensor:
        """Takes an array of int32 along. Returns where it will be, flat, once the parcel is sent."""
        start, stop = self.used, self.used + array.size
        if stop > len(self.words):
            return torch.from_numpy(array.ravel()).to(self.device.device, non_blocking=True)
        self.words[start:stop] = array.ravel()
        self.used = _aligned(stop)
        return self.device[start:stop]


class StepInputs:
    """The memory that steps over one table are fed through. Each step writes it anew, in the order in which the device
    takes them; on the host every line of the transfer has memory of its own."""

    def __init__(self, table: RowTable, transfer: Transfer) -> None:
        size, device = table.size, table.device
        rows, tokens = size.num_rows, max(size.num_rows, size.max_num_batched_tokens)
        self._table, self._transfer = table, transfer
        # The line of results, rows, starts, query_starts, sampling and its rows; then room.
        self._lengths = (1, rows, rows, rows + 1, rows, rows)
        self._starts = np.cumsum([0, *map(_aligned, self._lengths)]).tolist()
        self._device = torch.zeros(self._starts[-1] + ROOM, dtype=torch.int32, device=device)
        self._staging = [transfer.staging(self._device) for _ in range(transfer.num_lines)]
        self._index = np.arange(rows + 1, dtype=np.int32)
        self.singles = torch.from_numpy(self._index).to(device)
        """[rows + 1] int32: query_starts of rows of one token each, on the device."""

        def derived(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        report, rows_, starts, query_starts, sampling, sampling_rows = self._sections(self._device)
        self.step = StepTensors(
            report=report,
            rows=rows_,
            starts=starts,
            query_starts=query_starts,
            sampling=sampling,
            sampling_rows=sampling_rows,
            token_ids=derived(tokens),
            positions=derived(tokens),
            slots=derived(tokens),
            seq_lens=derived(rows, dtype=torch.int32),
            sample_index=derived(rows),
            block_tables=derived(rows, size.blocks_per_row, dtype=torch.int32),
            results=derived(transfer.num_lines, rows, dtype=torch.int32),
        )

    def load(self, line: int, work: Work, padded: int = 0) -> Parcel:
        """Takes the step along, its rows padded to at least `padded`; more may be placed beside it."""
        parcel = Parcel(self._staging[line], self._device, self._starts[-1])
        report, rows, starts, query_starts, sampling, sampling_rows = self._sections(parcel.words)
        num_rows = len(work.rows)
        report[0] = line
        rows[:num_rows] = work.rows
        starts[:num_rows] = work.starts
        if padded > num_rows:
            rows[num_rows:padded] = -1
            starts[num_rows:padded] = 0
        if work.is_decode:
            return parcel
        query_starts[0] = 0
        np.cumsum(work.num_tokens, out=query_starts[1 : num_rows + 1])
        sampling[: len(work.sampling)] = work.sampling
        sampling_rows[: len(work.sampling)] = work.sampling_rows
        return parcel

    def send(self, parcel: Parcel, changes: Changes) -> None:
        """What the plan brought for the rows goes along, and is done to them."""
        tables = self._table.tensors
        forks, branches = (parcel.place(each) if len(each) else None for each in (changes.forks, changes.branches))
        writes = [parcel.place(part) for part in _segments(changes.writes)] if changes.writes else []
        self._transfer.send(parcel.staging, parcel.device, parcel.used)
        if forks is not None:
            copy_rows(tables, forks.view(-1, COPY))
        if writes:
            write_rows(tables, writes[0].view(-1, SEGMENT), writes[1])
        if branches is not None:
            copy_rows(tables, branches.view(-1, COPY))

    def batch(self, parcel: Parcel, work: Work, deterministic: bool, shared: SharedPrefixes | None) -> Batch:
        """The tensors of the step that was sent."""
        step, block_size = self.step, self._table.size.block_size
        num_rows, num_sampling = len(work.rows), len(work.sampling)
        ends = (work.starts + work.num_tokens).astype(np.int32)
        if work.is_decode:
            # The results' rows are the step's, in order.
            num_tokens, num_sampling = num_rows, 0
            query_starts, starts = self._index, self.singles
        else:
            query_starts, starts = self._sections(parcel.words)[3], step.query_starts
            num_tokens = int(query_starts[num_rows])
        derive_inputs(self._table.tensors, step, num_rows, num_tokens, num_sampling, block_size)
        return Batch(
            token_ids=step.token_ids[:num_tokens],
            positions=step.positions[:num_tokens],
            slots=step.slots[:num_tokens],
            rows=PagedRows(
                block_tables=step.block_tables[:num_rows, : -(-int(ends.max()) // block_size)],
                query_starts=query_starts[: num_rows + 1],
                seq_lens=ends,
                deterministic=deterministic,
                shared=shared,
                on_device=(starts[: num_rows + 1], step.seq_lens[:num_rows]) if dispatch.on_gpu(starts) else None,
            ),
            sample_index=None if work.is_decode else step.sample_index[:num_sampling],
        )

    def static_batch(self, num_rows: int, deterministic: bool) -> Batch:
        """The same for a decode step of so many rows, padding among them, whatever they are when it is replayed."""
        step, size = self.step, self._table.size
        derive_inputs(self._table.tensors, step, num_rows, num_rows, 0, size.block_size)
        return Batch(
            token_ids=step.token_ids[:num_rows],
            positions=step.positions[:num_rows],
            slots=step.slots[:num_rows],
            rows=PagedRows(
                block_tables=step.block_tables[:num_rows],
                query_starts=self._index[: num_rows + 1],
                seq_lens=np.full(num_rows, size.max_model_len, np.int32),
                deterministic=deterministic,
                on_device=(self.singles[: num_rows + 1], step.seq_lens[:num_rows]),
                static=True,
            ),
            sample_index=None,
        )

    def clear(self, num_rows: int) -> None:
        """Leaves nothing but padding in the first rows, on the device: for whoever records a step."""
        self.step.rows[:num_rows] = -1
        self.step.starts[:num_rows] = 0
        self.step.report.zero_()

    def _sections(self, words: Words) -> tuple[Words, ...]:
        """The line of results, rows, starts, query_starts, sampling and its rows."""
        return tuple(words[i : i + n] for i, n in zip(self._starts, self._lengths, strict=False))


def find_shared(table: RowTable, work: Work) -> SharedPrefixes | None:
    """Rows that begin with the same blocks. That none do, as mostly, is known after one look at each row."""
    size = table.size
    ends = work.starts + work.num_tokens
    long = work.rows[(ends > FEWEST_TOKENS) & (work.num_tokens == 1)]
    if len(long) < FEWEST_ROWS:
        return None
    blocks = np.sort(table.host_blocks[long, -(-FEWEST_TOKENS // size.block_size) - 1])
    if not (blocks[1:] == blocks[:-1]).any():
        return None
    width = -(-int(ends.max()) // size.block_size)
    return find_shared_prefixes(table.host_blocks[work.rows, :width], ends, work.num_tokens, size.block_size)


def _segments(writes: list[Write]) -> tuple[np.ndarray, np.ndarray]:
    """What `write_rows` takes: segments [n, SEGMENT] and the values that they name."""
    segments, offset = [], 0
    for write in writes:
        for start in range(0, len(write.values), LONGEST_SEGMENT):
            count = min(LONGEST_SEGMENT, len(write.values) - start)
            segments.append((write.in_blocks, write.row, write.column + start, offset + start, count, 0, 0, 0))
        offset += len(write.values)
    return np.array(segments, np.int32), np.concatenate([write.values for write in writes])


def _aligned(words: int) -> int:
    return -(-words // ALIGNED) * ALIGNED
