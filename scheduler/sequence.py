"""A sequence: one sample of a request, on its way from its prompt to its last token.

There are no phases. Two numbers say everything: `num_tokens` known and `num_computed` of them with KV in the pool.

    token_ids      |<------ prompt ------>|<------ output ------>|
    num_computed   |<---- KV in the pool ---->|
    num_tokens     |<------------- known, values in flight included -------------->|

A sequence that computes one token in every step moves both numbers by one each time. They are not written then: they
follow a clock that all such sequences share.
"""

from __future__ import annotations

import enum

from quire.scheduler.request import Request


class Status(enum.Enum):
    WAITING = "waiting"
    """In the queue: owns no row and no block."""
    RUNNING = "running"
    """Owns a row and the blocks of all its known tokens."""
    FINISHED = "finished"
    """Ended or cancelled: owns nothing."""


class FinishReason(enum.Enum):
    STOP = "stop"
    """The model's end-of-sequence token or a stop token."""
    LENGTH = "length"
    """max_tokens or the model's context."""
    ERROR = "error"
    """The model's logits were not numbers."""


class Clock:
    """Counts steps, for the sequences that take part in every one."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0


_STOPPED = Clock()
"""What a sequence follows that does not take part in every step. Always 0."""


class Sequence:
    """State of one sample; mutated by the scheduler and the block tables only."""

    __slots__ = (
        "_clock", "_computed_before", "arrival", "block_ids", "capacity", "due", "gap", "index", "max_computed",
        "num_preemptions", "num_prompt_tokens", "request", "row", "status", "token_ids",
    )  # fmt: skip

    def __init__(self, request: Request, index: int, arrival: int) -> None:
        self.request = request
        self.index = index
        """Which of the request's samples."""
        self.arrival = arrival
        """Place in the order of service: smaller is served first and preempted last."""
        self.token_ids = list(request.prompt_token_ids)
        """Tokens whose values are known here."""
        self.num_prompt_tokens = len(self.token_ids)
        self.gap = len(self.token_ids)
        """Known tokens that are not computed."""
        self._clock = _STOPPED
        self._computed_before = 0
        """Tokens computed when the clock stood at 0."""
        self.max_computed = request.max_len - 1
        """The last token of a full sequence is never computed."""
        self.block_ids: list[int] = []
        self.capacity = 0
        """Token slots in `block_ids`."""
        self.due = -1
        """Where it stands in the calendar of decoding.py; -1: nowhere."""
        self.row = -1
        self.status = Status.WAITING
        self.num_preemptions = 0

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is in the pool once all plans so far have run."""
        return self._computed_before + self._clock.now

    @property
    def num_tokens(self) -> int:
        """Tokens known, those included that are sampled but whose values are still in flight."""
        return self._computed_before + self._clock.now + self.gap

    @property
    def num_in_flight(self) -> int:
        """Sampled tokens whose values have not come back yet."""
        return self.num_tokens - len(self.token_ids)

    def compute(self, num_tokens: int) -> bool:
        """The next `num_tokens` known tokens are computed. True: they were the last known ones, so one is sampled."""
        self._computed_before += num_tokens
        self.gap -= num_tokens
        if self.gap:
            return False
        self.gap = 1
        return True

    def forget_computed(self) -> None:
        """Its blocks are gone: every known token must be computed again."""
        self.gap = self.num_tokens
        self._computed_before = 0
        self._clock = _STOPPED

    def follow(self, clock: Clock) -> None:
        """From now on it computes one token and samples the next whenever the clock moves on."""
        self._computed_before -= clock.now
        self._clock = clock

    def unfollow(self) -> None:
        self._computed_before += self._clock.now
        self._clock = _STOPPED

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id}/{self.index} {self.status.value}"
            f" {self.num_computed}/{self.num_tokens} tokens, {len(self.block_ids)} blocks, row {self.row})"
        )
