"""Who gives up blocks when there are none, and what becomes of what they held.

The latest arrival goes first, so that the earliest is served first (section 4.5 of the PagedAttention paper). A group
that has come back and has not sampled a token since is spared as long as there is another: work would otherwise be
done again and again for nothing.

Swapping costs two copies over the host link, computing again costs a pass over the tokens. Which is cheaper depends on
model and machine, so both are measured when the worker starts, and compared for each victim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.groups import Group


def choose_victim(running: Sequence[Group], needy: Group) -> Group:
    """Who makes room for `needy`, of the running groups in order of arrival: the latest after it that has progressed
    since it came; else itself, but for the earliest of all, whom everybody makes room for."""
    for group in reversed(running):
        if group is needy:
            break
        if group.has_progressed:
            return group
    return running[-1] if running[0] is needy else needy


@dataclass(frozen=True, slots=True)
class Costs:
    """Estimates for one victim, in seconds; 0: unknown."""

    swap_s: float
    recompute_s: float

    @classmethod
    def of(cls, config: SchedulerConfig, num_blocks: int, num_tokens: int) -> Costs:
        """`num_blocks` distinct blocks with `num_tokens` distinct tokens: what is shared moves once, and is computed
        once."""
        link, speed = config.link_bytes_per_s, config.prefill_tokens_per_s
        return cls(
            swap_s=2 * num_blocks * config.block_bytes / link if link else 0.0,
            recompute_s=num_tokens / speed if speed else 0.0,
        )


def prefers_swap(mode: str, costs: Costs) -> bool:
    """Whether to swap, where there is room for it."""
    if mode == "auto":
        return 0.0 < costs.swap_s < costs.recompute_s
    return mode == "swap"
