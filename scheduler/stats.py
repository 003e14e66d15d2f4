"""Counters and gauges, derived from the plans, results and events that pass; the scheduler itself counts nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quire.scheduler.plan import StepEvents, StepPlan, StepResult
from quire.scheduler.sequence import Sequence


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    num_steps: int = 0
    num_admissions: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of admitted sequences, counted once per sequence."""
    recomputed_tokens: int = 0
    """Tokens computed again because their sequence had been preempted."""
    computed_tokens: int = 0
    generation_tokens: int = 0
    discarded_tokens: int = 0
    """Sampled for sequences that had ended meanwhile: the price of planning ahead."""

    def count_plan(self, plan: StepPlan) -> None:
        self.num_steps += 1
        self.computed_tokens += plan.total_tokens
        self.num_admissions += len(plan.admitted)

    def count_result(self, result: StepResult, events: StepEvents) -> None:
        self.generation_tokens += len(events)
        self.discarded_tokens += len(result.token_ids) - len(events)
        self.num_finished += len(events.ends)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Where the pool's blocks are. `used + free == total`; within the used ones, slots are filled or reserved."""

    blocks_total: int
    blocks_free: int
    blocks_used: int
    slots_filled: int
    """Token slots that hold KV."""
    slots_reserved: int
    """Token slots in used blocks that are still empty."""

    @classmethod
    def of(cls, running: Iterable[Sequence], blocks_total: int, blocks_free: int, block_size: int) -> MemoryUse:
        filled = sum(sequence.num_computed for sequence in running)
        used = blocks_total - blocks_free
        return cls(blocks_total, blocks_free, used, filled, used * block_size - filled)
