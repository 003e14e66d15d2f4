"""The rows of the sequences that run here: a cache of the controller's truth, changed by the differences in a plan.

What kernels read lies on the device: token ids, which the device itself extends with what it samples, and block
tables. What the host decides by lies in NumPy arrays beside it. Invariant: a refused plan leaves no trace; work is
proportional to what a plan changes and to the rows that it names, never to the rows that there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from quire.kernels import dispatch
from quire.kernels.step_inputs import RowTensors
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

    is_decode: bool
    """Every row computes one token and samples one more."""

    writes: list[Write]
    """What the plan brought that the device's rows have yet to be told, in no order: no two overlap."""


@dataclass(frozen=True, slots=True)
class Write:
    """Values for one of the device's rows, on the host."""

    in_blocks: bool
    """Block ids; else token ids."""
    row: int
    column: int
    values: np.ndarray
    """[n] int32."""


@dataclass(frozen=True, slots=True)
class _Admission:
    row: int
    token_ids: np.ndarray
    block_ids: np.ndarray
    settings: RowSettings


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
        self._counts = np.zeros((4, size.num_rows), np.int64)
        # Each [num_rows], and 0 where no sequence is.
        self.num_known, self.num_computed, self.num_prompt, self.num_blocks = self._counts
        self._place = np.zeros(size.num_rows, np.int64)
        self._index = np.arange(size.num_rows)
        self._ones = np.ones(size.num_rows, np.int64)
        self._last_rows = (b"", np.empty(0, np.int64))
        """The rows that computed last, as they came and as they are: mostly they are the same again."""

    @property
    def token_ids(self) -> torch.Tensor:
        return self.tensors.token_ids

    @property
    def block_table(self) -> torch.Tensor:
        return self.tensors.block_tables

    def clear(self) -> None:
        """Empties every row."""
        self.sampler.retire(range(self.size.num_rows))
        self._counts[:] = 0

    def apply(self, plan: worker_pb2.StepPlan) -> Work:
        """Changes the rows and says what they compute. Raises PlanError, and then nothing has changed."""
        retired = _ints(plan.retire_rows)
        extend_rows, extend_blocks = _ints(plan.extend_rows), _ints(plan.extend_blocks)
        _check_ids(retired, self.size.num_rows, "row")
        _check_ids(extend_rows, self.size.num_rows, "row")
        touched = np.concatenate([retired, extend_rows]) if retired.size or extend_rows.size else retired
        before = self._counts[:, touched]
        admissions: list[_Admission] = []
        try:
            self._retire(retired)
            for admit in plan.admits:
                admissions.append(self._check_admission(admit))
                self._counts[:, admit.row] = _counts_of(admit, admissions[-1])
            columns = self._extend(extend_rows, extend_blocks)
            writes: list[Write] = []
            work = self._check_work(plan, writes)
        except PlanError:
            for admission in admissions:
                self._counts[:, admission.row] = 0
            self._counts[:, touched] = before
            raise
        self.sampler.retire(retired.tolist())
        for admission in admissions:
            self._admit(admission, writes)
        if columns.size:
            self.host_blocks[extend_rows, columns] = extend_blocks
            if not self.is_on_host:
                ends = zip(extend_rows.tolist(), columns.tolist(), extend_blocks.astype(np.int32)[:, None], strict=True)
                writes += [Write(True, row, column, block) for row, column, block in ends]
        return work

    def advance(self, work: Work) -> None:
        """The step has been issued: its tokens will have been sampled before anything reads them."""
        if work.is_decode:
            self.num_computed[work.rows] += 1
            self.num_known[work.rows] += 1
            return
        self.num_computed[work.rows] += work.num_tokens
        self.num_known[work.sampling_rows] += 1

    def _admit(self, admission: _Admission, writes: list[Write]) -> None:
        row = admission.row
        self.host_blocks[row, : len(admission.block_ids)] = admission.block_ids
        if self.is_on_host:
            self.token_ids.numpy()[row, : len(admission.token_ids)] = admission.token_ids
        else:
            writes.append(Write(False, row, 0, admission.token_ids))
            writes.append(Write(True, row, 0, admission.block_ids))
        self.sampler.admit(row, admission.settings)

    def _retire(self, rows: np.ndarray) -> None:
        if rows.size:
            self._check_occupied(rows, "retired")
            self._check_once(rows, "retired")
            self._counts[:, rows] = 0

    def _check_admission(self, admit: worker_pb2.Admit) -> _Admission:
        row, size = admit.row, self.size
        _check_ids(np.array([row]), size.num_rows, "row")
        if self.num_known[row]:
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
        return _Admission(row, tokens.astype(np.int32), blocks.astype(np.int32), settings)

    def _extend(self, rows: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Counts the new blocks; returns the index of each in its row's table."""
        if len(rows) != len(blocks):
            raise PlanError(f"{len(rows)} extend_rows but {len(blocks)} extend_blocks")
        if not rows.size:
            return rows
        self._check_occupied(rows, "extended")
        _check_ids(blocks, self.size.num_blocks, "extend_blocks: block id")
        columns: np.ndarray = self.num_blocks[rows]
        if not self._are_different(rows):
            columns += _occurrence(rows)
        counts = columns + 1  # of equal rows the last one stays, which has the most
        self.num_blocks[rows] = counts
        if counts.max() > self.size.blocks_per_row:
            row = rows[counts.argmax()]
            raise PlanError(f"row {row} has {self.num_blocks[row]} blocks; {self.size.blocks_per_row} at most")
        return columns

    def _check_work(self, plan: worker_pb2.StepPlan, writes: list[Write]) -> Work:
        rows = self._rows_of(plan.rows)
        is_single = not plan.num_tokens
        num_tokens = self._ones[: len(rows)] if is_single else _ints(plan.num_tokens)
        if len(rows) != len(num_tokens):
            raise PlanError(f"{len(rows)} rows but {len(num_tokens)} num_tokens")
        known, starts, blocks = self.num_known[rows], self.num_computed[rows], self.num_blocks[rows]
        if not known.all():
            raise PlanError(f"row {rows[known.argmin()]} is computed but empty")
        ends = starts + num_tokens
        wrong = (ends > np.minimum(known, self.size.max_model_len)) | (ends > blocks * self.size.block_size)
        if not is_single:
            wrong |= num_tokens < 1
        if wrong.any():
            i = wrong.argmax()
            raise PlanError(
                f"row {rows[i]} computes {num_tokens[i]} tokens after {starts[i]}, with {known[i]} known, {blocks[i]} "
                f"blocks of {self.size.block_size} and a longest sequence of {self.size.max_model_len}"
            )
        total = int(num_tokens.sum())
        if total > self.size.max_num_batched_tokens:
            raise PlanError(f"a step of {total} tokens; {self.size.max_num_batched_tokens} at most")
        is_last = ends == known
        if is_last.all():
            return Work(rows, num_tokens, starts, self._index[: len(rows)], rows, total == len(rows), writes)
        sampling = np.flatnonzero(is_last)
        return Work(rows, num_tokens, starts, sampling, rows[sampling], False, writes)

    def _rows_of(self, packed: bytes) -> np.ndarray:
        """The rows that compute, in range and each once."""
        if packed == self._last_rows[0]:
            return self._last_rows[1]
        rows = _ints(packed)
        _check_ids(rows, self.size.num_rows, "row")
        self._check_once(rows, "computed")
        self._last_rows = packed, rows
        return rows

    def _check_occupied(self, rows: np.ndarray, verb: str) -> None:
        known = self.num_known[rows]
        if not known.all():
            raise PlanError(f"row {rows[known.argmin()]} is {verb} but empty")

    def _are_different(self, rows: np.ndarray) -> bool:
        index = self._index[: len(rows)]
        if len(index) < len(rows):
            return False
        self._place[rows] = index  # of equal ones, one place stays
        return bool((self._place[rows] == index).all())

    def _check_once(self, rows: np.ndarray, verb: str) -> None:
        if not self._are_different(rows):
            times = np.bincount(rows)
            raise PlanError(f"row {times.argmax()} is {verb} {times.max()} times in one step")


def _counts_of(admit: worker_pb2.Admit, admission: _Admission) -> tuple[int, int, int, int]:
    return len(admission.token_ids), admit.num_computed_tokens, admit.num_prompt_tokens, len(admission.block_ids)


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
