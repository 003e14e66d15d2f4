"""A group: sequences of one request that run, wait and are preempted together, because they share memory.

All sequences of a request are one group (sequence group, section 4.5 of the PagedAttention paper), unless they are more
than can run at once, or outgrow the pool together: samples then go on in groups of their own.
"""

from __future__ import annotations

from typing import NamedTuple

from quire.scheduler.beam import BeamSearch
from quire.scheduler.plan import Logprobs
from quire.scheduler.request import Request
from quire.scheduler.sequence import Sequence, Status


class Share(NamedTuple):
    """What a sequence has in common with an earlier one of its group."""

    source: int
    """Index of that one."""
    num_blocks: int
    """Full blocks with which both begin."""


class Group:
    """State; mutated by the scheduler only."""

    __slots__ = (
        "_shares", "arrival", "has_progressed", "is_reserved", "is_running", "is_swapped", "num_preemptions",
        "num_promised", "reports", "request", "search", "sequences",
    )  # fmt: skip

    def __init__(self, request: Request, arrival: int, is_reserved: bool = False) -> None:
        self.request = request
        self.arrival = arrival
        """That of its first sequence."""
        self.sequences: list[Sequence] = []
        """Those in progress, in order of index."""
        self.search: BeamSearch | None = None
        """Beam search: it decides how the sequences go on."""
        self.reports: dict[Sequence, tuple[int, Logprobs | None]] = {}
        """Beam search: the results that have come; it decides when all have."""
        self.is_reserved = is_reserved
        """It computes a reserved prefix, and nothing is sent to anybody."""
        self.is_running = False
        self.is_swapped = False
        """It waits, and its KV is in the swap space."""
        self.num_promised = 0
        """Rows that are kept free for it while it runs."""
        self.num_preemptions = 0
        self._shares: list[Share] | None = None
        self.has_progressed = True
        """False from its return after a preemption to the next token that it samples."""

    @property
    def num_rows(self) -> int:
        """Rows that it needs to run."""
        return self.search.width if self.search is not None else len(self.sequences)

    @property
    def num_held(self) -> int:
        """Rows that it has."""
        return sum(sequence.row >= 0 for sequence in self.sequences)

    @property
    def is_undivided(self) -> bool:
        """Nothing has been sampled yet: all its sequences are the prompt."""
        return all(sequence.num_tokens == sequence.num_prompt_tokens for sequence in self.sequences)

    @property
    def has_pending(self) -> bool:
        return any(sequence.status is Status.PENDING for sequence in self.sequences)

    @property
    def is_led(self) -> bool:
        """Whether one of its sequences computes the prompt for all."""
        return len(self.sequences) > 1 and self.has_pending and not self.has_joining

    @property
    def has_joining(self) -> bool:
        """Whether any waits to share what a sibling computes again after a preemption."""
        return any(sequence.join is not None for sequence in self.sequences)

    def shares(self, block_size: int) -> list[Share]:
        """How little of a waiting group must be computed again, by sequence; the first shares nothing. Worked out once
        for as long as it waits."""
        if self._shares is None or len(self._shares) != len(self.sequences):
            self._shares = [Share(0, 0)]
            for place in range(1, len(self.sequences)):
                # Samples part with their first token, and are seldom as one beyond it; beams are a tree.
                sources = range(place if self.search is not None else 1)
                counts = [self._common_blocks(source, place, block_size) for source in sources]
                best = max(counts)
                self._shares.append(Share(counts.index(best), best))
        return self._shares

    def forget_shares(self) -> None:
        """Its sequences have changed, or are about to."""
        self._shares = None

    def _common_blocks(self, source: int, place: int, block_size: int) -> int:
        """Full blocks with which both sequences begin; of the second's known tokens at least one is left to compute."""
        ours, theirs = self.sequences[place].token_ids, self.sequences[source].token_ids
        most = min(len(theirs) // block_size, (len(ours) - 1) // block_size)
        count = min(most, self.sequences[place].num_prompt_tokens // block_size)  # the prompt is the same
        while count < most:
            part = slice(count * block_size, (count + 1) * block_size)
            if ours[part] != theirs[part]:
                break
            count += 1
        return count

    def __repr__(self) -> str:
        state = "running" if self.is_running else "swapped" if self.is_swapped else "waiting"
        return f"Group({self.request.request_id} {state}, {len(self.sequences)} sequences)"
