"""Continuous batching over a paged pool: decides who computes what in each step, and who must wait.

`schedule()` closes the gap between known and computed tokens within the step's budget; `apply()` takes what came
back. Plans may be made ahead of results. Order of service is order of arrival: the earliest is served first, the latest
is preempted first, and the preempted come back before anybody new is let in (PagedAttention paper, section 4.5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from quire.scheduler.blocks import AuditError, BlockPool
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.params import InvalidRequest, QueueFull
from quire.scheduler.plan import Admission, StepPlan, StepResult, TokenEvent
from quire.scheduler.request import Request
from quire.scheduler.sequence import FinishReason, Sequence, Status
from quire.scheduler.stats import Counters, MemoryUse
from quire.scheduler.tables import BlockTables


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    spare: int
    """Tokens of the budget beyond one for each running sequence."""
    admitted: list[Admission] = field(default_factory=list)
    extended: list[tuple[int, int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    preempted: bool = False

    def grant(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence computes its next `num_tokens`; when they are its last known ones it samples one more."""
        self.rows.append(sequence.row)
        self.num_tokens.append(num_tokens)
        sequence.num_computed += num_tokens
        if sequence.num_computed == sequence.num_tokens:
            sequence.num_tokens += 1
            self.sampled.append(sequence)


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
        self._requests: dict[str, list[Sequence]] = {}
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._retired: list[int] = []
        self._in_flight: deque[tuple[int, list[Sequence]]] = deque()
        self._num_arrived = 0
        self._num_planned = 0

    # -- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest for an id in use, QueueFull when too many wait."""
        if request.request_id in self._requests:
            raise InvalidRequest("request_id", f"a request with id {request.request_id!r} is in progress already")
        self._check_queue(request.params.n)
        sequences = [Sequence(request, index, self._num_arrived + index) for index in range(request.params.n)]
        self._num_arrived += len(sequences)
        self._requests[request.request_id] = sequences
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
        self._continue_running(draft)
        if not draft.preempted:
            self._admit_waiting(draft)
        if not draft.rows:
            return None
        return self._seal(draft)

    def _continue_running(self, draft: _Draft) -> None:
        """One token for each sequence that decodes, a chunk for each that has more to compute."""
        running = self.running
        i = 0
        while i < len(running):  # preemption shortens the list from its end
            sequence = running[i]
            i += 1
            gap = sequence.num_tokens - sequence.num_computed
            if sequence.num_computed >= sequence.max_computed:
                continue
            if gap > 1:
                gap = min(gap, draft.spare + 1)
                draft.spare -= gap - 1
            elif sequence.num_computed == sequence.capacity and not self._make_room(sequence, draft):
                continue
            draft.grant(sequence, gap)

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
        self.running.remove(sequence)
        self._take_back(sequence)
        self.counters.num_preemptions += 1
        self.counters.recomputed_tokens += sequence.num_computed
        sequence.num_computed = 0
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
        chunk = min(sequence.num_tokens - sequence.num_computed, draft.spare)
        draft.spare -= chunk
        draft.grant(sequence, chunk)

    def _seal(self, draft: _Draft) -> StepPlan:
        self._num_planned += 1
        plan = StepPlan(
            step=self._num_planned,
            retired=tuple(self._retired),
            admitted=tuple(draft.admitted),
            extended=tuple(draft.extended),
            rows=tuple(draft.rows),
            num_tokens=() if sum(draft.num_tokens) == len(draft.rows) else tuple(draft.num_tokens),
            num_sampled=len(draft.sampled),
        )
        self._retired.clear()
        self._in_flight.append((plan.step, draft.sampled))
        self.counters.count_plan(plan)
        return plan

    def apply(self, result: StepResult) -> list[TokenEvent]:
        """Take the result of the oldest plan in flight; returns one event per token of a sequence still in progress."""
        step, sampled = self._in_flight.popleft()
        if result.step != step or len(result.token_ids) != len(sampled):
            got = f"step {result.step} with {len(result.token_ids)}"
            raise AuditError(f"awaited step {step} with {len(sampled)} tokens, not {got}")
        events: list[TokenEvent] = []
        logprobs = result.logprobs
        for position, (sequence, token) in enumerate(zip(sampled, result.token_ids, strict=True)):
            if sequence.status is Status.FINISHED:
                continue  # ended while its token was in flight
            sequence.token_ids.append(token)
            reason = _finish_reason(sequence, token)
            events.append(TokenEvent(sequence, token, reason, logprobs.get(position) if logprobs else None))
            if reason is not None:
                self._end(sequence)
        self.counters.count_result(result, events)
        return events

    # -- ends

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._take_back(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]

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
