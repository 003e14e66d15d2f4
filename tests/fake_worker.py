"""A worker without tensors whose next token depends on every slot it reaches through the block table.

Computing token t at position p stores (p, t) in its slot; a sampled token is a hash of the slots that the table leads
to. One lost, stale or misplaced block changes the next token. Slots keep what was written last.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from quire.scheduler.plan import Admission, StepPlan, StepResult

VOCAB = 97
_MASK = (1 << 61) - 1


def mix(value: int, position: int, token: int) -> int:
    return (value * 0x9E3779B97F4A7C15 + position * 1_000_003 + token + 1) & _MASK


def expected_output(prompt: list[int], seed: int, count: int) -> list[int]:
    """What a request must get, from its own tokens alone."""
    tokens, value = list(prompt), 0
    for position, token in enumerate(prompt):
        value = mix(value, position, token)
    for _ in range(count):
        tokens.append((value ^ seed) % VOCAB)
        value = mix(value, len(tokens) - 1, tokens[-1])
    return tokens[len(prompt) :]


@dataclass
class _Row:
    tokens: list[int]
    computed: int
    blocks: list[int]
    seed: int


@dataclass
class FakeWorker:
    """An `Executor`. Plans wait in a queue until they are collected: a pipeline of any depth."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    plans: list[StepPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows: dict[int, _Row] = {}
        self.slots: list[tuple[int, int] | None] = [None] * (self.num_blocks * self.block_size)
        self._queue: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self._queue.append(plan)

    def collect(self) -> StepResult:
        return self.run(self._queue.popleft())

    def run(self, plan: StepPlan) -> StepResult:
        for row in plan.retired:
            del self.rows[row]
        for admission in plan.admitted:
            self._admit(admission)
        for row, block in plan.extended:
            self.rows[row].blocks.append(block)
        counts = plan.num_tokens or (1,) * len(plan.rows)
        assert len(counts) == len(plan.rows) == len(set(plan.rows))
        assert 0 < sum(counts) <= self.max_num_batched_tokens and min(counts) > 0
        sampled = [token for row, count in zip(plan.rows, counts, strict=True) for token in self._compute(row, count)]
        assert len(sampled) == plan.num_sampled
        return StepResult(plan.step, tuple(sampled), {})

    def _admit(self, admission: Admission) -> None:
        assert admission.row not in self.rows and 0 <= admission.row < self.max_num_seqs
        self.rows[admission.row] = _Row(
            list(admission.token_ids), admission.num_computed, list(admission.block_ids), admission.seed
        )

    def _compute(self, index: int, count: int) -> list[int]:
        row = self.rows[index]
        assert row.computed + count <= len(row.tokens)
        for position in range(row.computed, row.computed + count):
            self.slots[self._slot(row, position)] = (position, row.tokens[position])
        row.computed += count
        if row.computed < len(row.tokens):
            return []
        value = 0
        for position in range(row.computed):
            stored = self.slots[self._slot(row, position)]
            assert stored is not None and stored[0] == position, f"row {index} reads {stored} at position {position}"
            value = mix(value, *stored)
        row.tokens.append((value ^ row.seed) % VOCAB)
        return [row.tokens[-1]]

    def _slot(self, row: _Row, position: int) -> int:
        return row.blocks[position // self.block_size] * self.block_size + position % self.block_size
