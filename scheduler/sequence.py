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
from typing import TYPE_CHECKING

from quire.scheduler.request import Request

if TYPE_CHECKING:
    from quire.scheduler.groups import Group


class Status(enum.Enum):
    WAITING = "waiting"
    """In the queue, with its group: owns no row and no block; perhaps slots of the swap space."""
    PENDING = "pending"
    """Its group runs, and it waits for a sibling to compute what they have in common: owns no row, and no block yet."""
    RUNNING = "running"
    """Owns a row and the blocks of all its known tokens."""
    FINISHED = "finished"
    """Ended or cancelled, or a beam that was dropped: owns nothing."""


class FinishReason(enum.Enum):
    STOP = "stop"
    """The model's end-of-sequence token or a stop token."""
    LENGTH = "length"
    """max_tokens or the model's context."""
    ERROR = "error"
    """The model's logits were not numbers."""


class Join:
    """What a pending sequence waits for: a sibling that computes the tokens with which it begins too."""

    __slots__ = ("block_ids", "num_shared", "source")

    def __init__(self, source: Sequence, num_shared: int, block_ids: list[int]) -> None:
        self.source = source
        self.num_shared = num_shared
        """Full blocks that it will share with the source."""
        self.block_ids = block_ids
        """Its own blocks, kept for what comes after those."""


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
        "_clock", "_computed_before", "arrival", "block_ids", "block_names", "capacity", "due", "gap", "group", "index",
        "is_tail_shared", "join", "max_computed", "num_named", "num_prompt_tokens", "request", "row",
        "status", "swap_ids", "token_ids",
    )  # fmt: skip

    def __init__(self, group: Group, index: int, arrival: int) -> None:
        request = group.request
        self.group = group
        self.request: Request = request
        self.index = index
        """Which of the request's samples, or beams."""
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
        self.swap_ids: list[int] = []
        """The slots of the swap space that hold its blocks, while they are not in the pool."""
        self.block_names: list[bytes] = []
        """Of the blocks of its first tokens, by content (prefix_cache.py); not all that it could have."""
        self.num_named = 0
        """Blocks of its table that the pool knows by name, or need not."""
        self.is_tail_shared = False
        """It may have to copy its last block before it writes the next token."""
        self.join: Join | None = None
        """What it waits for while it is pending after a preemption."""
        self.due = -1
        """Where it stands in the calendar of decoding.py; -1: nowhere."""
        self.row = -1
        self.status = Status.WAITING

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

    def skip(self, num_tokens: int) -> None:
        """The next `num_tokens` known tokens have KV already; at least one is left to compute."""
        self._computed_before += num_tokens
        self.gap -= num_tokens

    def forget_computed(self) -> None:
        """Its blocks are gone: every known token must be computed again."""
        self.gap = self.num_tokens
        self._computed_before = 0
        self._clock = _STOPPED

    def sample_again(self) -> None:
        """The token that was sampled last, and that nobody knows, is forgotten: the one before it is computed again."""
        if self._computed_before == self.num_tokens - 1:
            self._computed_before -= 1
        else:
            self.gap -= 1

    def take_numbers(self, other: Sequence) -> None:
        """Know and have computed as much as the other. Tables are not touched."""
        self._computed_before = other.num_computed
        self._clock = _STOPPED
        self.gap = other.gap

    def branch(self, index: int, arrival: int) -> Sequence:
        """A sequence that continues as this one might have. Tables are not touched."""
        child = Sequence(self.group, index, arrival)
        child.token_ids = self.token_ids.copy()
        child.block_names = self.block_names.copy()
        child.num_named = self.num_named
        child.status = self.status
        child.take_numbers(self)
        return child

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
