"""Sequences leave: preempted, split off from a group that is too large, dropped by a search, or at their end.

Row and blocks may be given to others at once, with steps in flight: workers run steps in order, so reuse comes after
use.
"""

from __future__ import annotations

from quire.scheduler.blocks import AuditError
from quire.scheduler.explaining import journal as events_of
from quire.scheduler.groups import Group
from quire.scheduler.plan import Admission
from quire.scheduler.preemption import Costs, prefers_swap
from quire.scheduler.request import Request
from quire.scheduler.sequence import Sequence, Status
from quire.scheduler.state import State


class Leaving:
    def __init__(self, state: State) -> None:
        self._state = state

    def preempt(self, group: Group, by: str, may_swap: bool = True) -> None:
        """Take rows and blocks from all its sequences; it comes back when there is room (section 4.5)."""
        state, tables = self._state, self._state.tables
        holders = [sequence for sequence in group.sequences if sequence.block_ids]
        num_blocks, num_tokens = tables.distinct(holders)
        costs = Costs.of(state.config, num_blocks, num_tokens)
        swaps = may_swap and 0 < num_blocks <= tables.swap.num_free and not group.has_joining
        swaps = swaps and prefers_swap(state.config.preemption_mode, costs)
        self._note_preempted(group.request, by, "swap" if swaps else "recompute", num_blocks, num_tokens, costs)
        for sequence in group.sequences:
            self._stop(sequence)
        if swaps:
            state.changes.swapped_out += tables.swap_out(holders)
            group.is_swapped = True
            state.counters.num_swap_preemptions += 1
        else:
            state.counters.recomputed_tokens += num_tokens
            for sequence in group.sequences:
                tables.free(sequence)
                sequence.forget_computed()
        state.counters.num_preemptions += 1
        group.num_preemptions += 1
        group.has_progressed = False
        group.forget_shares()
        state.running.leave(group)
        state.waiting.push(group)

    def split(self, group: Group) -> None:
        """The group is too large for the pool: its last sample goes on by itself, when there is room."""
        if len(group.sequences) == 1 or group.search is not None:
            raise AuditError(f"{group} is alone and finds no room")
        state, sequence = self._state, group.sequences[-1]
        if group.is_running:
            num_blocks, num_tokens = len(sequence.block_ids), sequence.num_computed
            costs = Costs.of(state.config, num_blocks, num_tokens)
            request = group.request
            self._note_preempted(request, request.request_id, "recompute", num_blocks, num_tokens, costs)
            self._stop(sequence)
            state.counters.recomputed_tokens += num_tokens
            state.counters.num_preemptions += 1
        else:
            state.waiting.num_sequences -= 1
        state.tables.free(sequence)
        sequence.forget_computed()
        group.sequences.pop()
        alone = Group(group.request, sequence.arrival)
        alone.sequences, alone.num_preemptions, alone.has_progressed = [sequence], group.num_preemptions + 1, False
        sequence.group = alone
        state.running.promise(group)
        state.waiting.push(alone)

    def drop(self, beam: Sequence) -> None:
        """Nobody descends from it."""
        self._stop(beam)
        self._state.tables.free(beam)
        beam.status = Status.FINISHED

    def end(self, sequence: Sequence, is_complete: bool = False) -> None:
        """By itself, or because it was cancelled."""
        state, request, group = self._state, sequence.request, sequence.group
        heir = self._heir(sequence)
        if heir is not None:
            self._hand_over(sequence, heir)
        is_missed = any(s.join is not None and s.join.source is sequence for s in group.sequences)
        self._stop(sequence)
        if is_complete and group.is_reserved:
            state.prefixes.keep(sequence)
        else:
            state.tables.free(sequence)
        sequence.status = Status.FINISHED
        self._leave_group(sequence)
        if is_missed:  # siblings cannot go on from what they waited for
            self.preempt(group, request.request_id, may_swap=False)
        state.requests.remove(sequence, is_complete)
        if request.request_id not in state.requests:
            state.note(request, events_of.Ended())

    def _leave_group(self, sequence: Sequence) -> None:
        state, group = self._state, sequence.group
        if group.is_running:
            group.sequences.remove(sequence)
            if group.sequences:
                state.running.settle(group)
            else:
                state.running.leave(group)
            return
        state.waiting.remove(group)
        group.sequences.remove(sequence)
        if group.sequences:
            state.waiting.push(group)

    def _heir(self, sequence: Sequence) -> Sequence | None:
        """Who goes on with the prompt that this one computes for all its siblings."""
        if sequence.status is not Status.RUNNING or not sequence.group.is_led:
            return None
        return next(s for s in sequence.group.sequences if s.status is Status.PENDING)

    def _hand_over(self, sequence: Sequence, heir: Sequence) -> None:
        """The heir gets everything but the row, which samples by another seed: it is admitted anew."""
        running = self._state.running
        heir.take_numbers(sequence)
        heir.block_ids, heir.capacity, heir.num_named = sequence.block_ids, sequence.capacity, sequence.num_named
        sequence.block_ids = []
        running.start(heir)
        self._state.changes.admitted[heir.row] = Admission.of(heir)
        running.prefilling[running.prefilling.index(sequence)] = heir

    def _stop(self, sequence: Sequence) -> None:
        """It computes nothing more for now; its row is free, and its blocks have names. It is left waiting."""
        if sequence.status is Status.RUNNING:
            self._state.changes.give_up(self._state.running.stop(sequence))
            self._state.cache.remember(sequence)
        if sequence.join is not None:
            for block in sequence.join.block_ids:
                self._state.pool.release(block)
            sequence.join = None
        sequence.is_tail_shared = False
        sequence.status = Status.WAITING

    def _note_preempted(
        self, request: Request, by: str, mode: str, num_blocks: int, num_tokens: int, costs: Costs
    ) -> None:
        event = events_of.Preempted(by, mode, num_blocks, num_tokens, costs.swap_s, costs.recompute_s)
        self._state.note(request, event)
