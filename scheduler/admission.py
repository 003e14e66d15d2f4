"""Who is let in: in order, while all their known tokens fit and budget, rows and watermark allow."""

from __future__ import annotations

from quire.scheduler.blocks import AuditError
from quire.scheduler.draft import Draft
from quire.scheduler.explaining import journal as events_of
from quire.scheduler.explaining.journal import Wait
from quire.scheduler.groups import Group
from quire.scheduler.leaving import Leaving
from quire.scheduler.sequence import Join, Status
from quire.scheduler.serving import Serving
from quire.scheduler.state import State


class AdmissionControl:
    def __init__(self, state: State, serving: Serving, leaving: Leaving) -> None:
        self._state = state
        self._serving = serving
        self._leaving = leaving
        self._blocked: tuple[Group, Wait] | None = None
        """Who waited for what when it was last told."""

    def let_in(self, draft: Draft) -> None:
        """As many groups as may come, in order of arrival."""
        while self._state.waiting:
            group = self._state.waiting.first
            blocked = self._try(group, draft)
            if blocked is not None:
                if self._state.journal is not None and self._blocked != (group, blocked.wait):
                    self._state.note(group.request, blocked)
                    self._blocked = group, blocked.wait
                return

    def _try(self, group: Group, draft: Draft) -> events_of.Blocked | None:
        """Let the group in, or say what it waits for."""
        state = self._state
        if num_awaited := sum(s.num_in_flight for s in group.sequences if s not in group.reports):
            group.forget_shares()
            return events_of.Blocked(Wait.RESULTS, num_awaited, 0)
        if state.running.num_free_rows < group.num_rows:
            return events_of.Blocked(Wait.ROWS, group.num_rows, state.running.num_free_rows)
        least = len(group.sequences) if group.is_swapped else 1
        if draft.spare < least:
            return events_of.Blocked(Wait.BUDGET, least, max(0, draft.spare))
        for beam in group.reports:  # its siblings had not got so far: all of them will report together
            beam.sample_again()
        group.reports.clear()
        is_alone = not state.running.groups
        if is_alone:
            self._shrink_to_fit(group)
        found = self._find_prefix(group)
        needed = self._blocks_needed(group, found)
        # Alone in the pool, a group may use all of it: otherwise it could wait for ever.
        if not is_alone:
            needed += state.config.watermark_blocks + (group.num_rows - 1 if group.is_undivided else 0)
        if state.pool.num_free < needed:
            return events_of.Blocked(Wait.BLOCKS, needed, state.pool.num_free)
        state.waiting.remove(group)
        state.running.enter(group)
        self._blocked = None
        group.has_progressed = group.num_preemptions == 0
        if group.is_swapped:
            self._resume(group, draft)
        else:
            self._begin(group, found, draft)
        state.running.promise(group)
        return None

    def _find_prefix(self, group: Group) -> list[int]:
        """Blocks that hold the first tokens of its first sequence."""
        if group.is_swapped:
            return []
        leader = group.sequences[0]
        return self._state.cache.find(leader, (leader.num_tokens - 1) // self._state.config.block_size)

    def _blocks_needed(self, group: Group, found: list[int]) -> int:
        """Free blocks that its known tokens take."""
        if group.is_swapped:
            return self._state.tables.needed_to_swap_in(group.sequences)
        shares = None
        if not group.is_undivided:
            shares = [share.num_blocks for share in group.shares(self._state.config.block_size)[1:]]
        return self._state.tables.needed_to_begin(group.sequences, found, shares)

    def _shrink_to_fit(self, group: Group) -> None:
        """Alone and still too large for the pool, samples go on one after the other."""
        state = self._state
        while self._blocks_needed(group, []) > state.pool.num_free and len(group.sequences) > 1:
            if group.is_swapped:
                for sequence in group.sequences:
                    state.tables.free(sequence)
                    sequence.forget_computed()
                group.is_swapped = False
            elif group.search is not None:
                raise AuditError(f"{group} was accepted, but can never run")
            else:
                self._leaving.split(group)

    def _begin(self, group: Group, found: list[int], draft: Draft) -> None:
        """The first sequence begins to compute what it knows; its siblings follow when they can share that."""
        state, tables = self._state, self._state.tables
        leader, *others = group.sequences
        for block in found:
            tables.adopt(leader, block)
        leader.num_named = len(found)
        tail = state.prefixes.find_tail(leader, len(found), leader.num_tokens - 1)
        if tail is not None:
            source, num_tokens = tail
            draft.copied.append((source, tables.append(leader)))
            leader.skip(num_tokens)
            tables.num_computed += num_tokens
        num_cached = leader.num_computed
        if num_cached:
            state.prefixes.count_hit(leader)
        tables.reserve(leader)
        if others and not group.is_undivided:
            self._plan_joins(group)
        for sequence in others:
            sequence.status = Status.PENDING
        if not group.num_preemptions:
            state.counters.prompt_tokens += leader.num_prompt_tokens
        state.counters.prefix_query_tokens += leader.num_tokens
        state.counters.prefix_hit_tokens += num_cached
        state.note(group.request, events_of.Admitted(leader.num_tokens, num_cached, len(leader.block_ids)))
        self._serving.admit(leader, draft)

    def _plan_joins(self, group: Group) -> None:
        """After a preemption: what sequences have in common is computed by the first of them only."""
        state = self._state
        shares = group.shares(state.config.block_size)
        for sequence, share in zip(group.sequences[1:], shares[1:], strict=True):
            own = state.tables.blocks_for(sequence.num_tokens) - share.num_blocks
            blocks = [state.pool.allocate() for _ in range(own)]
            sequence.join = Join(group.sequences[share.source], share.num_blocks, blocks)
        group.forget_shares()
        state.running.joining.append(group)

    def _resume(self, group: Group, draft: Draft) -> None:
        """Its blocks come back from the swap space, and everybody goes on where they were."""
        state, tables = self._state, self._state.tables
        back = [sequence for sequence in group.sequences if sequence.swap_ids]
        pairs = tables.swap_in(back)
        draft.swapped_in += pairs
        group.is_swapped = False
        state.note(group.request, events_of.Resumed(len(pairs), sum(s.num_computed for s in back)))
        for sequence in group.sequences:
            if not sequence.block_ids:
                sequence.status = Status.PENDING
                continue
            if tables.is_written_by_many(sequence):
                source, destination, _ = tables.copy_on_write(sequence)
                draft.copied.append((source, destination))
                state.note(sequence.request, events_of.Copied(sequence.index, source, destination))
            tables.reserve(sequence)
        for sequence in back:
            self._serving.admit(sequence, draft)


def most_blocks(group_size: int, prompt_len: int, max_len: int, block_size: int) -> int:
    """Blocks that sequences of one prompt need at most, when nothing but its whole blocks is shared."""
    shared = prompt_len // block_size
    return shared + group_size * (-(-max_len // block_size) - shared)
