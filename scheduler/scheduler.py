"""Continuous batching over a paged pool: decides who computes what in each step, and who must wait.

`schedule()` closes the gap between known and computed tokens within the step's budget; `apply()` takes what came
back. Plans may be made ahead of results. Order of service is order of arrival: the earliest is served first, the latest
is preempted first, and the preempted come back before anybody new is let in (PagedAttention paper, section 4.5).
Sequences of one request come, go and come back together, and share what they have in common.

Work is proportional to what changes. Sequences that compute one token per step are looked at only when they need a
block or end (`decoding.py`), and their tokens are taken in bulk unless one of them ends a sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from quire.scheduler.admission import AdmissionControl, most_blocks
from quire.scheduler.audit import audit_state
from quire.scheduler.beam import BeamSearch
from quire.scheduler.blocks import AuditError
from quire.scheduler.budget import spare_tokens
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.draft import Changes, Draft, Flight
from quire.scheduler.explaining import journal as events_of
from quire.scheduler.explaining.journal import Journal
from quire.scheduler.groups import Group
from quire.scheduler.leaving import Leaving
from quire.scheduler.params import InvalidRequest, QueueFull, SamplingParams
from quire.scheduler.plan import Answer, StepEvents, StepPlan, StepResult
from quire.scheduler.request import Request
from quire.scheduler.reserved import PrefixStatus, request_for
from quire.scheduler.running import by_arrival
from quire.scheduler.searching import Searching
from quire.scheduler.sequence import FinishReason, Sequence, Status
from quire.scheduler.serving import Serving
from quire.scheduler.state import State
from quire.scheduler.stats import MemoryUse
from quire.scheduler.tables import BlockTables

HISTORY = 1024
"""Steps whose use of memory is remembered."""


class Scheduler:
    """Single-threaded: its owner serializes all calls. A deterministic function of them: blocks' names, which are
    different in every process, decide nothing."""

    def __init__(
        self, config: SchedulerConfig, *, tables: BlockTables | None = None, journal: Journal | None = None
    ) -> None:
        self.config = config
        self.state = state = State(config, tables, journal)
        self.tables, self.pool, self.counters = state.tables, state.pool, state.counters
        self.running = state.running.sequences
        """In order of arrival."""
        self.waiting = state.waiting
        """Groups, in order of arrival."""
        self.history: deque[tuple[int, MemoryUse]] = deque(maxlen=HISTORY)
        """The use of memory as each of the latest plans leaves it, with the plan's step."""
        self._leaving = Leaving(self.state)
        self._serving = Serving(self.state, self._leaving)
        self._admission = AdmissionControl(self.state, self._serving, self._leaving)
        self._searching = Searching(self.state, self._leaving)
        self._in_flight: deque[Flight] = deque()
        self._num_arrived = 0

    # -- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest for an id in use and for more than can ever run, QueueFull when too
        many wait."""
        if request.request_id in self.state.requests:
            raise InvalidRequest("request_id", f"a request with id {request.request_id!r} is in progress already")
        params = request.params
        self._check_queue(params)
        if params.beam_width is not None:
            self._check_beams(request)
        num_waiting, num_prompt_tokens = len(self.state.waiting), len(request.prompt_token_ids)
        self.state.note(request, events_of.Added(num_prompt_tokens, params.num_sequences, num_waiting))
        self._enqueue(request)

    def _enqueue(self, request: Request, is_reserved: bool = False) -> Sequence:
        """Returns the first of its sequences."""
        first, count, most = self._num_arrived, request.params.num_sequences, self.config.max_num_seqs
        self._num_arrived += count
        sequences: list[Sequence] = []
        is_search = request.params.beam_width is not None
        for start in range(0, 1 if is_search else count, most):
            group = Group(request, first + start, is_reserved)
            size = min(count - start, most)
            if is_search:
                group.search, size = BeamSearch.of(request), 1
            group.sequences = [Sequence(group, i, first + i) for i in range(start, start + size)]
            sequences += group.sequences
            self.state.waiting.push(group)
        self.state.requests.add(request, sequences)
        return sequences[0]

    def _check_queue(self, params: SamplingParams) -> None:
        count, limit = params.num_sequences, self.config.max_num_waiting
        if count > limit + self.config.max_num_seqs:
            most = limit + self.config.max_num_seqs
            name = "n" if params.n == count else "best_of"
            raise InvalidRequest(
                name, f"{name} is {count}, but at most {most} sequences can run and wait here; lower it"
            )
        waiting = self.state.waiting.num_sequences
        if waiting + count > limit + self.state.running.num_free_rows:
            raise QueueFull(f"{waiting} sequences wait, {count} more are too many: the limit is {limit}")

    def _check_beams(self, request: Request) -> None:
        width, most = request.params.num_sequences, self.config.max_num_seqs
        if width > most:
            raise InvalidRequest(
                "beam_width", f"beam_width is {width}, but at most {most} beams can run here; lower it"
            )
        needed, available = self._most_blocks(request), self.pool.num_blocks - self.state.prefixes.most_blocks()
        if needed > available:
            raise InvalidRequest(
                "beam_width",
                f"{width} beams of {request.max_len} tokens may need {needed} KV blocks, but there are {available};"
                " lower beam_width or max_tokens",
            )

    def _most_blocks(self, request: Request) -> int:
        prompt_len, width = len(request.prompt_token_ids), request.params.num_sequences
        return most_blocks(width, prompt_len, request.max_len, self.config.block_size)

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        """End a request, or one of its samples, in whatever state; its blocks are free on return.

        False when it is not, or no longer, there; and for one answer of several that are ranked when all have ended."""
        held = self.state.requests[request_id]
        if index is not None:
            held = [s for s in held if s.index == index and not s.request.params.is_ranked]
        # Those that others wait for go last.
        for sequence in reversed(held):
            num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
            self.state.note(sequence.request, events_of.Cancelled(sequence.index, num_output))
            self._leaving.end(sequence)
            self.counters.num_cancelled += 1
        return bool(held)

    @property
    def has_work(self) -> bool:
        """Whether any request is in progress or any result is awaited."""
        return bool(self.state.requests or self._in_flight)

    @property
    def num_requests(self) -> int:
        return len(self.state.requests)

    # -- reserved prefixes

    def reserve_prefix(self, name: str, token_ids: Iterable[int], cache_salt: str = "") -> None:
        """Compute these tokens, which are valid for the model, as soon as there is room, and keep their blocks.

        Raises InvalidRequest for a name in use and where too little of the pool would be left."""
        tokens, prefixes = tuple(token_ids), self.state.prefixes
        if name in prefixes:
            raise InvalidRequest("name", f"there is a reserved prefix {name!r} already; release it first")
        if not 1 <= len(tokens) < self.config.max_model_len:
            most = self.config.max_model_len - 1
            raise InvalidRequest("prefix", f"a reserved prefix has 1 to {most} tokens, not {len(tokens)}")
        searches = [r for r in self.state.requests.requests if r.params.beam_width is not None]
        least = max([self.tables.blocks_for(self.config.max_model_len), *map(self._most_blocks, searches)])
        reserved = prefixes.most_blocks()
        if reserved + self.tables.blocks_for(len(tokens)) + least > self.pool.num_blocks:
            raise InvalidRequest(
                "prefix",
                f"{len(tokens)} tokens more in reserved prefixes, beside {reserved} blocks that are reserved already,"
                f" would leave too little of the {self.pool.num_blocks} KV blocks for the longest request, which needs"
                f" {least}; shorten it, or give the KV cache more memory",
            )
        prefixes.add(name, self._enqueue(request_for(name, tokens, cache_salt), is_reserved=True))

    def release_prefix(self, name: str) -> bool:
        """Its blocks may be evicted from now on; False when there is no such prefix."""
        if name not in self.state.prefixes:
            return False
        sequence = self.state.prefixes.remove(name)
        if sequence.status is not Status.FINISHED:
            self._leaving.end(sequence)
        else:
            self.tables.free(sequence)
        return True

    def prefix_status(self) -> list[PrefixStatus]:
        return self.state.prefixes.status()

    # -- one step

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when no sequence can compute anything before a result or a request comes."""
        running = self.state.running
        draft = Draft(spare=spare_tokens(self.state))
        self._serving.go_on(draft)
        if not draft.preempted:
            self._admission.let_in(draft)
        # What has been swapped out must be under way before anybody else can be given the slots.
        if not draft.rows and not running.decoding.rows and not self.state.changes.swapped_out:
            return None
        return self._seal(draft)

    def _seal(self, draft: Draft) -> StepPlan:
        running, decoding, changes = self.state.running, self.state.running.decoding, self.state.changes
        rows, sampled = decoding.rows, decoding.sequences
        are_single = all(count == 1 for count in draft.num_tokens)
        decoding.clock.now += 1
        plan = StepPlan(
            step=decoding.clock.now,
            retired=tuple(changes.retired),
            admitted=(*changes.admitted.values(), *draft.admitted),
            extended=tuple(draft.extended),
            rows=rows + tuple(draft.rows),
            num_tokens=() if are_single else (1,) * len(rows) + tuple(draft.num_tokens),
            num_sampled=len(sampled) + len(draft.sampled) + len(draft.branches),
            forked=tuple(changes.forked.values()),
            told=tuple(changes.told.items()),
            replaced=tuple(draft.replaced),
            branched=tuple(draft.branched),
            swapped_out=tuple(changes.swapped_out),
            swapped_in=tuple(draft.swapped_in),
            copied=tuple(draft.copied),
        )
        self.state.changes = Changes()
        self.tables.num_computed += plan.total_tokens
        for sequence in draft.last:
            decoding.leave(sequence)
        for sequence in draft.entering:
            decoding.enter(sequence)
        running.prefilling = sorted(draft.partial, key=by_arrival)
        searching = [i for i, s in enumerate(draft.sampled, len(sampled)) if s.group.search is not None]
        everybody = sampled + tuple(draft.sampled) + tuple(draft.branches)
        num_cut_off = self.state.requests.num_cut_off
        self._in_flight.append(Flight(plan.step, everybody, frozenset(draft.last), num_cut_off, frozenset(searching)))
        for sequence in draft.last:
            if sequence.group.is_reserved:  # what it samples is nobody's
                self._leaving.end(sequence, is_complete=True)
        self.counters.count_plan(plan)
        self.history.append((plan.step, self.memory()))
        return plan

    def apply(self, result: StepResult) -> StepEvents:
        """Take the result of the oldest plan in flight; returns the tokens of the sequences still in progress."""
        flight, requests = self._in_flight.popleft(), self.state.requests
        if result.step != flight.step or len(result.token_ids) != len(flight.sampled):
            got = f"step {result.step} with {len(result.token_ids)}"
            raise AuditError(f"awaited step {flight.step} with {len(flight.sampled)} tokens, not {got}")
        events = StepEvents(flight.sampled, result.token_ids, {}, result.logprobs)
        answers: list[Answer] = []
        if flight.searching:
            answers += self._searching.take(flight, result)
            events = events.select([i for i in range(len(events)) if i not in flight.searching])
        if flight.num_cut_off != requests.num_cut_off:
            events = self._of_those_in_progress(events)
        for sequence, token in zip(events.sequences, events.token_ids, strict=True):
            sequence.token_ids.append(token)
        if flight.last or not requests.stops.tokens.isdisjoint(events.token_ids):
            self._finish(events, flight.last)
        if requests.rankings:
            events = self._withhold(events, answers)
        if answers:
            events = StepEvents(events.sequences, events.token_ids, events.ends, events.logprobs, tuple(answers))
        self.counters.count_result(events)
        return events

    def _of_those_in_progress(self, events: StepEvents) -> StepEvents:
        """Without those that ended while their token was in flight."""
        kept = []
        for position, sequence in enumerate(events.sequences):
            if sequence.status is not Status.FINISHED:
                kept.append(position)
            elif not sequence.group.is_reserved:
                self.counters.discarded_tokens += 1
                self.state.note(sequence.request, events_of.Discarded(sequence.index, 1))
        return events.select(kept)

    def _finish(self, events: StepEvents, full: frozenset[Sequence]) -> None:
        """End the sequences whose last token this is."""
        stops = self.state.requests.stops.tokens
        pairs = zip(events.sequences, events.token_ids, strict=True)
        suspects = [i for i, (sequence, token) in enumerate(pairs) if token in stops or sequence in full]
        for position in suspects:
            sequence = events.sequences[position]
            reason = _finish_reason(sequence, events.token_ids[position])
            if reason is not None:
                events.ends[position] = reason
                num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
                self.state.note(sequence.request, events_of.Finished(sequence.index, reason, num_output))
                self._leaving.end(sequence, is_complete=True)

    def _withhold(self, events: StepEvents, answers: list[Answer]) -> StepEvents:
        """Tokens of samples that will be ranked go to their ranking."""
        rankings, kept = self.state.requests.rankings, []
        for position, sequence in enumerate(events.sequences):
            request_id = sequence.request.request_id
            ranking = rankings.get(request_id)
            if ranking is None:
                kept.append(position)
                continue
            end, logprobs = events.ends.get(position), events.logprobs.get(position)
            ranking.add(sequence.index, events.token_ids[position], logprobs, end)
            if ranking.is_complete:
                answers += ranking.answers()
                del rankings[request_id]
        return events.select(kept)

    # -- looking in

    def memory(self) -> MemoryUse:
        """O(1)."""
        pool, tables = self.pool, self.tables
        used = pool.num_blocks - pool.num_free
        filled = tables.num_computed - tables.num_saved
        return MemoryUse(
            blocks_total=pool.num_blocks,
            blocks_free=pool.num_free - pool.num_cached,
            blocks_cached=pool.num_cached,
            blocks_used=used,
            blocks_reserved_prefix=self.state.prefixes.num_kept,
            slots_filled=filled,
            slots_reserved=used * self.config.block_size - filled,
            slots_shared=tables.num_saved,
            swap_blocks_total=tables.swap.num_blocks,
            swap_blocks_used=tables.swap.num_blocks - tables.swap.num_free,
        )

    def slots_kept_for_preempted(self) -> int:
        """Of the slots in cached blocks, those whose KV preempted requests will find when they come back, if they come
        back now. O(their blocks)."""
        num_blocks = 0
        for group in self.waiting:
            if not group.num_preemptions:
                break
            num_blocks += sum(
                len(self.state.cache.find(s, s.num_tokens // self.config.block_size)) for s in group.sequences
            )
        return num_blocks * self.config.block_size

    def audit(self) -> None:
        """Check every invariant. Raises AuditError. O(pool): for tests and idle moments."""
        audit_state(self.state, self.memory())


def _finish_reason(sequence: Sequence, token: int) -> FinishReason | None:
    if token < 0:
        return FinishReason.ERROR
    if token in sequence.request.stop_token_ids:
        return FinishReason.STOP
    if len(sequence.token_ids) >= sequence.request.max_len:
        return FinishReason.LENGTH
    return None
