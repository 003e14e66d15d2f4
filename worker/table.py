"""The rows of the sequences that run here: a cache of the controller's truth, changed by the differences in a plan.

What kernels read lies on the device: token ids, which the device itself extends with what it samples, and block
tables. What the host decides by lies in NumPy arrays beside it. Invariant: a refused plan leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from quire.kernels import dispatch
from quire.kernels.step_inputs import COPY, RowTensors
from quire.protos import worker_pb2
from quire.worker.counts import RowCounts, TableSize
from quire.worker.sampler import Sampler
from quire.worker.work import Admission, Changes, Checked, Copy, Work, Write


class RowTable:
    def __init__(self, size: TableSize, device: torch.device | str) -> None:
        self.size = size
        self.device = torch.device(device)
        # One column more than the longest sequence: where the token sampled after its last one goes.
        tokens = torch.zeros(size.num_rows, size.max_model_len + 1, dtype=torch.int32, device=device)
        self.host_blocks = np.zeros((size.num_rows, size.blocks_per_row), np.int32)
        """The block tables once more, for whoever decides on the host; on a CPU the very same memory."""
        self.is_on_host = not dispatch.on_gpu(tokens)
        on_host = torch.from_numpy(self.host_blocks)
        self.tensors = RowTensors(tokens, on_host if self.is_on_host else on_host.to(device, copy=True))
        """What kernels read."""
        self.sampler = Sampler(size.num_rows, size.vocab_size)
        self.counts = RowCounts(size)
        self.num_blocks_seen = 0
        """One more than the highest block that a row has ever had."""

    @property
    def token_ids(self) -> torch.Tensor:
        return self.tensors.token_ids

    @property
    def block_table(self) -> torch.Tensor:
        return self.tensors.block_tables

    def clear(self) -> None:
        """Empties every row."""
        self.sampler.retire(range(self.size.num_rows))
        self.counts.clear()

    def apply(self, plan: worker_pb2.StepPlan) -> Work:
        """Changes the rows and says what they compute. Raises PlanError, and then nothing has changed."""
        checked = self.counts.apply(plan)
        self.sampler.retire(checked.retired.tolist())
        self._copy(checked.forks)
        for admission in checked.admissions:
            self._admit(admission)
        if checked.replaced.size:
            rows, entries, blocks = checked.replaced.T
            self.host_blocks[rows, entries] = blocks
            self._see(blocks)
        rows, entries, blocks = checked.extended
        if rows.size:
            self.host_blocks[rows, entries] = blocks
            self._see(blocks)
        if not self.is_on_host:
            self._tell_device(checked, checked.work.changes)
        elif checked.told.size:
            self.token_ids.numpy()[checked.told[:, 0], checked.positions] = checked.told[:, 1]
        self._copy(checked.branches)
        return checked.work

    def advance(self, work: Work) -> None:
        """The step has been issued: its tokens will have been sampled before anything reads them."""
        self.counts.advance(work)

    def _admit(self, admission: Admission) -> None:
        row = admission.row
        self.host_blocks[row, : len(admission.block_ids)] = admission.block_ids
        self._see(admission.block_ids)
        if self.is_on_host:
            self.token_ids.numpy()[row, : len(admission.token_ids)] = admission.token_ids
        self.sampler.admit(row, admission.settings)

    def _see(self, blocks: np.ndarray) -> None:
        self.num_blocks_seen = max(self.num_blocks_seen, int(blocks.max(initial=-1)) + 1)

    def _copy(self, copies: list[Copy]) -> None:
        """Settings, and what lies on the host."""
        for parent, child, seed, num_tokens, num_blocks in copies:
            self.sampler.fork(parent, child, seed)
            self.host_blocks[child, :num_blocks] = self.host_blocks[parent, :num_blocks]
            if self.is_on_host:
                tokens = self.token_ids.numpy()
                tokens[child, :num_tokens] = tokens[parent, :num_tokens]

    def _tell_device(self, checked: Checked, changes: Changes) -> None:
        """When the host's tables are as the step needs them."""
        if checked.forks or checked.branches:
            changes.forks, changes.branches = _copies(checked.forks), _copies(checked.branches)
        writes = changes.writes
        for admission in checked.admissions:
            row, num_blocks = admission.row, len(admission.block_ids)
            writes.append(Write(False, row, 0, admission.token_ids))
            writes.append(Write(True, row, 0, self.host_blocks[row, :num_blocks].copy()))
        writes += _writes(True, *checked.extended)
        if checked.told.size:
            writes += _writes(False, checked.told[:, 0], checked.positions, checked.told[:, 1])
        if checked.replaced.size:
            rows, entries, blocks = checked.replaced.T
            # What was replaced in a table that has just come came with it.
            is_old = ~np.isin(rows, [admission.row for admission in checked.admissions])
            writes += _writes(True, rows[is_old], entries[is_old], blocks[is_old])


def _copies(copies: list[Copy]) -> np.ndarray:
    """[n, COPY] int32."""
    return np.array([(c.parent, c.child, c.num_tokens, c.num_blocks) for c in copies], np.int32).reshape(-1, COPY)


def _writes(in_blocks: bool, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> Iterator[Write]:
    """Of one value each."""
    if rows.size:
        values = values.astype(np.int32)[:, None]
        for row, column, value in zip(rows.tolist(), columns.tolist(), values, strict=True):
            yield Write(in_blocks, row, column, value)
