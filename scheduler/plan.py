"""The only values that leave or enter the scheduler: a plan goes out, a result comes in, events go to the clients.

All are frozen. Lists that may be long are tuples of plain integers, ready to be packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from quire.scheduler.params import SamplingParams
from quire.scheduler.request import Request
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
    logprobs: int | None = None
    """Log-probabilities that the row reports: None: none; 0: of the sampled token; k: of the k most likely too."""

    @classmethod
    def of(cls, sequence: Sequence) -> Admission:
        """As it stands, with a row."""
        request, search = sequence.request, sequence.group.search
        logprobs = request.params.logprobs
        if search is not None:
            logprobs = search.num_candidates
        elif request.params.is_ranked:
            logprobs = logprobs or 0
        return cls(
            row=sequence.row,
            token_ids=tuple(sequence.token_ids),
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_computed=sequence.num_computed,
            block_ids=tuple(sequence.block_ids),
            params=request.params,
            seed=request.sample_seed(sequence.index),
            stop_token_ids=request.stop_token_ids,
            logprobs=logprobs,
        )


class Fork(NamedTuple):
    """An empty row becomes a copy of another: its tokens, its block table, its settings."""

    parent: int
    child: int
    seed: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, as differences to what the workers' rows and pools already hold. Fields are applied in this order."""

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
    """Tokens that are sampled: one by each of these rows whose computed tokens reach its known ones, in their order,
    then one by each branch."""
    forked: tuple[Fork, ...] = ()
    """Applied after `retired`: a child may take the row of a sequence that is gone. Copies of beams."""
    told: tuple[tuple[int, int], ...] = ()
    """(row, token): the row's last known token, which it had sampled itself, is this one. After `forked`."""
    replaced: tuple[tuple[int, int, int], ...] = ()
    """(row, index, block): entry `index` of the row's table is this block. After `forked`, before `extended`."""
    branched: tuple[Fork, ...] = ()
    """Applied when the step's rows have computed: the parent has computed all that it knows, and the child samples a
    token of its own, by its own seed, from the parent's logits. Samples of one prompt."""
    swapped_out: tuple[tuple[int, int], ...] = ()
    """(block, slot): the block's content goes to the slot of the swap space; what two groups share, to a slot of each.
    Before any other movement of blocks, and never in the plan in which anything comes back."""
    swapped_in: tuple[tuple[int, int], ...] = ()
    """(slot, block): and comes back. After `swapped_out`."""
    copied: tuple[tuple[int, int], ...] = ()
    """(source, destination), all at once; no destination is a source. After `swapped_in`, before anything computes."""

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
    """What a step brought: one token for every row that sampled, in batch order, then one for every branch."""

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
class Answer:
    """One of the answers of a request whose answers are ranked: beam search, and best_of above n."""

    request: Request
    index: int
    """Its rank: 0 is the best."""
    token_ids: tuple[int, ...]
    """The output; where it ended with a stop token, that is the last."""
    logprobs: tuple[Logprobs, ...]
    """One for each token where the request asked for them; else empty."""
    cumulative_logprob: float
    score: float
    """What it was ranked by: beam search: with the length penalty; best_of: the mean log-probability."""
    finish_reason: FinishReason


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
    answers: tuple[Answer, ...] = ()
    """All answers of the requests that ended with this step and whose answers are ranked; their sequences are in no
    column."""

    def __len__(self) -> int:
        """Tokens."""
        return len(self.token_ids)

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.token_ids or self.answers)

    def select(self, positions: list[int]) -> StepEvents:
        """The events at these positions, which go upwards, and all answers."""
        if len(positions) == len(self):
            return self
        ends, logprobs = self.ends, self.logprobs
        return StepEvents(
            tuple([self.sequences[i] for i in positions]),
            tuple([self.token_ids[i] for i in positions]),
            {new: ends[old] for new, old in enumerate(positions) if old in ends} if ends else {},
            {new: logprobs[old] for new, old in enumerate(positions) if old in logprobs} if logprobs else {},
            self.answers,
        )

    def __iter__(self) -> Iterator[TokenEvent]:
        for position, (sequence, token) in enumerate(zip(self.sequences, self.token_ids, strict=True)):
            yield TokenEvent(sequence, token, self.ends.get(position), self.logprobs.get(position))
