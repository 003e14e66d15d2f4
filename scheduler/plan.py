"""The only values that leave or enter the scheduler: a plan goes out, a result comes in, events go to the clients.

All are frozen. Lists that may be long are tuples of plain integers, ready to be packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from quire.scheduler.params import SamplingParams
from quire.scheduler.sequence import FinishReason, Sequence


@dataclass(frozen=True, slots=True)
class Admission:
    """A row receives a sequence, whole."""

    row: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_computed: int
    """Tokens that have KV in the blocks already."""
    block_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, as differences to what the workers' rows already hold. Fields are applied in this order."""

    step: int
    """1, 2, 3 … without gaps."""
    retired: tuple[int, ...]
    """Rows whose sequence ended, was cancelled or was preempted."""
    admitted: tuple[Admission, ...]
    extended: tuple[tuple[int, int], ...]
    """(row, block): the block is appended to the row's table."""
    rows: tuple[int, ...]
    """Rows that compute, in batch order: those that decode, then those that compute chunks of more."""
    num_tokens: tuple[int, ...]
    """Tokens each of them computes; empty when each computes one."""
    num_sampled: int
    """Rows among them that sample a token: those whose computed tokens reach their known ones."""

    @property
    def total_tokens(self) -> int:
        return sum(self.num_tokens) if self.num_tokens else len(self.rows)


class Logprobs(NamedTuple):
    """Log-probabilities of one sampled token."""

    token_ids: tuple[int, ...]
    """The sampled token, then the most likely ones, best first."""
    values: tuple[float, ...]
    rank: int
    """Rank of the sampled token: 1 is the most likely."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought: one token for every row that sampled, in batch order."""

    step: int
    token_ids: tuple[int, ...]
    logprobs: dict[int, Logprobs]
    """By position in `token_ids`, for the rows that asked."""


class TokenEvent(NamedTuple):
    """A sequence has one more token, and ends with it where `finish_reason` is set.

    A token of -1 stands for logits that were not numbers; it comes with FinishReason.ERROR and is not output."""

    sequence: Sequence
    token_id: int
    finish_reason: FinishReason | None
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class StepEvents:
    """What a step brought to the sequences still in progress, by columns: one token for each.

    A loop over it gives a TokenEvent for each; whoever looks at hundreds of tokens per step takes the columns."""

    sequences: tuple[Sequence, ...] = ()
    token_ids: tuple[int, ...] = ()
    ends: dict[int, FinishReason] = field(default_factory=dict)
    """By position: the sequences that end with this token."""
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    """By position, for the sequences that asked."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def __iter__(self) -> Iterator[TokenEvent]:
        for position, (sequence, token) in enumerate(zip(self.sequences, self.token_ids, strict=True)):
            yield TokenEvent(sequence, token, self.ends.get(position), self.logprobs.get(position))
