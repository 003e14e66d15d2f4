"""Who runs goes on: with blocks of their own to write to, within the step's budget, and in the order of service."""

from __future__ import annotations

from collections import Counter

from quire.scheduler.draft import Draft
from quire.scheduler.explaining import journal as events_of
from quire.scheduler.groups import Group
from quire.scheduler.leaving import Leaving
from quire.scheduler.plan import Admission, Fork
from quire.scheduler.preemption import choose_victim
from quire.scheduler.sequence import Sequence, Status
from quire.scheduler.state import State


class Serving:
    def __init__(self, state: State, leaving: Leaving) -> None:
        self._state = state
        self._leaving = leaving

    def go_on(self, draft: Draft) -> None:
        """Everybody who runs, as far as blocks and budget allow."""
        self._continue_groups(draft)
        for sequence in self._state.running.prefilling:
            self._grant(sequence, min(sequence.gap, draft.spare + 1), draft)
        self._join_siblings(draft)

    def admit(self, sequence: Sequence, draft: Draft) -> None:
        """It has its blocks: now it gets a row, and computes."""
        self._state.running.start(sequence)
        draft.admitted.append(Admission.of(sequence))
        draft.spare -= 1  # it runs now, and its first token is no more than everybody's
        self._grant(sequence, min(sequence.gap, draft.spare + 1), draft)

    # -- one token each

    def _continue_groups(self, draft: Draft) -> None:
        """Those that are due need a block, or compute their last token; other decoders go on unseen. Beams that have
        been told how go on too."""
        running = self._state.running
        due = running.decoding.take_due()
        if not running.searched and len(due) <= self._state.pool.num_free:  # the usual step: there is room for all
            for sequence in due:
                self._extend(sequence, draft)
                self._decode(sequence, draft)
            return
        parts: dict[Group, list[Sequence]] = {}
        for sequence in due:
            parts.setdefault(sequence.group, []).append(sequence)
        if running.searched:
            parts.update((group, group.sequences) for group in running.searched)
            running.searched = []
            parts = dict(sorted(parts.items(), key=lambda part: part[0].arrival))
        for group, members in parts.items():
            if not group.is_running or not self._provide(group, members, draft):
                continue  # preempted, for another or for itself
            for sequence in members:
                if sequence.group is not group:
                    continue  # split off, to make room for its siblings
                if group.search is not None:
                    self._grant(sequence, 1, draft)
                else:
                    self._decode(sequence, draft)

    def _provide(self, group: Group, members: list[Sequence], draft: Draft) -> bool:
        """Blocks of their own for the next tokens of these sequences, at the latest arrivals' expense; False when it is
        the group's own."""
        if not self._make_room(group, members, draft):
            return False
        for sequence in members:
            if sequence.group is group:
                self._extend(sequence, draft)
        return True

    def _extend(self, sequence: Sequence, draft: Draft) -> None:
        """A block where its last one is full, or a copy where that is another's too. The caller has made room."""
        tables = self._state.tables
        if sequence.num_computed == sequence.capacity:
            self._state.cache.remember(sequence)
            draft.extended.append((sequence.row, tables.append(sequence)))
        elif (sequence.is_tail_shared or sequence.group.search is not None) and tables.is_written_by_many(sequence):
            source, destination, index = tables.copy_on_write(sequence)
            draft.copied.append((source, destination))
            draft.replaced.append((sequence.row, index, destination))
            self._state.note(sequence.request, events_of.Copied(sequence.index, source, destination))
        sequence.is_tail_shared = False

    def _decode(self, sequence: Sequence, draft: Draft) -> None:
        """It computes one token in this step, and until it is due again, or its last."""
        if sequence.num_computed == sequence.max_computed - 1:
            draft.last.append(sequence)
        else:
            self._state.running.decoding.enroll(sequence)

    def _make_room(self, group: Group, members: list[Sequence], draft: Draft) -> bool:
        state = self._state
        while self._count_needed(group, members) > state.pool.num_free:
            draft.preempted = True
            groups = state.running.groups
            if len(groups) == 1:
                self._leaving.split(group)
                continue
            victim = choose_victim(groups, group)
            self._leaving.preempt(victim, group.request.request_id)
            if victim is group:
                return False
        return True

    def _count_needed(self, group: Group, members: list[Sequence]) -> int:
        """Blocks that these sequences must be given: where one is full, and where others use the one they write to, of
        whom the last may keep it."""
        block_size, pool = self._state.config.block_size, self._state.pool
        needed = 0
        writers: Counter[int] = Counter()
        for sequence in members:
            if sequence.group is not group:
                continue
            if sequence.num_computed == sequence.capacity:
                needed += 1
            elif sequence.is_tail_shared or group.search is not None:
                writers[sequence.block_ids[sequence.num_computed // block_size]] += 1
        if writers:
            needed += sum(min(count, pool.ref_count(block) - 1) for block, count in writers.items())
        return needed

    # -- chunks of known tokens

    def _grant(self, sequence: Sequence, num_tokens: int, draft: Draft) -> None:
        """The sequence computes its next `num_tokens`; when they are its last known ones it samples one more."""
        group = sequence.group
        draft.spare -= num_tokens - 1
        draft.rows.append(sequence.row)
        draft.num_tokens.append(num_tokens)
        if group.search is None or sequence.gap > 1:
            self._state.note(sequence.request, events_of.Chunk(sequence.index, num_tokens))
        is_sampled = sequence.compute(num_tokens)
        self._state.cache.remember(sequence)
        if is_sampled:
            group.has_progressed = True
            draft.sampled.append(sequence)
        if group.search is None and (is_sampled or not group.is_led):
            self._place(sequence, draft)
        elif not is_sampled:
            draft.partial.append(sequence)
        if is_sampled and group.is_led:
            self._branch(sequence, draft)

    def _place(self, sequence: Sequence, draft: Draft) -> None:
        """What it does in the next step."""
        if sequence.num_computed == sequence.max_computed:
            draft.last.append(sequence)
        elif sequence.gap == 1:
            draft.entering.append(sequence)
        else:
            draft.partial.append(sequence)

    def _branch(self, parent: Sequence, draft: Draft) -> None:
        """The prompt has been computed: the siblings begin, and share all its blocks."""
        state = self._state
        parent.is_tail_shared = parent.num_computed < parent.capacity
        for child in parent.group.sequences:
            if child is parent:
                continue
            child.take_numbers(parent)
            child.block_names, child.num_named = parent.block_names.copy(), parent.num_named
            child.is_tail_shared = parent.is_tail_shared
            state.tables.fork(parent, child)
            state.running.start(child)
            draft.branched.append(Fork(parent.row, child.row, child.request.sample_seed(child.index)))
            draft.branches.append(child)
            state.note(child.request, events_of.Branched(parent.index, child.index))
            self._place(child, draft)
        state.running.promise(parent.group)

    def _join_siblings(self, draft: Draft) -> None:
        """Whoever begins with tokens that a sibling has computed again goes on from there."""
        state = self._state
        for group in list(state.running.joining):
            for sequence in group.sequences:
                join = sequence.join
                if join is None or draft.spare <= 0 or join.source.status is not Status.RUNNING:
                    continue
                if join.source.num_computed < join.num_shared * state.config.block_size:
                    continue
                state.tables.share(sequence, join.source, join.num_shared)
                state.tables.take(sequence, join.block_ids)
                sequence.join = None
                self.admit(sequence, draft)
            state.running.promise(group)
            if not group.has_joining:
                state.running.joining.remove(group)
