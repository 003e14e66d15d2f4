"""The rows of the sequences that run here: a cache of the controller's truth, changed by the differences in a plan.

What kernels read lies on the device: token ids, which the device itself extends with what it samples, and block
tables. What the host decides by lies in NumPy arrays beside it. Invariant: a plan is checked whole before any of it
is applied, so a refused plan leaves no trace; work is proportional to what a plan changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from quire.protos import worker_pb2
from quire.worker.sampler import RowSettings, Sampler

KNOWN, COMPUTED, PROMPT, BLOCKS = range(4)
"""Lines of the counts: tokens known, tokens whose KV is computed, prompt tokens, blocks in the table."""


class PlanError(ValueError):
    """A plan that cannot be carried out: the controller and this worker disagree about the rows."""


@dataclass(frozen=True, slots=True)
class TableSize:
    num_rows: int
    max_model_len: int
    """Longest sequence in tokens."""
    max_num_batched_tokens: int
    """Tokens of the largest step."""
    block_size: int
    num_blocks: int
    """Blocks in the pool: block ids are below it."""
    vocab_size: int

    @property
    def blocks_per_row(self) -> int:
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True, slots=True)
class Work:
    """What the rows of one step compute; arrays on the host."""

    rows: np.ndarray
    """[B] int64."""
    num_tokens: np.ndarray
    """[B] int64."""
    starts: np.ndarray
    """[B] int64: tokens computed before."""
    sampling: np.ndarray
    """[S] int64: index among the B rows of those that compute their last known token and sample one more."""

    sampling_rows: np.ndarray
    """[S] int64: the rows of these."""


@dataclass(frozen=True, slots=True)
class _Admission:
    row: int
    token_ids: np.ndarray
    block_ids: np.ndarray
    settings: RowSettings


@dataclass(frozen=True, slots=True)
class _Change:
    """A plan, checked: what to write where."""

    counts: np.ndarray
    retired: np.ndarray
    admissions: list[_Admission]
    extended: np.ndarray
    """[3, k] int64: row, index in its table, block id."""
    work: Work


class RowTable:
    def __init__(self, size: TableSize, device: torch.device | str) -> None:
        self.size = size
        self.device = torch.device(device)
        # One column more than the longest sequence: where the token sampled after its last one goes.
        self.token_ids = torch.zeros(size.num_rows, size.max_model_len + 1, dtype=torch.int32, device=device)
        self.host_blocks = np.zeros((size.num_rows, size.blocks_per_row), np.int32)
        """The block tables once more, for whoever decides on the host; on a CPU the very same memory."""
        on_host = torch.from_numpy(self.host_blocks)
        self.block_table = on_host if self.device.type == "cpu" else on_host.to(device)
        self.sampler = Sampler(size.num_rows)
        self._counts = np.zeros((4, size.num_rows), np.int64)
        # Each [num_rows], and 0 where no sequence is.
        self.num_known, self.num_computed, self.num_prompt, self.num_blocks = self._counts

    def clear(self) -> None:
        """Empties every row."""
        self.sampler.retire(range(self.size.num_rows))
        self._counts[:] = 0

    def apply(self, plan: worker_pb2.StepPlan) -> Work:
        """Changes the rows and says what they compute. Raises PlanError, and then nothing has changed."""
        change = self._check(plan)
        self.sampler.retire(change.retired.tolist())
        for admission in change.admissions:
            self._admit(admission)
        if change.extended.size:
            self.host_blocks[change.extended[0], change.extended[1]] = change.extended[2]
            if self.device.type != "cpu":
                rows, columns, blocks = self._upload(change.extended)
                self.block_table.index_put_((rows, columns), blocks.int())
        self._counts[:] = change.counts
        return change.work

    def advance(self, work: Work, tokens: torch.Tensor) -> None:
        """The step has been computed and [S] int64 tokens were sampled."""
        self._counts[COMPUTED, work.rows] += work.num_tokens
        rows = work.sampling_rows
        if rows.size:
            at = self._upload(np.stack([rows, self.num_known[rows]]))
            # -1 marks a token that could not be sampled; a step sent ahead may still look it up.
            self.token_ids.index_put_((at[0], at[1]), tokens.clamp(min=0).int())
            self._counts[KNOWN, rows] += 1

    def _admit(self, admission: _Admission) -> None:
        row = admission.row
        self.token_ids[row, : len(admission.token_ids)] = self._upload(admission.token_ids)
        self.host_blocks[row, : len(admission.block_ids)] = admission.block_ids
        if self.device.type != "cpu":
            self.block_table[row, : len(admission.block_ids)] = self._upload(admission.block_ids)
        self.sampler.admit(row, admission.settings)

    def _check(self, plan: worker_pb2.StepPlan) -> _Change:
        counts = self._counts.copy()
        retired = self._check_retired(counts, plan)
        admissions = [self._check_admission(counts, admit) for admit in plan.admits]
        extended = self._check_extended(counts, plan)
        return _Change(counts, retired, admissions, extended, self._check_work(counts, plan))

    def _check_retired(self, counts: np.ndarray, plan: worker_pb2.StepPlan) -> np.ndarray:
        rows = _ints(plan.retire_rows)
        if not rows.size:
            return rows
        self._check_occupied(counts, rows, "retired")
        self._check_once(rows, "retired")
        counts[:, rows] = 0
        return rows

    def _check_admission(self, counts: np.ndarray, admit: worker_pb2.Admit) -> _Admission:
        row, size = admit.row, self.size
        self._check_range(np.array([row]))
        if counts[KNOWN, row]:
            raise PlanError(f"row {row} is admitted but occupied; retire it first")
        tokens, blocks = _ints(admit.token_ids), _ints(admit.block_ids)
        known, prompt, computed = len(tokens), admit.num_prompt_tokens, admit.num_computed_tokens
        if not 1 <= known <= size.max_model_len:
            raise PlanError(f"row {row} is admitted with {known} tokens; 1 to {size.max_model_len} fit")
        if not 1 <= prompt <= known or not 0 <= computed <= known:
            raise PlanError(f"row {row}: {prompt} prompt and {computed} computed of {known} known tokens")
        _check_ids(tokens, size.vocab_size, f"row {row}: token id")
        _check_ids(blocks, size.num_blocks, f"row {row}: block id")
        if not computed <= len(blocks) * size.block_size or len(blocks) > size.blocks_per_row:
            raise PlanError(
                f"row {row}: {len(blocks)} blocks for {computed} computed tokens; at most {size.blocks_per_row} fit"
            )
        try:
            settings = RowSettings.read(admit.sampling, size.vocab_size)
        except ValueError as error:
            raise PlanError(f"row {row}: {error}") from None
        counts[:, row] = known, computed, prompt, len(blocks)
        return _Admission(row, tokens.astype(np.int32), blocks.astype(np.int32), settings)

    def _check_extended(self, counts: np.ndarray, plan: worker_pb2.StepPlan) -> np.ndarray:
        rows, blocks = _ints(plan.extend_rows), _ints(plan.extend_blocks)
        if len(rows) != len(blocks):
            raise PlanError(f"{len(rows)} extend_rows but {len(blocks)} extend_blocks")
        if not rows.size:
            return np.empty((3, 0), np.int64)
        self._check_occupied(counts, rows, "extended")
        _check_ids(blocks, self.size.num_blocks, "extend_blocks: block id")
        columns = counts[BLOCKS, rows] + _occurrence(rows)
        np.add.at(counts[BLOCKS], rows, 1)
        over = counts[BLOCKS] > self.size.blocks_per_row
        if over.any():
            row = over.argmax()
            raise PlanError(f"row {row} has {counts[BLOCKS, row]} blocks; {self.size.blocks_per_row} at most")
        return np.stack([rows, columns, blocks])

    def _check_work(self, counts: np.ndarray, plan: worker_pb2.StepPlan) -> Work:
        rows = _ints(plan.rows)
        num_tokens = _ints(plan.num_tokens) if plan.num_tokens else np.ones(len(rows), np.int64)
        if len(rows) != len(num_tokens):
            raise PlanError(f"{len(rows)} rows but {len(num_tokens)} num_tokens")
        self._check_occupied(counts, rows, "computed")
        self._check_once(rows, "computed")
        known, starts, _, blocks = counts[:, rows]
        ends = starts + num_tokens
        wrong = (num_tokens < 1) | (ends > np.minimum(known, self.size.max_model_len))
        wrong |= ends > blocks * self.size.block_size
        if wrong.any():
            i = wrong.argmax()
            raise PlanError(
                f"row {rows[i]} computes {num_tokens[i]} tokens after {starts[i]}, with {known[i]} known, {blocks[i]} "
                f"blocks of {self.size.block_size} and a longest sequence of {self.size.max_model_len}"
            )
        if num_tokens.sum() > self.size.max_num_batched_tokens:
            raise PlanError(f"a step of {num_tokens.sum()} tokens; {self.size.max_num_batched_tokens} at most")
        sampling = np.flatnonzero(ends == known)
        return Work(rows, num_tokens, starts, sampling, rows[sampling])

    def _check_occupied(self, counts: np.ndarray, rows: np.ndarray, verb: str) -> None:
        self._check_range(rows)
        empty = counts[KNOWN, rows] == 0
        if empty.any():
            raise PlanError(f"row {rows[empty.argmax()]} is {verb} but empty")

    def _check_range(self, rows: np.ndarray) -> None:
        _check_ids(rows, self.size.num_rows, "row")

    def _check_once(self, rows: np.ndarray, verb: str) -> None:
        times = np.bincount(rows, minlength=1)
        if times.max() > 1:
            raise PlanError(f"row {times.argmax()} is {verb} {times.max()} times in one step")

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _ints(packed: bytes) -> np.ndarray:
    """Packed int32 to int64: what indexes arrays without another conversion."""
    if len(packed) % 4:
        raise PlanError(f"{len(packed)} bytes are no array of 32-bit integers")
    return np.frombuffer(packed, "<i4").astype(np.int64)


def _check_ids(ids: np.ndarray, limit: int, what: str) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= limit):
        wrong = ids[(ids < 0) | (ids >= limit)][0]
        raise PlanError(f"{what} {wrong} is not in 0 to {limit - 1}")


def _occurrence(values: np.ndarray) -> np.ndarray:
    """How many equal values come before each: [7, 3, 7, 7] gives [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    index = np.arange(len(values))
    first = np.searchsorted(ordered, ordered)
    occurrence = np.empty_like(index)
    occurrence[order] = index - first
    return occurrence
