"""Limits the scheduler works under. Only what it reads itself: no model, no device, no addresses."""

from __future__ import annotations

from dataclasses import dataclass

PREEMPTION_MODES = ("auto", "swap", "recompute")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """All sizes in tokens, blocks or sequences. Raises ValueError for a combination that cannot serve."""

    num_blocks: int
    """Blocks of the KV pool (one pool: every rank holds its shard of each block)."""

    block_size: int = 16
    """Tokens per block."""

    max_model_len: int = 2048
    """Longest sequence: prompt and output together."""

    max_num_seqs: int = 256
    """Sequences that may run at once: rows of the workers' persistent table."""

    max_num_batched_tokens: int = 2048
    """Token budget of one step."""

    prefill_floor: int = 0
    """Tokens that prompts may always have of a step in which others decode; 0: all that the budget leaves. budget.py
    says when they get more."""

    max_num_waiting: int = 1 << 20
    """Sequences that may wait; more are refused with QueueFull."""

    watermark: float = 0.01
    """Share of the pool that admission leaves free, so that a new prompt does not at once evict somebody."""

    enable_prefix_caching: bool = True
    """Find full blocks again by what they hold."""

    preemption_mode: str = "auto"
    """What becomes of a preempted request's KV: "swap": it goes to the swap space; "recompute": it is computed again;
    "auto": whichever is estimated to take less time."""

    num_swap_blocks: int = 0
    """Blocks of the swap space, on each rank. Without any every preemption is by recompute."""

    block_bytes: int = 0
    """Bytes of one block on one rank."""

    link_bytes_per_s: float = 0.0
    """Measured speed of copies between pool and swap space; 0: unknown, and "auto" recomputes."""

    prefill_tokens_per_s: float = 0.0
    """Measured speed at which prompts are computed; 0: unknown, and "auto" recomputes."""

    def __post_init__(self) -> None:
        if self.preemption_mode not in PREEMPTION_MODES:
            raise ValueError(
                f"preemption_mode must be one of {', '.join(PREEMPTION_MODES)}, not {self.preemption_mode!r}"
            )
        if not 0 <= self.num_swap_blocks <= self.num_blocks:
            raise ValueError(
                f"num_swap_blocks must be from 0 to num_blocks ({self.num_blocks}), not {self.num_swap_blocks}: what is"
                " swapped out never exceeds the pool"
            )
        for name in ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.prefill_floor < 0:
            raise ValueError(f"prefill_floor must not be negative, unlike {self.prefill_floor}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs"
                f" ({self.max_num_seqs}): every running sequence decodes one token per step"
            )
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark must be in [0, 1), not {self.watermark}")
        # The last token of a full sequence is sampled but never computed: it needs no slot.
        if self.num_blocks * self.block_size < self.max_model_len - 1:
            raise ValueError(
                f"the KV pool holds {self.num_blocks * self.block_size} tokens, fewer than max_model_len"
                f" ({self.max_model_len}): lower --max-model-len or give the KV cache more memory"
            )

    @property
    def watermark_blocks(self) -> int:
        return int(self.watermark * self.num_blocks)
