"""Limits the scheduler works under. Only what it reads itself: no model, no device, no addresses."""

from __future__ import annotations

from dataclasses import dataclass


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

    max_num_waiting: int = 1 << 20
    """Sequences that may wait; more are refused with QueueFull."""

    watermark: float = 0.01
    """Share of the pool that admission leaves free, so that a new prompt does not at once evict somebody."""

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
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
