"""A sequence: one sample of a request, on its way from its prompt to its last token.

There are no phases. Two numbers say everything: `num_tokens` known and `num_computed` of them with KV in the pool.

    token_ids      |<------ prompt ------>|<------ output ------>|
    num_computed   |<---- KV in the pool ---->|
    num_tokens     |<------------- known, values in flight included -------------->|
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


class Sequence:
    """State of one sample; mutated by the scheduler and the block tables only."""

    __slots__ = (
        "arrival", "block_ids", "capacity", "index", "max_computed", "num_computed", "num_preemptions",
        "num_prompt_tokens", "num_tokens", "request", "row", "status", "token_ids",
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
        self.num_tokens = len(self.token_ids)
        """Tokens known, those included that are sampled but whose values are still in flight."""
        self.num_computed = 0
        """Tokens whose KV is in the pool once all plans so far have run."""
        self.max_computed = request.max_len - 1
        """The last token of a full sequence is never computed."""
        self.block_ids: list[int] = []
        self.capacity = 0
        """Token slots in `block_ids`."""
        self.row = -1
        self.status = Status.WAITING
        self.num_preemptions = 0

    @property
    def num_in_flight(self) -> int:
        """Sampled tokens whose values have not come back yet."""
        return self.num_tokens - len(self.token_ids)

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id}/{self.index} {self.status.value}"
            f" {self.num_computed}/{self.num_tokens} tokens, {len(self.block_ids)} blocks, row {self.row})"
        )
