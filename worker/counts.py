"""The numbers of the rows: how much each knows, has computed and holds. Every plan is checked against them.

Invariant: a refused plan leaves no trace; work is proportional to what a plan changes and to the rows that it names,
never to the rows that there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from quire.protos import worker_pb2
from quire.worker.checks import PlanError, check_different, check_ids, ints, occurrence, records
from quire.worker.sampler import RowSettings
from quire.worker.work import Admission, Changes, Checked, Copy, Work

KNOWN, COMPUTED, PROMPT, BLOCKS = range(4)
"""Lines of the counts: tokens known, tokens whose KV is computed, prompt tokens, blocks in the table."""

NOTHING = np.empty(0, np.int64)


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


class RowCounts:
    def __init__(self, size: TableSize) -> None:
        self.size = size
        self._counts = np.zeros((4, size.num_rows), np.int64)
        # Each [num_rows], and 0 where no sequence is.
        self.num_known, self.num_computed, self.num_prompt, self.num_blocks = self._counts
        self._place = np.zeros(size.num_rows, np.int64)
        self._index = np.arange(size.num_rows)
        self._ones = np.ones(size.num_rows, np.int64)
        self._last_rows = (b"", np.empty(0, np.int64))
        """The rows that computed last, as they came and as they are: mostly they are the same again."""

    def clear(self) -> None:
        """Empties every row."""
        self._counts[:] = 0

    def apply(self, plan: worker_pb2.StepPlan) -> Checked:
        """Counts what the plan changes before it computes. Raises PlanError, and then nothing has changed."""
        retired, rows, blocks = ints(plan.retire_rows), ints(plan.extend_rows), ints(plan.extend_blocks)
        check_ids(retired, self.size.num_rows, "row")
        check_ids(rows, self.size.num_rows, "row")
        told, replaced, children = self._shared(plan)
        touched = np.concatenate([retired, rows, children]) if retired.size or rows.size or children.size else retired
        before = self._counts[:, touched]
        admissions: list[Admission] = []
        try:
            self._retire(retired)
            for admit in plan.admits:
                admissions.append(self._check_admission(admit))
                self._counts[:, admit.row] = _counts_of(admit, admissions[-1])
            new = [admission.row for admission in admissions]
            forks = self._fork(plan.forks, new) if children.size else []
            positions = self._check_told(told, new) if told.size else NOTHING
            if replaced.size:
                self._check_replaced(replaced)
            columns = self._extend(rows, blocks)
            work, branches = self._check_work(plan)
        except PlanError:
            for admission in admissions:
                self._counts[:, admission.row] = 0
            self._counts[:, touched] = before
            raise
        return Checked(retired, admissions, forks, told, positions, replaced, (rows, columns, blocks), work, branches)

    def advance(self, work: Work) -> None:
        """The step has been issued: its tokens will have been sampled before anything reads them."""
        if work.is_decode:
            self.num_computed[work.rows] += 1
            self.num_known[work.rows] += 1
            return
        self.num_computed[work.rows] += work.num_tokens
        if work.num_branches:
            children = work.sampling_rows[-work.num_branches :]
            self.num_computed[children] = self.num_known[children]
        self.num_known[work.sampling_rows] += 1

    # -- rows that come and go

    def _retire(self, rows: np.ndarray) -> None:
        if rows.size:
            self._check_occupied(rows, "retired")
            self._check_once(rows, "retired")
            self._counts[:, rows] = 0

    def _check_admission(self, admit: worker_pb2.Admit) -> Admission:
        row, size = admit.row, self.size
        check_ids(np.array([row]), size.num_rows, "row")
        if self.num_known[row]:
            raise PlanError(f"row {row} is admitted but occupied; retire it first")
        tokens, blocks = ints(admit.token_ids), ints(admit.block_ids)
        known, prompt, computed = len(tokens), admit.num_prompt_tokens, admit.num_computed_tokens
        if not 1 <= known <= size.max_model_len:
            raise PlanError(f"row {row} is admitted with {known} tokens; 1 to {size.max_model_len} fit")
        if not 1 <= prompt <= known or not 0 <= computed <= known:
            raise PlanError(f"row {row}: {prompt} prompt and {computed} computed of {known} known tokens")
        check_ids(tokens, size.vocab_size, f"row {row}: token id")
        check_ids(blocks, size.num_blocks, f"row {row}: block id")
        if not computed <= len(blocks) * size.block_size or len(blocks) > size.blocks_per_row:
            raise PlanError(
                f"row {row}: {len(blocks)} blocks for {computed} computed tokens; at most {size.blocks_per_row} fit"
            )
        try:
            settings = RowSettings.read(admit.sampling, size.vocab_size)
        except ValueError as error:
            raise PlanError(f"row {row}: {error}") from None
        return Admission(row, tokens.astype(np.int32), blocks.astype(np.int32), settings)

    def _shared(self, plan: worker_pb2.StepPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is told and replaced, and the rows that become copies; rows are in range."""
        if not (plan.forks or plan.branches or plan.told or plan.replaced):
            return NOTHING, NOTHING, NOTHING
        told, replaced = records(plan.told, 2), records(plan.replaced, 3)
        forks = [(fork.parent, fork.child) for fork in chain(plan.forks, plan.branches)]
        pairs = np.array(forks, np.int64).reshape(-1, 2)
        for rows in (told[:, 0], replaced[:, 0], pairs):
            check_ids(rows, self.size.num_rows, "row")
        return told, replaced, pairs[:, 1]

    def _fork(self, forks: Sequence[worker_pb2.Fork], new: Sequence[int]) -> list[Copy]:
        """A device copies all at once, before it is told anything else: a parent is what earlier steps have left."""
        unsettled = {*new, *(fork.child for fork in forks)}
        for fork in forks:
            if fork.parent in unsettled:
                raise PlanError(f"row {fork.parent} is forked in the step in which it is new")
        return [self._copy(fork) for fork in forks]

    def _copy(self, fork: worker_pb2.Fork) -> Copy:
        parent, child = fork.parent, fork.child
        if not self.num_known[parent]:
            raise PlanError(f"row {parent} is forked but empty")
        if self.num_known[child]:
            raise PlanError(f"row {child} is to become a copy of row {parent} but occupied; retire it first")
        self._counts[:, child] = self._counts[:, parent]
        return Copy(parent, child, fork.seed, int(self.num_known[parent]), int(self.num_blocks[parent]))

    # -- what rows hold

    def _check_told(self, told: np.ndarray, new: Sequence[int]) -> np.ndarray:
        """Returns the position of each token."""
        rows, tokens = told.T
        self._check_occupied(rows, "told a token")
        check_different(rows, "row", "is told a token")
        check_ids(tokens, self.size.vocab_size, "told: token id")
        known, computed, prompt = self._counts[:BLOCKS, rows]
        wrong = (known != computed + 1) | (known <= prompt) | np.isin(rows, new)
        if wrong.any():
            i = wrong.argmax()
            raise PlanError(
                f"row {rows[i]} is told its last token but did not sample it: of {known[i]} known tokens {prompt[i]}"
                f" are prompt and {computed[i]} computed"
            )
        positions: np.ndarray = known - 1
        return positions

    def _check_replaced(self, replaced: np.ndarray) -> None:
        rows, entries, blocks = replaced.T
        self._check_occupied(rows, "given another block")
        check_ids(blocks, self.size.num_blocks, "replaced: block id")
        num_blocks = self.num_blocks[rows]
        wrong = (entries < 0) | (entries >= num_blocks)
        if wrong.any():
            i = wrong.argmax()
            raise PlanError(f"entry {entries[i]} of row {rows[i]} is replaced, which has {num_blocks[i]} blocks")
        check_different(rows * self.size.blocks_per_row + entries, "table entry", "is replaced")

    def _extend(self, rows: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Returns the entry of each new block in its row's table."""
        if len(rows) != len(blocks):
            raise PlanError(f"{len(rows)} extend_rows but {len(blocks)} extend_blocks")
        if not rows.size:
            return rows
        self._check_occupied(rows, "extended")
        check_ids(blocks, self.size.num_blocks, "extend_blocks: block id")
        columns: np.ndarray = self.num_blocks[rows]
        if not self._are_different(rows):
            columns += occurrence(rows)
        counts = columns + 1  # of equal rows the last one stays, which has the most
        self.num_blocks[rows] = counts
        if counts.max() > self.size.blocks_per_row:
            row = rows[counts.argmax()]
            raise PlanError(f"row {row} has {self.num_blocks[row]} blocks; {self.size.blocks_per_row} at most")
        return columns

    # -- the step

    def _check_work(self, plan: worker_pb2.StepPlan) -> tuple[Work, list[Copy]]:
        rows = self._rows_of(plan.rows)
        is_single = not plan.num_tokens
        num_tokens = self._ones[: len(rows)] if is_single else ints(plan.num_tokens)
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
        are_all = bool(is_last.all())
        sampling = self._index[: len(rows)] if are_all else np.flatnonzero(is_last)
        sampling_rows = rows if are_all else rows[sampling]
        branches: list[Copy] = []
        if plan.branches:
            branches, more = self._branch(plan.branches, sampling, sampling_rows)
            sampling = np.append(sampling, more)
            sampling_rows = np.append(sampling_rows, [branch.child for branch in branches])
        is_decode = are_all and total == len(rows) and not branches
        return Work(rows, num_tokens, starts, sampling, sampling_rows, len(branches), is_decode, Changes()), branches

    def _branch(
        self, forks: Sequence[worker_pb2.Fork], sampling: np.ndarray, sampling_rows: np.ndarray
    ) -> tuple[list[Copy], list[int]]:
        """Also the index of each parent among the step's rows."""
        index = dict(zip(sampling_rows.tolist(), sampling.tolist(), strict=True))
        for fork in forks:
            if fork.parent not in index:
                raise PlanError(f"row {fork.parent} branches in a step in which it samples nothing")
        return [self._copy(fork) for fork in forks], [index[fork.parent] for fork in forks]

    def _rows_of(self, packed: bytes) -> np.ndarray:
        """The rows that compute, in range and each once."""
        if packed == self._last_rows[0]:
            return self._last_rows[1]
        rows = ints(packed)
        check_ids(rows, self.size.num_rows, "row")
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


def _counts_of(admit: worker_pb2.Admit, admission: Admission) -> tuple[int, int, int, int]:
    return len(admission.token_ids), admit.num_computed_tokens, admit.num_prompt_tokens, len(admission.block_ids)
