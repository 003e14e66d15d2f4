"""Continuous batching over a paged pool: decides who computes what in each step, and who must wait.

`schedule()` closes the gap between known and computed tokens within the step's budget; `apply()` takes what came
back. Plans may be made ahead of results. Order of service is order of arrival: the earliest is served first, the latest
is preempted first, and the preempted come back before anybody new is let in (PagedAttention paper, section 4.5).
Sequences of one request come, go and come back together, and share what they have in common.

Work is proportional to what changes. Sequences that compute one token per step are looked at only when they need a
block or end (`decoding.py`), and their tokens are taken in bulk unless one of them ends a sequence.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter

from quire.scheduler import journal as events_of
from quire.scheduler.audit import audit_scheduler
from quire.scheduler.beam import BeamSearch, answers_of
from quire.scheduler.blocks import AuditError, BlockPool
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.decoding import DecodingSet
from quire.scheduler.draft import Changes, Draft, Flight
from quire.scheduler.groups import Group, shared_blocks
from quire.scheduler.journal import Event, Journal, Wait
from quire.scheduler.params import InvalidRequest, QueueFull, SamplingParams
from quire.scheduler.plan import Admission, Answer, Fork, Logprobs, StepEvents, StepPlan, StepResult
from quire.scheduler.preemption import Costs, choose_victim, prefers_swap
from quire.scheduler.prefix_cache import PrefixCache
from quire.scheduler.ranking import Ranking
from quire.scheduler.request import Request
from quire.scheduler.reserved import PrefixStatus, ReservedPrefixes
from quire.scheduler.sequence import FinishReason, Join, Sequence, Status
from quire.scheduler.stats import Counters, MemoryUse
from quire.scheduler.stops import StopTokens
from quire.scheduler.tables import BlockTables

HISTORY = 1024
"""Steps whose use of memory is remembered."""

_arrival = attrgetter("arrival")


class Scheduler:
    """Single-threaded: its owner serializes all calls. A deterministic function of them, but for blocks' names, which
    decide nothing."""

    def __init__(
        self, config: SchedulerConfig, *, tables: BlockTables | None = None, journal: Journal | None = None
    ) -> None:
        self.config = config
        self.tables = tables or BlockTables(BlockPool(config.num_blocks), config.block_size, config.num_swap_blocks)
        self.pool = self.tables.pool
        self.cache = PrefixCache(self.pool, config.block_size, config.enable_prefix_caching)
        self.prefixes = ReservedPrefixes(self.cache, config.block_size)
        self.journal = journal
        self.waiting: deque[Group] = deque()
        """In order of arrival."""
        self.num_waiting = 0
        """Sequences in them."""
        self.running: list[Sequence] = []
        """In order of arrival."""
        self.groups: list[Group] = []
        """Those that run, in order of arrival."""
        self.counters = Counters()
        self.history: deque[tuple[int, MemoryUse]] = deque(maxlen=HISTORY)
        """The use of memory as each of the latest plans leaves it, with the plan's step."""
        self._decoding = DecodingSet()
        self._prefilling: list[Sequence] = []
        """The running sequences with more known tokens to compute, in order of arrival."""
        self._joining: list[Group] = []
        """Groups with sequences that wait for what a sibling computes again."""
        self._searched: list[Group] = []
        """Groups whose beams have been told how they go on."""
        self._requests: dict[str, list[Sequence]] = {}
        self._rankings: dict[str, Ranking] = {}
        self._stops = StopTokens()
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._num_promised = 0
        """Free rows that are kept for sequences of running groups."""
        self._changes = Changes()
        self._in_flight: deque[Flight] = deque()
        self._num_arrived = 0
        self._num_ended = 0
        self._blocked: tuple[Group, Wait] | None = None

    # -- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest for an id in use and for more than can ever run, QueueFull when too
        many wait."""
        if request.request_id in self._requests:
            raise InvalidRequest("request_id", f"a request with id {request.request_id!r} is in progress already")
        params = request.params
        self._check_queue(params)
        if params.beam_width is not None:
            self._check_beams(request)
        elif params.is_ranked:
            self._rankings[request.request_id] = Ranking(request)
        self._note(request, events_of.Added(len(request.prompt_token_ids), params.num_sequences, len(self.waiting)))
        self._enqueue_new(request)

    def _enqueue_new(self, request: Request, is_reserved: bool = False) -> Sequence:
        first, count = self._num_arrived, request.params.num_sequences
        self._num_arrived += count
        held = self._requests[request.request_id] = []
        self._stops.add(request.stop_token_ids)
        is_search = request.params.beam_width is not None
        for start in range(0, 1 if is_search else count, self.config.max_num_seqs):
            group = Group(request, first + start, is_reserved)
            size = min(count - start, self.config.max_num_seqs)
            if is_search:
                group.search, size = BeamSearch.of(request), 1
            group.sequences = [Sequence(group, i, first + i) for i in range(start, start + size)]
            held += group.sequences
            self._enqueue(group)
        return held[0]

    def _check_queue(self, params: SamplingParams) -> None:
        count, limit = params.num_sequences, self.config.max_num_waiting
        if count > limit + self.config.max_num_seqs:
            most = limit + self.config.max_num_seqs
            name = "n" if params.n == count else "best_of"
            raise InvalidRequest(
                name, f"{name} is {count}, but at most {most} sequences can run and wait here; lower it"
            )
        if self.num_waiting + count > limit + len(self._free_rows) - self._num_promised:
            raise QueueFull(f"{self.num_waiting} sequences wait, {count} more are too many: the limit is {limit}")

    def _check_beams(self, request: Request) -> None:
        width, most = request.params.beam_width, self.config.max_num_seqs
        assert width is not None
        if width > most:
            raise InvalidRequest(
                "beam_width", f"beam_width is {width}, but at most {most} beams can run here; lower it"
            )
        needed, available = self._most_blocks(request), self.pool.num_blocks - self.prefixes.most_blocks()
        if needed > available:
            raise InvalidRequest(
                "beam_width",
                f"{width} beams of {request.max_len} tokens may need {needed} KV blocks, but there are {available};"
                " lower beam_width or max_tokens",
            )

    def _most_blocks(self, request: Request) -> int:
        """Blocks that all its sequences need at most when nothing but whole blocks of the prompt is shared."""
        shared = len(request.prompt_token_ids) // self.config.block_size
        return shared + request.params.num_sequences * (self.tables.blocks_for(request.max_len) - shared)

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        """End a request, or one of its samples, in whatever state; its blocks are free on return.

        False when it is not, or no longer, there; and for one answer of several that are ranked when all have ended."""
        held = list(self._requests.get(request_id, ()))
        if index is not None:
            held = [s for s in held if s.index == index and not s.request.params.is_ranked]
        # Those that others wait for go last.
        for sequence in reversed(held):
            num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
            self._note(sequence.request, events_of.Cancelled(sequence.index, num_output))
            self._end(sequence)
            self.counters.num_cancelled += 1
        return bool(held)

    @property
    def has_work(self) -> bool:
        """Whether any request is in progress or any result is awaited."""
        return bool(self._requests or self._in_flight)

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    # -- reserved prefixes

    def reserve_prefix(self, name: str, token_ids: Iterable[int], cache_salt: str = "") -> None:
        """Compute these tokens, which are valid for the model, as soon as there is room, and keep their blocks.

        Raises InvalidRequest for a name in use and where too little of the pool would be left."""
        tokens = tuple(token_ids)
        if name in self.prefixes:
            raise InvalidRequest("name", f"there is a reserved prefix {name!r} already; release it first")
        if not 1 <= len(tokens) < self.config.max_model_len:
            most = self.config.max_model_len - 1
            raise InvalidRequest("prefix", f"a reserved prefix has 1 to {most} tokens, not {len(tokens)}")
        in_progress = [held[0].request for held in self._requests.values()]
        beams = [self._most_blocks(request) for request in in_progress if request.params.beam_width is not None]
        least = max([self.tables.blocks_for(self.config.max_model_len), *beams])
        reserved = self.prefixes.most_blocks()
        if reserved + self.tables.blocks_for(len(tokens)) + least > self.pool.num_blocks:
            raise InvalidRequest(
                "prefix",
                f"{len(tokens)} tokens more in reserved prefixes, beside {reserved} blocks that are reserved already,"
                f" would leave too little of the {self.pool.num_blocks} KV blocks for the longest request, which needs"
                f" {least}; shorten it, or give the KV cache more memory",
            )
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        request = Request(_internal_id(name), tokens, params, 0, frozenset(), len(tokens) + 1, cache_salt)
        self.prefixes.add(name, self._enqueue_new(request, is_reserved=True))

    def release_prefix(self, name: str) -> bool:
        """Its blocks may be evicted from now on; False when there is no such prefix."""
        if name not in self.prefixes:
            return False
        sequence = self.prefixes.remove(name)
        if sequence.status is not Status.FINISHED:
            self._end(sequence)
        else:
            self.tables.free(sequence)
        return True

    def prefix_status(self) -> list[PrefixStatus]:
        return self.prefixes.status()

    # -- one step

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when no sequence can compute anything before a result or a request comes."""
        draft = Draft(spare=self.config.max_num_batched_tokens - len(self.running))
        self._continue_groups(draft)
        for sequence in self._prefilling:
            self._grant(sequence, min(sequence.gap, draft.spare + 1), draft)
        self._join_siblings(draft)
        if not draft.preempted:
            self._admit_waiting(draft)
        # What has been swapped out must be under way before anybody else can be given the slots.
        if not draft.rows and not self._decoding.rows and not self._changes.swapped_out:
            return None
        return self._seal(draft)

    def _continue_groups(self, draft: Draft) -> None:
        """Whoever decodes goes on; those that are due need a block, or compute their last token. Beams that were told
        how go on too."""
        parts: dict[Group, list[Sequence]] = {}
        for sequence in self._decoding.take_due():
            parts.setdefault(sequence.group, []).append(sequence)
        if self._searched:
            parts.update((group, group.sequences) for group in self._searched)
            self._searched = []
            parts = dict(sorted(parts.items(), key=lambda part: part[0].arrival))
        for group, members in parts.items():
            if not group.is_running or not self._provide(group, members, draft):
                continue  # preempted, for another or for itself
            for sequence in members:
                if sequence.group is not group:
                    continue  # split off, to make room for its siblings
                if group.search is not None:
                    self._grant(sequence, 1, draft)
                elif sequence.num_computed == sequence.max_computed - 1:
                    draft.last.append(sequence)
                else:
                    self._decoding.enroll(sequence)

    def _provide(self, group: Group, members: list[Sequence], draft: Draft) -> bool:
        """Blocks of their own for the next tokens of these sequences, at the latest arrivals' expense; False when it is
        the group's own."""
        while (needed := self._count_needed(group, members)) > self.pool.num_free:
            draft.preempted = True
            if len(self.groups) == 1:
                self._split(group)
                continue
            victim = choose_victim(self.groups, group)
            self._preempt(victim, group.request.request_id)
            if victim is group:
                return False
        for sequence in members:
            if not needed:
                break
            if sequence.group is not group:
                continue
            if sequence.num_computed == sequence.capacity:
                self.cache.remember(sequence)
                draft.extended.append((sequence.row, self.tables.append(sequence)))
            elif self.tables.is_written_by_many(sequence):
                source, destination, index = self.tables.copy_on_write(sequence)
                draft.copied.append((source, destination))
                draft.replaced.append((sequence.row, index, destination))
                self._note(sequence.request, events_of.Copied(sequence.index, source, destination))
        for sequence in members:
            sequence.is_tail_shared = False
        return True

    def _count_needed(self, group: Group, members: list[Sequence]) -> int:
        """Blocks that these sequences must be given: where one is full, and where others use the one they write to, of
        whom the last may keep it."""
        needed = 0
        writers: Counter[int] = Counter()
        for sequence in members:
            if sequence.group is not group:
                continue
            if sequence.num_computed == sequence.capacity:
                needed += 1
            elif sequence.is_tail_shared or group.search is not None:
                writers[sequence.block_ids[sequence.num_computed // self.config.block_size]] += 1
        return needed + sum(min(count, self.pool.ref_count(block) - 1) for block, count in writers.items())

    def _grant(self, sequence: Sequence, num_tokens: int, draft: Draft) -> None:
        """The sequence computes its next `num_tokens`; when they are its last known ones it samples one more."""
        draft.spare -= num_tokens - 1
        draft.rows.append(sequence.row)
        draft.num_tokens.append(num_tokens)
        group = sequence.group
        if group.search is None or sequence.gap > 1:
            self._note(sequence.request, events_of.Chunk(sequence.index, num_tokens))
        is_sampled = sequence.compute(num_tokens)
        self.cache.remember(sequence)
        if is_sampled:
            group.has_progressed = True
            draft.sampled.append(sequence)
        if group.search is not None:
            if not is_sampled:
                draft.partial.append(sequence)
            return
        if not group.is_led:
            self._go_on(sequence, draft)
        elif not is_sampled:
            draft.partial.append(sequence)
        else:
            self._go_on(sequence, draft)
            self._branch(sequence, draft)

    def _go_on(self, sequence: Sequence, draft: Draft) -> None:
        if sequence.num_computed == sequence.max_computed:
            draft.last.append(sequence)
        elif sequence.gap == 1:
            draft.entering.append(sequence)
        else:
            draft.partial.append(sequence)

    def _branch(self, parent: Sequence, draft: Draft) -> None:
        """The prompt has been computed: the siblings begin, and share all its blocks."""
        parent.is_tail_shared = parent.num_computed < parent.capacity
        for child in parent.group.sequences:
            if child is parent:
                continue
            child.take_numbers(parent)
            child.block_names, child.num_named = parent.block_names.copy(), parent.num_named
            child.is_tail_shared = parent.is_tail_shared
            self.tables.fork(parent, child)
            self._start_running(child)
            draft.branched.append(Fork(parent.row, child.row, child.request.sample_seed(child.index)))
            draft.branches.append(child)
            self._note(child.request, events_of.Branched(parent.index, child.index))
            self._go_on(child, draft)
        self._promise(parent.group)

    def _seal(self, draft: Draft) -> StepPlan:
        decoding, changes = self._decoding, self._changes
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
        self._changes = Changes()
        self.tables.num_computed += plan.total_tokens
        for sequence in draft.last:
            decoding.leave(sequence)
        for sequence in draft.entering:
            decoding.enter(sequence)
        draft.partial.sort(key=_arrival)
        self._prefilling = draft.partial
        searching = frozenset(
            position for position, s in enumerate(draft.sampled, len(sampled)) if s.group.search is not None
        )
        everybody = sampled + tuple(draft.sampled) + tuple(draft.branches)
        self._in_flight.append(Flight(plan.step, everybody, frozenset(draft.last), self._num_ended, searching))
        self.counters.count_plan(plan)
        for sequence in draft.last:
            if sequence.group.is_reserved:  # what it samples is nobody's
                self._end(sequence, is_complete=True)
        self.history.append((plan.step, self.memory()))
        return plan

    # -- who is let in

    def _admit_waiting(self, draft: Draft) -> None:
        """Let groups in, in order, while all their known tokens fit and budget, rows and watermark allow."""
        while self.waiting:
            group = self.waiting[0]
            blocked = self._admit(group, draft)
            if blocked is not None:
                if self.journal is not None and self._blocked != (group, blocked.wait):
                    self._note(group.request, blocked)
                    self._blocked = group, blocked.wait
                return

    def _admit(self, group: Group, draft: Draft) -> events_of.Blocked | None:
        """Let the group in, or say what it waits for."""
        if num_awaited := sum(s.num_in_flight for s in group.sequences if s not in group.reports):
            return events_of.Blocked(Wait.RESULTS, num_awaited, 0)
        for beam in group.reports:  # their siblings had not got so far: all of them will report together
            beam.sample_again()
        group.reports.clear()
        num_free_rows = len(self._free_rows) - self._num_promised
        if num_free_rows < group.num_rows:
            return events_of.Blocked(Wait.ROWS, group.num_rows, num_free_rows)
        least = len(group.sequences) if group.is_swapped else 1
        if draft.spare < least:
            return events_of.Blocked(Wait.BUDGET, least, max(0, draft.spare))
        if not self.groups:
            self._shrink_to_fit(group)
        found = [] if group.is_swapped else self._find_prefix(group.sequences[0])
        needed = self._blocks_to_admit(group, found)
        # Alone in the pool, a group may use all of it: otherwise it could wait for ever.
        keep_free = self.config.watermark_blocks if self.groups else 0
        if self.pool.num_free < needed + keep_free:
            return events_of.Blocked(Wait.BLOCKS, needed + keep_free, self.pool.num_free)
        self._leave_queue(group)
        group.is_running = True
        insort(self.groups, group, key=_arrival)
        if group.is_swapped:
            self._resume(group, draft)
        else:
            self._begin(group, found, draft)
        group.has_progressed = group.has_progressed or group.num_preemptions == 0
        self._promise(group)
        return None

    def _find_prefix(self, leader: Sequence) -> list[int]:
        most = (leader.num_tokens - 1) // self.config.block_size
        return self.cache.find(leader, most)

    def _blocks_to_admit(self, group: Group, found: list[int]) -> int:
        """Free blocks that the group takes, whole, and for samples of one prompt what their first tokens will take."""
        tables = self.tables
        if group.is_swapped:
            tails = Counter(
                s.swap_ids[s.num_computed // self.config.block_size]
                for s in group.sequences
                if s.num_computed % self.config.block_size
            )
            copies = sum(count - 1 for count in tails.values())
            slots = {slot for sequence in group.sequences for slot in sequence.swap_ids}
            more = sum(tables.blocks_for(s.num_tokens) - len(s.swap_ids) for s in group.sequences if s.swap_ids)
            return len(slots) + more + copies
        leader, *others = group.sequences
        needed = tables.blocks_for(leader.num_tokens) - len(found)
        needed += sum(self.pool.ref_count(block) == 0 for block in found)
        if group.is_undivided:
            return needed + (group.num_rows - 1 if self.groups else 0)
        shared = shared_blocks(group.sequences, self.config.block_size)
        return needed + sum(
            tables.blocks_for(s.num_tokens) - count for s, (_, count) in zip(others, shared, strict=True)
        )

    def _shrink_to_fit(self, group: Group) -> None:
        """Alone and still too large for the pool, samples go on one after the other."""
        while self._blocks_to_admit(group, []) > self.pool.num_free and len(group.sequences) > 1:
            if group.search is not None and not group.is_swapped:
                raise AuditError(f"{group} was let in, but can never run")
            if group.is_swapped:
                for sequence in group.sequences:
                    self.tables.free(sequence)
                    sequence.forget_computed()
                group.is_swapped = False
            else:
                self._split(group)

    def _begin(self, group: Group, found: list[int], draft: Draft) -> None:
        """The first sequence begins to compute what it knows; its siblings follow when they can share that."""
        leader, *others = group.sequences
        num_recomputed = (
            sum(s.num_tokens - s.num_prompt_tokens for s in group.sequences) if group.num_preemptions else 0
        )
        for block in found:
            self.tables.adopt(leader, block)
        leader.num_named = len(found)
        tail = self.prefixes.find_tail(leader, len(found), leader.num_tokens - 1)
        if tail is not None:
            source, num_tokens = tail
            draft.copied.append((source, self.tables.append(leader)))
            leader.skip(num_tokens)
            self.tables.num_computed += num_tokens
        num_cached = leader.num_computed
        if num_cached:
            self.prefixes.count_hit(leader)
        self.tables.reserve(leader)
        is_undivided = group.is_undivided
        if others and not is_undivided:
            for sequence, (source_index, count) in zip(
                others, shared_blocks(group.sequences, self.config.block_size), strict=True
            ):
                own = self.tables.blocks_for(sequence.num_tokens) - count
                blocks = [self.pool.allocate() for _ in range(own)]
                sequence.join = Join(group.sequences[source_index], count, blocks)
            self._joining.append(group)
        for sequence in others:
            sequence.status = Status.PENDING
        if not group.num_preemptions:
            self.counters.prompt_tokens += leader.num_prompt_tokens
        self.counters.prefix_query_tokens += leader.num_tokens
        self.counters.prefix_hit_tokens += num_cached
        num_blocks = len(leader.block_ids)
        self._note(group.request, events_of.Admitted(leader.num_tokens, num_cached, num_blocks, num_recomputed))
        self._admit_sequence(leader, draft)

    def _resume(self, group: Group, draft: Draft) -> None:
        """Its blocks come back from the swap space, and everybody goes on where they were."""
        back = [sequence for sequence in group.sequences if sequence.swap_ids]
        pairs = self.tables.swap_in(back)
        draft.swapped_in += pairs
        group.is_swapped = False
        self._note(group.request, events_of.Resumed(len(pairs), sum(s.num_computed for s in back)))
        for sequence in group.sequences:
            if sequence not in back:
                sequence.status = Status.PENDING
                continue
            sequence.is_tail_shared = False
            if self.tables.is_written_by_many(sequence):
                source, destination, _ = self.tables.copy_on_write(sequence)
                draft.copied.append((source, destination))
                self._note(sequence.request, events_of.Copied(sequence.index, source, destination))
            self.tables.reserve(sequence)
        for sequence in back:
            self._admit_sequence(sequence, draft)

    def _admit_sequence(self, sequence: Sequence, draft: Draft) -> None:
        """It has its blocks: now it gets a row, and computes."""
        self._start_running(sequence)
        draft.admitted.append(_admission(sequence))
        draft.spare -= 1  # it runs now, and its first token is no more than everybody's
        self._grant(sequence, min(sequence.gap, draft.spare + 1), draft)

    def _join_siblings(self, draft: Draft) -> None:
        """Whoever begins with tokens that a sibling has computed again goes on from there."""
        for group in list(self._joining):
            for sequence in group.sequences:
                join = sequence.join
                if join is None or draft.spare <= 0 or join.source.status is not Status.RUNNING:
                    continue
                if join.source.num_computed < join.num_shared * self.config.block_size:
                    continue
                self.tables.share(sequence, join.source, join.num_shared)
                self.tables.take(sequence, join.block_ids)
                sequence.join = None
                self._admit_sequence(sequence, draft)
            self._promise(group)
            if not group.has_joining:
                self._joining.remove(group)

    # -- who gives up what it has

    def _preempt(self, group: Group, by: str, may_swap: bool = True) -> None:
        """Take rows and blocks from all its sequences; it comes back when there is room (section 4.5)."""
        holders = [sequence for sequence in group.sequences if sequence.block_ids]
        num_blocks, num_tokens = self.tables.distinct(holders)
        costs = Costs.of(self.config, num_blocks, num_tokens)
        swaps = may_swap and 0 < num_blocks <= self.tables.swap.num_free and not group.has_joining
        swaps = swaps and prefers_swap(self.config.preemption_mode, costs)
        mode = "swap" if swaps else "recompute"
        self._note(
            group.request, events_of.Preempted(by, mode, num_blocks, num_tokens, costs.swap_s, costs.recompute_s)
        )
        for sequence in group.sequences:
            self._stop(sequence)
            sequence.num_preemptions += 1
        if swaps:
            self._changes.swapped_out += self.tables.swap_out(holders)
            group.is_swapped = True
            self.counters.num_swap_preemptions += 1
        else:
            self.counters.recomputed_tokens += num_tokens
            for sequence in group.sequences:
                self.tables.free(sequence)
                sequence.forget_computed()
        self.counters.num_preemptions += 1
        group.num_preemptions += 1
        group.has_progressed = False
        self._retire_group(group)
        self._enqueue(group)

    def _split(self, group: Group) -> None:
        """The group is too large for the pool: its last sample goes on by itself, when there is room."""
        if len(group.sequences) == 1 or group.search is not None:
            raise AuditError(f"{group} is alone and finds no room")
        sequence = group.sequences[-1]
        was_waiting = not group.is_running
        if was_waiting:
            self.num_waiting -= 1
        else:
            self._stop(sequence)
            self.counters.recomputed_tokens += sequence.num_computed
            self.counters.num_preemptions += 1
            request_id = group.request.request_id
            own = Costs.of(self.config, len(sequence.block_ids), sequence.num_computed)
            self._note(
                group.request,
                events_of.Preempted(
                    request_id, "recompute", len(sequence.block_ids), sequence.num_computed, own.swap_s, own.recompute_s
                ),
            )
        self.tables.free(sequence)
        sequence.forget_computed()
        sequence.num_preemptions += 1
        group.sequences.pop()
        alone = Group(group.request, sequence.arrival)
        alone.sequences, alone.num_preemptions, alone.has_progressed = [sequence], group.num_preemptions + 1, False
        sequence.group = alone
        self._promise(group)
        self._enqueue(alone)

    def _stop(self, sequence: Sequence) -> None:
        """It computes nothing more for now; its row is free, and its blocks have names. It is left waiting."""
        if sequence.status is Status.RUNNING:
            del self.running[bisect_left(self.running, sequence.arrival, key=_arrival)]
            self._decoding.leave(sequence)
            if sequence in self._prefilling:
                self._prefilling.remove(sequence)
            self._changes.give_up(sequence.row)
            self._free_rows.append(sequence.row)
            sequence.row = -1
            self.cache.remember(sequence)
        if sequence.join is not None:
            for block in sequence.join.block_ids:
                self.pool.release(block)
            sequence.join = None
        sequence.is_tail_shared = False
        sequence.status = Status.WAITING

    def _start_running(self, sequence: Sequence) -> None:
        sequence.row = self._free_rows.pop()
        sequence.status = Status.RUNNING
        if self.running and self.running[-1].arrival > sequence.arrival:
            insort(self.running, sequence, key=_arrival)
        else:
            self.running.append(sequence)

    def _retire_group(self, group: Group) -> None:
        """It runs no more."""
        del self.groups[bisect_left(self.groups, group.arrival, key=_arrival)]
        group.is_running = False
        if group in self._joining:
            self._joining.remove(group)
        if group in self._searched:
            self._searched.remove(group)
        self._promise(group)

    def _promise(self, group: Group) -> None:
        """Keep as many rows free for it as it has still to take."""
        wanted = group.num_rows - group.num_held if group.is_running and group.sequences else 0
        self._num_promised += wanted - group.num_promised
        group.num_promised = wanted

    def _enqueue(self, group: Group) -> None:
        self.num_waiting += group.num_rows
        if not self.waiting or self.waiting[-1].arrival < group.arrival:
            self.waiting.append(group)
            return
        place = next(i for i, other in enumerate(self.waiting) if other.arrival > group.arrival)
        self.waiting.insert(place, group)

    def _leave_queue(self, group: Group) -> None:
        self.waiting.remove(group)  # mostly the first
        self.num_waiting -= group.num_rows
        self._blocked = None

    # -- what comes back

    def apply(self, result: StepResult) -> StepEvents:
        """Take the result of the oldest plan in flight; returns the tokens of the sequences still in progress."""
        flight = self._in_flight.popleft()
        if result.step != flight.step or len(result.token_ids) != len(flight.sampled):
            got = f"step {result.step} with {len(result.token_ids)}"
            raise AuditError(f"awaited step {flight.step} with {len(flight.sampled)} tokens, not {got}")
        events = StepEvents(flight.sampled, result.token_ids, {}, result.logprobs)
        answers: list[Answer] = []
        if flight.searching:
            answers += self._take_candidates(flight, result)
            events = _selected(events, [i for i in range(len(events)) if i not in flight.searching])
        if flight.num_ended != self._num_ended:
            events = self._of_those_in_progress(events)
        for sequence, token in zip(events.sequences, events.token_ids, strict=True):
            sequence.token_ids.append(token)
        if flight.last or not self._stops.tokens.isdisjoint(events.token_ids):
            self._finish(events, flight.last)
        if self._rankings:
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
                self._note(sequence.request, events_of.Discarded(sequence.index, 1))
        return events if len(kept) == len(events) else _selected(events, kept)

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
                num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
                self._note(sequence.request, events_of.Finished(sequence.index, reason, num_output))
                self._end(sequence, is_complete=True)

    def _withhold(self, events: StepEvents, answers: list[Answer]) -> StepEvents:
        """Tokens of samples that will be ranked go to their ranking."""
        kept = []
        for position, sequence in enumerate(events.sequences):
            ranking = self._rankings.get(sequence.request.request_id)
            if ranking is not None:
                logprobs = events.logprobs.get(position)
                ranking.add(sequence.index, events.token_ids[position], logprobs, events.ends.get(position))
                if ranking.is_complete:
                    answers += ranking.answers()
                    del self._rankings[sequence.request.request_id]
            else:
                kept.append(position)
        return events if len(kept) == len(events) else _selected(events, kept)

    # -- beam search

    def _take_candidates(self, flight: Flight, result: StepResult) -> list[Answer]:
        """Note what may follow each beam; where all beams of a search have reported, it goes on."""
        complete: list[Group] = []
        for position in sorted(flight.searching):
            sequence = flight.sampled[position]
            group = sequence.group
            if sequence.status is Status.FINISHED:
                self.counters.discarded_tokens += 1
                self._note(sequence.request, events_of.Discarded(sequence.index, 1))
                continue
            group.reports[sequence] = result.token_ids[position], result.logprobs.get(position)
            if len(group.reports) == len(group.sequences):
                complete.append(group)
        answers: list[Answer] = []
        for group in complete:
            answers += self._search(group)
        return answers

    def _search(self, group: Group) -> tuple[Answer, ...]:
        search, reports = group.search, group.reports
        assert search is not None
        moves = search.step([_candidates(*reports[sequence]) for sequence in group.sequences])
        reports.clear()
        if moves is None:
            answers = answers_of(group.request, search)
            for answer in answers:
                self._note(group.request, events_of.Finished(answer.index, answer.finish_reason, len(answer.token_ids)))
            for sequence in list(group.sequences):
                self._end(sequence, is_complete=True)
            return answers
        stays: dict[int, Sequence] = {}
        lines: list[tuple[Sequence, Sequence | None]] = []
        for move in moves:
            parent = group.sequences[move.parent]
            lines.append((parent, parent if move.parent in stays else None))
            stays.setdefault(move.parent, parent)
        dropped = [s for place, s in enumerate(group.sequences) if place not in stays]
        beams = self._fork_beams(group, lines, {s.index for s in stays.values()})
        for sequence in dropped:
            group.sequences.remove(sequence)
            self._drop(sequence)
        for beam, (_, source), move in zip(beams, lines, moves, strict=True):
            beam.token_ids.append(move.token)
            if not group.is_running:
                continue
            if source is not None:
                self._start_running(beam)
                self._changes.forked[beam.row] = Fork(source.row, beam.row, 0)
                self._note(group.request, events_of.Forked(source.index, beam.index))
            self._changes.told[beam.row] = move.token
        group.sequences = beams
        self._requests[group.request.request_id] = list(beams)
        if group.is_running:
            insort(self._searched, group, key=_arrival)
            self._promise(group)
        return ()

    def _fork_beams(
        self, group: Group, lines: list[tuple[Sequence, Sequence | None]], used: set[int]
    ) -> list[Sequence]:
        """The beams in their new order: a parent's first child takes its place, the others are copies of it."""
        unused = iter(index for index in range(group.num_rows) if index not in used)
        beams = []
        for parent, source in lines:
            if source is None:
                beams.append(parent)
                continue
            index = next(unused)
            child = parent.branch(index, group.arrival + index)
            child.status = Status.WAITING
            self.tables.fork(parent, child)
            beams.append(child)
        return beams

    def _drop(self, sequence: Sequence) -> None:
        """A beam that nobody descends from."""
        self._stop(sequence)
        self.tables.free(sequence)
        sequence.status = Status.FINISHED

    # -- ends

    def _end(self, sequence: Sequence, is_complete: bool = False) -> None:
        request, group = sequence.request, sequence.group
        was_waiting, num_rows = not group.is_running, group.num_rows
        is_kept = is_complete and group.is_reserved
        heir = self._heir(sequence)
        if heir is not None:
            self._hand_over(sequence, heir)
        is_missed = any(s.join is not None and s.join.source is sequence for s in group.sequences)
        self._stop(sequence)
        if is_kept:
            self.prefixes.keep(_name_of(request))
        else:
            self.tables.free(sequence)
        sequence.status = Status.FINISHED
        self._num_ended += 1
        group.sequences.remove(sequence)
        if was_waiting:
            self.num_waiting -= num_rows - (group.num_rows if group.sequences else 0)
        if not group.sequences:
            if was_waiting:
                self.waiting.remove(group)
            else:
                self._retire_group(group)
        elif is_missed:  # siblings cannot go on from what they waited for
            self._preempt(group, request.request_id, may_swap=False)
        elif group.is_running:
            self._promise(group)
        held = self._requests[request.request_id]
        held.remove(sequence)
        if held:
            return
        del self._requests[request.request_id]
        self._note(request, events_of.Ended())
        self._stops.remove(request.stop_token_ids)
        # A ranking that is complete is still to be told of the last token.
        if not is_complete:
            self._rankings.pop(request.request_id, None)

    def _heir(self, sequence: Sequence) -> Sequence | None:
        """Who goes on with the prompt that this one computes for all its siblings."""
        if sequence.status is not Status.RUNNING or not sequence.group.is_led:
            return None
        return next((s for s in sequence.group.sequences if s.status is Status.PENDING), None)

    def _hand_over(self, sequence: Sequence, heir: Sequence) -> None:
        """The heir gets everything but the row, which samples by another seed: it is admitted anew."""
        heir.take_numbers(sequence)
        heir.block_ids, heir.capacity, heir.num_named = sequence.block_ids, sequence.capacity, sequence.num_named
        sequence.block_ids = []
        self._start_running(heir)
        self._changes.admitted[heir.row] = _admission(heir)
        self._prefilling[self._prefilling.index(sequence)] = heir

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
            blocks_reserved_prefix=self.prefixes.num_kept,
            slots_filled=filled,
            slots_reserved=used * self.config.block_size - filled,
            slots_shared=tables.num_saved,
            swap_blocks_total=tables.swap.num_blocks,
            swap_blocks_used=tables.swap.num_blocks - tables.swap.num_free,
        )

    def audit(self) -> None:
        """Check every invariant. Raises AuditError. O(pool): for tests and idle moments."""
        audit_scheduler(self)

    def sequences(self) -> Iterator[Sequence]:
        """All that are in progress."""
        return chain.from_iterable(group.sequences for group in chain(self.groups, self.waiting))

    def _note(self, request: Request, event: Event) -> None:
        if self.journal is not None:
            self.journal.note(self._decoding.clock.now + 1, request.request_id, event)


def _internal_id(prefix_name: str) -> str:
    """Of the request that computes a reserved prefix; no client's can be the same, for those are printable."""
    return f"\0{prefix_name}"


def _name_of(request: Request) -> str:
    return request.request_id[1:]


def _admission(sequence: Sequence) -> Admission:
    request = sequence.request
    logprobs = request.params.logprobs
    if sequence.group.search is not None:
        logprobs = sequence.group.search.num_candidates
    elif request.params.is_ranked:
        logprobs = logprobs or 0
    return Admission(
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


def _candidates(token: int, logprobs: Logprobs | None) -> list[tuple[int, float]]:
    """What may follow a beam, best first; nothing where the logits were not numbers."""
    if token < 0:
        return []
    if logprobs is None:
        raise AuditError("a beam came back without log-probabilities")
    return list(zip(logprobs.token_ids[1:], logprobs.values[1:], strict=True))


def _selected(events: StepEvents, positions: list[int]) -> StepEvents:
    """The events at these positions."""
    ends, logprobs = events.ends, events.logprobs
    return StepEvents(
        tuple([events.sequences[i] for i in positions]),
        tuple([events.token_ids[i] for i in positions]),
        {new: ends[old] for new, old in enumerate(positions) if old in ends} if ends else {},
        {new: logprobs[old] for new, old in enumerate(positions) if old in logprobs} if logprobs else {},
    )


def _finish_reason(sequence: Sequence, token: int) -> FinishReason | None:
    if token < 0:
        return FinishReason.ERROR
    if token in sequence.request.stop_token_ids:
        return FinishReason.STOP
    if len(sequence.token_ids) >= sequence.request.max_len:
        return FinishReason.LENGTH
    return None
