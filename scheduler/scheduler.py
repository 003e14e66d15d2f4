"""Continuous batching over a paged pool: decides who computes what in each step, and who must wait.

`schedule()` closes the gap between known and computed tokens within the step's budget; `apply()` takes what came
back. Plans may be made ahead of results. Order of service is order of arrival: the earliest is served first, the latest
is preempted first, and the preempted come back before anybody new is let in (PagedAttention paper, section 4.5).

Work is proportional to what changes. Sequences that compute one token per step are looked at only when they need a
block or end (`decoding.py`), and their tokens are taken in bulk unless one of them ends a sequence.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from quire.scheduler.blocks import AuditError, BlockPool
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.decoding import DecodingSet
from quire.scheduler.params import InvalidRequest, QueueFull
from quire.scheduler.plan import Admission, StepEvents, StepPlan, StepResult
from quire.scheduler.request import Request
from quire.scheduler.sequence import FinishReason, Sequence, Status
from quire.scheduler.stats import Counters, MemoryUse
from quire.scheduler.stops import StopTokens
from quire.scheduler.tables import BlockTables


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    spare: int
    """Tokens of the budget beyond one for each running sequence."""
    admitted: list[Admission] = field(default_factory=list)
    extended: list[tuple[int, int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Those that compute chunks; the rows that decode stand before them in the plan."""
    num_tokens: list[int] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    """Of the chunks, those that end with their sequence's last known token."""
    entering: list[Sequence] = field(default_factory=list)
    """They decode from the next step on."""
    partial: list[Sequence] = field(default_factory=list)
    """They have more to compute than one token even then."""
    last: list[Sequence] = field(default_factory=list)
    """The token that they sample fills them."""
    preempted: bool = False

    def grant(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence computes its next `num_tokens`; when they are its last known ones it samples one more."""
        self.spare -= num_tokens - 1
        self.rows.append(sequence.row)
        self.num_tokens.append(num_tokens)
        if sequence.compute(num_tokens):
            self.sampled.append(sequence)
        if sequence.num_computed == sequence.max_computed:
            self.last.append(sequence)
        elif sequence.gap == 1:
            self.entering.append(sequence)
        else:
            self.partial.append(sequence)


@dataclass(frozen=True, slots=True)
class _Flight:
    """What apply() must know of a plan."""

    step: int
    sampled: tuple[Sequence, ...]
    last: frozenset[Sequence]
    """Those that are full with this token."""
    num_ended: int
    """Sequences that had ended when the plan was made."""


class Scheduler:
    """Single-threaded: its owner serializes all calls."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.tables = BlockTables(self.pool, config.block_size)
        self.waiting: deque[Sequence] = deque()
        """In order of arrival, the preempted in front."""
        self.running: list[Sequence] = []
        """In order of arrival."""
        self.counters = Counters()
        self._decoding = DecodingSet()
        self._prefilling: list[Sequence] = []
        """The running sequences with more than one known token to compute, in order of arrival."""
        self._requests: dict[str, list[Sequence]] = {}
        self._stops = StopTokens()
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._retired: list[int] = []
        self._in_flight: deque[_Flight] = deque()
        self._num_arrived = 0
        self._num_ended = 0

    # -- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest for an id in use, QueueFull when too many wait."""
        if request.request_id in self._requests:
            raise InvalidRequest("request_id", f"a request with id {request.request_id!r} is in progress already")
        self._check_queue(request.params.n)
        sequences = [Sequence(request, index, self._num_arrived + index) for index in range(request.params.n)]
        self._num_arrived += len(sequences)
        self._requests[request.request_id] = sequences
        self._stops.add(request.stop_token_ids)
        self.waiting.extend(sequences)

    def _check_queue(self, n: int) -> None:
        waiting, limit = len(self.waiting), self.config.max_num_waiting
        if n > limit + self.config.max_num_seqs:
            most = limit + self.config.max_num_seqs
            raise InvalidRequest("n", f"n is {n}, but at most {most} sequences can run and wait here; lower it")
        if waiting + n > limit + len(self._free_rows):
            raise QueueFull(f"{waiting} sequences wait, {n} more are too many: the limit is {limit}")

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        """End a request, or one of its samples, in whatever state; its blocks are free on return.

        False when it is not, or no longer, there."""
        sequences = [s for s in self._requests.get(request_id, ()) if index is None or s.index == index]
        for sequence in sequences:
            self._end(sequence)
            self.counters.num_cancelled += 1
        return bool(sequences)

    @property
    def has_work(self) -> bool:
        """Whether any request is in progress or any result is awaited."""
        return bool(self._requests or self._in_flight)

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    # -- one step

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when no sequence can compute anything before a result or a request comes."""
        draft = _Draft(spare=self.config.max_num_batched_tokens - len(self.running))
        self._continue_decoding(draft)
        for sequence in self._prefilling:
            draft.grant(sequence, min(sequence.gap, draft.spare + 1))
        if not draft.preempted:
            self._admit_waiting(draft)
        if not draft.rows and not self._decoding.rows:
            return None
        return self._seal(draft)

    def _continue_decoding(self, draft: _Draft) -> None:
        """Whoever decodes goes on; those that are due need a block, or compute their last token."""
        for sequence in self._decoding.take_due():
            if sequence.status is not Status.RUNNING:
                continue  # preempted for another that is due
            if sequence.num_computed == sequence.capacity and not self._make_room(sequence, draft):
                continue
            if sequence.num_computed == sequence.max_computed - 1:
                draft.last.append(sequence)
            else:
                self._decoding.enroll(sequence)

    def _make_room(self, sequence: Sequence, draft: _Draft) -> bool:
        """Give the sequence its next block, at the latest arrivals' expense; False when it is itself the latest."""
        while not self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            draft.preempted = True
            if victim is sequence:
                return False
        draft.extended.append((sequence.row, self.tables.append(sequence)))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it will compute its tokens again (recompute, section 4.5)."""
        self._stop_running(sequence)
        self.counters.num_preemptions += 1
        self.counters.recomputed_tokens += sequence.num_computed
        sequence.forget_computed()
        sequence.num_preemptions += 1
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)

    def _admit_waiting(self, draft: _Draft) -> None:
        """Let sequences in, in order, while all their known tokens fit and budget, rows and watermark allow."""
        while self.waiting and self._free_rows and draft.spare > 0:
            sequence = self.waiting[0]
            # Alone in the pool, a sequence may use all of it: otherwise it could wait for ever.
            keep_free = self.config.watermark_blocks if self.running else 0
            if sequence.num_in_flight or not self.tables.can_reserve(sequence.num_tokens, keep_free):
                return
            self._admit(self.waiting.popleft(), draft)

    def _admit(self, sequence: Sequence, draft: _Draft) -> None:
        self.tables.reserve(sequence)
        sequence.row = self._free_rows.pop()
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        draft.admitted.append(_admission(sequence))
        if not sequence.num_preemptions:
            self.counters.prompt_tokens += sequence.num_prompt_tokens
        draft.spare -= 1  # it runs now, and its first token is no more than everybody's
        draft.grant(sequence, min(sequence.gap, draft.spare + 1))

    def _seal(self, draft: _Draft) -> StepPlan:
        decoding = self._decoding
        rows, sampled = decoding.rows, decoding.sequences
        are_single = all(count == 1 for count in draft.num_tokens)
        decoding.clock.now += 1
        plan = StepPlan(
            step=decoding.clock.now,
            retired=tuple(self._retired),
            admitted=tuple(draft.admitted),
            extended=tuple(draft.extended),
            rows=rows + tuple(draft.rows),
            num_tokens=() if are_single else (1,) * len(rows) + tuple(draft.num_tokens),
            num_sampled=len(sampled) + len(draft.sampled),
        )
        for sequence in draft.last:
            decoding.leave(sequence)
        for sequence in draft.entering:
            decoding.enter(sequence)
        self._prefilling = draft.partial
        self._retired.clear()
        self._in_flight.append(
            _Flight(plan.step, sampled + tuple(draft.sampled), frozenset(draft.last), self._num_ended)
        )
        self.counters.count_plan(plan)
        return plan

    def apply(self, result: StepResult) -> StepEvents:
        """Take the result of the oldest plan in flight; returns the tokens of the sequences still in progress."""
        flight = self._in_flight.popleft()
        if result.step != flight.step or len(result.token_ids) != len(flight.sampled):
            got = f"step {result.step} with {len(result.token_ids)}"
            raise AuditError(f"awaited step {flight.step} with {len(flight.sampled)} tokens, not {got}")
        events = StepEvents(flight.sampled, result.token_ids, {}, result.logprobs)
        if flight.num_ended != self._num_ended:
            events = _of_those_in_progress(events)
        for sequence, token in zip(events.sequences, events.token_ids, strict=True):
            sequence.token_ids.append(token)
        if flight.last or not self._stops.tokens.isdisjoint(events.token_ids):
            self._finish(events, flight.last)
        self.counters.count_result(result, events)
        return events

    def _finish(self, events: StepEvents, full: frozenset[Sequence]) -> None:
        """End the sequences whose last token this is."""
        stops = self._stops.tokens
        pairs = zip(events.sequences, events.token_ids, strict=True)
        suspects = [i for i, (sequence, token) in enumerate(pairs) if token in stops or sequence in full]
        for position in suspects:
            sequence = events.sequences[position]
            reason = _finish_reason(sequence, events.token_ids[position])
            if reason is not None:
                events.ends[position] = reason
                self._end(sequence)

    # -- ends

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self._stop_running(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        self._num_ended += 1
        request = sequence.request
        siblings = self._requests[request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[request.request_id]
            self._stops.remove(request.stop_token_ids)

    def _stop_running(self, sequence: Sequence) -> None:
        """It computes nothing more, and its row and blocks are free."""
        del self.running[bisect_left(self.running, sequence.arrival, key=_arrival)]
        self._decoding.leave(sequence)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        self._take_back(sequence)

    def _take_back(self, sequence: Sequence) -> None:
        """Row and blocks. Safe with steps in flight: workers run steps in order, so reuse comes after their use."""
        self.tables.free(sequence)
        self._retired.append(sequence.row)
        self._free_rows.append(sequence.row)
        sequence.row = -1

    # -- looking in

    def memory(self) -> MemoryUse:
        """O(running): for reports, not for every step."""
        return MemoryUse.of(self.running, self.pool.num_blocks, self.pool.num_free, self.config.block_size)

    def audit(self) -> None:
        """Check every invariant. Raises AuditError. O(pool): for tests and idle moments."""
        self.tables.audit(self._sequences())
        for sequence in self._sequences():
            _audit_sequence(sequence)
        self._audit_order()
        self._decoding.audit(self.running)
        if self._prefilling != [sequence for sequence in self.running if sequence.gap > 1]:
            raise AuditError(f"{self._prefilling} are not the running sequences with chunks to compute")
        self._stops.audit(held[0].request.stop_token_ids for held in self._requests.values())
        rows = [sequence.row for sequence in self.running]
        if sorted(rows + self._free_rows) != list(range(self.config.max_num_seqs)):
            raise AuditError(f"rows {sorted(rows)} in use and {sorted(self._free_rows)} free do not make up the table")
        memory = self.memory()
        if memory.blocks_used + memory.blocks_free != memory.blocks_total or memory.slots_reserved < 0:
            raise AuditError(f"memory does not add up: {memory}")

    def _audit_order(self) -> None:
        arrivals = [sequence.arrival for sequence in (*self.running, *self.waiting)]
        if arrivals != sorted(set(arrivals)):
            raise AuditError(f"running and waiting are not in order of arrival: {arrivals}")
        held = {id(sequence) for sequences in self._requests.values() for sequence in sequences}
        if held != {id(sequence) for sequence in self._sequences()}:
            raise AuditError("the requests and the queues do not hold the same sequences")

    def _sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting


_arrival = attrgetter("arrival")


def _admission(sequence: Sequence) -> Admission:
    request = sequence.request
    return Admission(
        row=sequence.row,
        token_ids=tuple(sequence.token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed=sequence.num_computed,
        block_ids=tuple(sequence.block_ids),
        params=request.params,
        seed=request.sample_seed(sequence.index),
        stop_token_ids=request.stop_token_ids,
        logprobs=request.params.logprobs,
    )


def _of_those_in_progress(events: StepEvents) -> StepEvents:
    """Without those that ended while their token was in flight."""
    kept = [i for i, sequence in enumerate(events.sequences) if sequence.status is not Status.FINISHED]
    return StepEvents(
        tuple([events.sequences[i] for i in kept]),
        tuple([events.token_ids[i] for i in kept]),
        {},
        {new: events.logprobs[old] for new, old in enumerate(kept) if old in events.logprobs},
    )


def _finish_reason(sequence: Sequence, token: int) -> FinishReason | None:
    if token < 0:
        return FinishReason.ERROR
    if token in sequence.request.stop_token_ids:
        return FinishReason.STOP
    if len(sequence.token_ids) >= sequence.request.max_len:
        return FinishReason.LENGTH
    return None


def _audit_sequence(sequence: Sequence) -> None:
    running = sequence.status is Status.RUNNING
    if running != (sequence.row >= 0) or sequence.status is Status.FINISHED:
        raise AuditError(f"{sequence} is {sequence.status} with row {sequence.row}")
    if not running and (sequence.block_ids or sequence.num_computed):
        raise AuditError(f"{sequence} waits but owns blocks or computed tokens")
    if not 0 <= sequence.num_computed <= sequence.num_tokens or sequence.num_in_flight < 0:
        raise AuditError(f"{sequence} has impossible numbers")
    if sequence.num_computed > sequence.capacity:
        raise AuditError(f"{sequence} has {sequence.num_computed} computed tokens in {sequence.capacity} slots")
