"""What happens to requests, told as it happens by the only one who knows why: the scheduler.

A scheduler may hold a `Journal` and tells it of every change, each with the request's id and the number of the step
that is being planned, or of a call or a result: that will be planned next. Nothing is told for a token in a steady
step, so that a journal costs nothing while nothing changes, and without one the whole cost is a test for None:

    if self.journal is not None:
        self.journal.note(step, request.request_id, Admitted(...))

The scheduler has no clock; a journal stamps what it is told with one of its own. It must not change anything, must not
raise, and must not call back. explain.py keeps one.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol, TypeAlias

from quire.scheduler.sequence import FinishReason


class Wait(enum.Enum):
    """Why the request at the head of the queue was not let in. The values are sentences' ends: "it waited for …"."""

    BLOCKS = "free blocks"
    """`needed` blocks, watermark included, and `available` free ones, evictable ones included."""
    ROWS = "a free place among the running sequences"
    """`needed` rows, `available` free ones."""
    BUDGET = "room in a step's token budget"
    """`needed` tokens at least, `available` left in the step."""
    PREEMPTED = "others that had been preempted for want of memory in the same step"
    """Nobody is let in by a step that preempts. Both numbers 0."""
    RESULTS = "its own tokens, still in flight"
    """It was preempted, and what it has sampled is not known yet. `needed`: tokens awaited."""


class Added(NamedTuple):
    """It arrived and was queued."""

    num_prompt_tokens: int
    num_sequences: int
    num_waiting: int
    """Requests in the queue before it."""


class Blocked(NamedTuple):
    """It is the first in the queue and was not let in. Told when the reason changes, not once per step."""

    wait: Wait
    needed: int
    available: int


class Admitted(NamedTuple):
    """It runs: for the first time, or again after a preemption by recompute."""

    num_tokens: int
    """Known tokens of its first sequence. The others begin from what that has computed."""
    num_cached: int
    """Of them found in the prefix cache or in a reserved prefix: not computed."""
    num_blocks: int
    """Blocks that it has now, those found in the cache included."""


class Chunk(NamedTuple):
    """A sequence computes tokens that were known before the step: a prompt, or after a preemption, or a part of them.

    Not told for the one token per step of a sequence that decodes. `sample`, here and below: `Sequence.index`."""

    sample: int
    num_tokens: int


class Branched(NamedTuple):
    """A sample begins, from the prompt that its sibling has computed."""

    parent: int
    child: int


class Forked(NamedTuple):
    """A beam goes on in two directions: the child's former beam is given up."""

    parent: int
    child: int


class Copied(NamedTuple):
    """A sequence writes into a block that others use too, and gets a copy of it first."""

    sample: int
    source: int
    destination: int


class Preempted(NamedTuple):
    """It gave up its blocks for somebody before it in the order of service."""

    by: str
    """The request that needed them; its own id where it was itself the latest."""
    mode: str
    """"swap" or "recompute"."""
    num_blocks: int
    """Distinct blocks that it held."""
    num_tokens: int
    """Distinct computed tokens in them."""
    swap_s: float
    """Estimated seconds to move the blocks out and back; 0: unknown."""
    recompute_s: float
    """Estimated seconds to compute the tokens again; 0: unknown."""


class Resumed(NamedTuple):
    """It runs again, its blocks brought back from the swap space. After a recompute it is `Admitted` again."""

    num_blocks: int
    num_tokens: int


class Discarded(NamedTuple):
    """A result brought tokens of a sequence that had ended when the step ran: planned ahead in vain."""

    sample: int
    num_tokens: int


class Finished(NamedTuple):
    """One of its sequences ended by itself; of ranked answers: one of the answers, by its rank."""

    sample: int
    reason: FinishReason
    num_output_tokens: int


class Cancelled(NamedTuple):
    """Its client, or a stop string, ended one of its sequences."""

    sample: int
    num_output_tokens: int


class Ended(NamedTuple):
    """Nothing of it is in progress any more, and its memory is free. Only `Discarded` may still follow."""


Event: TypeAlias = (
    Added
    | Blocked
    | Admitted
    | Chunk
    | Branched
    | Forked
    | Copied
    | Preempted
    | Resumed
    | Discarded
    | Finished
    | Cancelled
    | Ended
)


class Journal(Protocol):
    """Whoever wants to know."""

    def note(self, step: int, request_id: str, event: Event) -> None: ...
