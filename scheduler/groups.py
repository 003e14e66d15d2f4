"""A group: sequences of one request that run, wait and are preempted together, because they share memory.

All sequences of a request are one group (sequence group, section 4.5 of the PagedAttention paper), unless they are more
than can run at once, or outgrow the pool together: samples then go on in groups of their own.
"""

from __future__ import annotations

from quire.scheduler.beam import BeamSearch
from quire.scheduler.plan import Logprobs
from quire.scheduler.request import Request
from quire.scheduler.sequence import Sequence, Status


class Group:
    """State; mutated by the scheduler only."""

    __slots__ = (
        "arrival", "has_progressed", "is_reserved", "is_running", "is_swapped", "num_preemptions", "num_promised",
        "reports", "request", "search", "sequences",
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

    def __repr__(self) -> str:
        state = "running" if self.is_running else "swapped" if self.is_swapped else "waiting"
        return f"Group({self.request.request_id} {state}, {len(self.sequences)} sequences)"


def shared_blocks(sequences: list[Sequence], block_size: int) -> list[tuple[int, int]]:
    """How little of a group must be computed again: for each sequence but the first, the index of an earlier one that
    begins with the same tokens, and the number of full blocks that this makes. Of the known tokens at least one is left
    to compute."""
    shared = []
    for place in range(1, len(sequences)):
        tokens = sequences[place].token_ids
        best = (0, 0)
        for source in range(place):
            other = sequences[source].token_ids
            most = min(len(other) // block_size, (len(tokens) - 1) // block_size)
            count = sequences[place].num_prompt_tokens // block_size if most else 0
            count = min(count, most)  # the prompt is the same
            while count < most:
                part = slice(count * block_size, (count + 1) * block_size)
                if tokens[part] != other[part]:
                    break
                count += 1
            best = max(best, (count, -source))
        shared.append((-best[1], best[0]))
    return shared
