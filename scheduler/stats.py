"""Counters and gauges, derived from the plans, results and events that pass; the scheduler itself counts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from quire.scheduler.plan import StepEvents, StepPlan


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    num_steps: int = 0
    num_admissions: int = 0
    num_preemptions: int = 0
    """Groups that gave up their blocks, either way."""
    num_swap_preemptions: int = 0
    """Those whose blocks went to the swap space."""
    num_finished: int = 0
    num_cancelled: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of admitted requests, counted once per request however many samples they have."""
    prefix_query_tokens: int = 0
    """Known tokens of admitted sequences that were looked for in the prefix cache."""
    prefix_hit_tokens: int = 0
    """Of them, those that were found there, or in a reserved prefix, and not computed."""
    recomputed_tokens: int = 0
    """Computed tokens whose blocks were given up by preemptions."""
    computed_tokens: int = 0
    copied_blocks: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    generation_tokens: int = 0
    """Of beam search: those of its answers."""
    discarded_tokens: int = 0
    """Sampled for sequences that had ended meanwhile: the price of planning ahead."""

    def count_plan(self, plan: StepPlan) -> None:
        self.num_steps += 1
        self.computed_tokens += plan.total_tokens
        self.num_admissions += len(plan.admitted)
        self.copied_blocks += len(plan.copied)
        self.swapped_out_blocks += len(plan.swapped_out)
        self.swapped_in_blocks += len(plan.swapped_in)

    def count_result(self, events: StepEvents) -> None:
        self.generation_tokens += len(events) + sum(len(answer.token_ids) for answer in events.answers)
        self.num_finished += len(events.ends) + len(events.answers)


class MemoryUse(NamedTuple):
    """Where the pool's blocks are, on every rank alike.

    used + cached + free == total; within the used ones, slots_filled + slots_reserved == used * block_size."""

    blocks_total: int
    blocks_free: int
    """Hold nothing that could be found."""
    blocks_cached: int
    """Free, and found by their content until they are taken."""
    blocks_used: int
    """In tables, those of reserved prefixes among them."""
    blocks_reserved_prefix: int
    """Of the used ones: kept for reserved prefixes."""
    slots_filled: int
    """Token slots in used blocks that hold KV."""
    slots_reserved: int
    """Token slots in used blocks that are still empty."""
    slots_shared: int
    """Slots that tables would need more if nothing were shared."""
    swap_blocks_total: int
    swap_blocks_used: int
