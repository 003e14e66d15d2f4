"""Runs plans without a GPU: tells what a step would have cost, and answers with tokens that stand for nothing.

It keeps of every row what the cost needs, in differences, as a worker does: a steady step, in which every row computes
one token, is summed without a look at any row.
"""

from __future__ import annotations

from itertools import repeat

from quire.scheduler.plan import Admission, Logprobs, StepPlan, StepResult
from quire.scheduler.simulation.costs import CostModel, Work
from quire.scheduler.simulation.likelihoods import Likelihoods


class SimulatedGpu:
    """An executor whose time is computed. Rows follow the plans from the first on, without gaps."""

    def __init__(self, cost: CostModel, likelihoods: Likelihoods | None = None) -> None:
        self.cost = cost
        self.num_tokens = 0
        """Tokens with KV, summed over the rows."""
        self.num_entries = 0
        """Blocks, summed over the rows' tables."""
        self.num_first = 0
        """Rows that in the last step computed the last of several known tokens, or branched; their tokens come last."""
        self._likelihoods = likelihoods or Likelihoods()
        self._steps = 0
        self._offset: dict[int, int] = {}
        """By row: computed tokens less steps so far. A row that computes one token per step keeps its number."""
        self._entries: dict[int, int] = {}
        """By row: blocks of its table."""
        self._gaps: dict[int, int] = {}
        """By row: known tokens to compute, where they are not one in each step."""
        self._candidates: dict[int, int] = {}
        """By row: the likeliest tokens that it reports."""

    @property
    def num_rows(self) -> int:
        return len(self._offset)

    def run(self, plan: StepPlan) -> tuple[StepResult, float]:
        """The step's result and its seconds."""
        self._change_rows(plan)
        num_rows = len(plan.rows)
        if self._gaps or self._candidates or plan.branched or num_rows != len(self._offset):
            return self._run_mixed(plan)
        self._steps += 1
        self.num_tokens += num_rows
        self.num_first = 0
        work = Work(num_rows, num_rows, self.num_tokens, 0, len(plan.copied), len(plan.swapped_out))
        return StepResult(plan.step, plan.rows, {}), self.cost.seconds(work)

    def _change_rows(self, plan: StepPlan) -> None:
        offset, entries = self._offset, self._entries
        for row in plan.retired:
            self.num_tokens -= offset.pop(row) + self._steps
            self.num_entries -= entries.pop(row)
            self._gaps.pop(row, None)
            self._candidates.pop(row, None)
        for admission in plan.admitted:
            self._admit(admission)
        for fork in plan.forked:
            self._copy(fork.parent, fork.child)
        for row, _ in plan.extended:
            entries[row] += 1
        self.num_entries += len(plan.extended)

    def _admit(self, admission: Admission) -> None:
        row, num_computed = admission.row, admission.num_computed
        self._offset[row] = num_computed - self._steps
        self.num_tokens += num_computed
        self._entries[row] = len(admission.block_ids)
        self.num_entries += len(admission.block_ids)
        self._gaps[row] = len(admission.token_ids) - num_computed
        if admission.logprobs is not None:
            self._candidates[row] = admission.logprobs

    def _copy(self, parent: int, child: int) -> None:
        self._offset[child] = self._offset[parent]
        self.num_tokens += self._offset[child] + self._steps
        self._entries[child] = self._entries[parent]
        self.num_entries += self._entries[child]
        if parent in self._candidates:
            self._candidates[child] = self._candidates[parent]

    def _run_mixed(self, plan: StepPlan) -> tuple[StepResult, float]:
        """A step in which some rows compute several tokens, or report candidates, or in which not all take part."""
        offset, gaps, steps = self._offset, self._gaps, self._steps
        read = pairs = total = 0
        sampled = []
        self.num_first = len(plan.branched)
        if len(plan.rows) != len(offset):
            for row in offset.keys() - set(plan.rows):
                offset[row] -= 1
        for row, count in zip(plan.rows, plan.num_tokens or repeat(1), strict=False):
            computed = offset[row] + steps
            total += count
            if count == 1:
                read += computed + 1
            else:
                pairs += count * computed + count * (count + 1) // 2
                offset[row] += count - 1
            if row not in gaps or self._is_last(row, count):
                sampled.append(row)
        self._steps += 1
        self.num_tokens += total
        for fork in plan.branched:
            self._copy(fork.parent, fork.child)
            sampled.append(fork.child)
        assert len(sampled) == plan.num_sampled, (sampled, plan)
        moved = len(plan.swapped_out) + len(plan.swapped_in)
        seconds = self.cost.seconds(Work(len(plan.rows), total, read, pairs, len(plan.copied), moved))
        return StepResult(plan.step, *self._answer(sampled)), seconds

    def _is_last(self, row: int, count: int) -> bool:
        """Note that a row has computed so many of its known tokens; whether they were the last."""
        gap = self._gaps[row] - count
        if gap > 1:
            self._gaps[row] = gap
            return False
        del self._gaps[row]
        self.num_first += not gap
        return not gap

    def _answer(self, rows: list[int]) -> tuple[tuple[int, ...], dict[int, Logprobs]]:
        """Any tokens do, as long as samples of one prompt differ: the rows' numbers."""
        if not self._candidates:
            return tuple(rows), {}
        logprobs = {
            position: self._likelihoods.draw(self._candidates[row])
            for position, row in enumerate(rows)
            if row in self._candidates
        }
        tokens = [logprobs[i].token_ids[0] if i in logprobs else row for i, row in enumerate(rows)]
        return tuple(tokens), logprobs
