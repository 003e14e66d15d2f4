"""Beam search in the scheduler: results become candidates, decisions become forks, and answers come at the end.

A search goes on when all its beams have reported. The next plan then tells the workers: a parent's first child keeps
its row and its blocks, further children are copies of it, and what nobody descends from is free.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from quire.scheduler.beam import Move, answers_of
from quire.scheduler.blocks import AuditError
from quire.scheduler.draft import Flight
from quire.scheduler.explaining import journal as events_of
from quire.scheduler.groups import Group
from quire.scheduler.leaving import Leaving
from quire.scheduler.plan import Answer, Fork, Logprobs, StepResult
from quire.scheduler.running import by_arrival
from quire.scheduler.sequence import Sequence, Status
from quire.scheduler.state import State


class _Line(NamedTuple):
    """How a beam goes on."""

    beam: Sequence
    source: Sequence | None
    """What it is a copy of; None: it is the parent itself."""
    token: int


class Searching:
    def __init__(self, state: State, leaving: Leaving) -> None:
        self._state = state
        self._leaving = leaving

    def take(self, flight: Flight, result: StepResult) -> list[Answer]:
        """Note what may follow each beam; where all beams of a search have reported, it goes on."""
        complete: list[Group] = []
        for position in sorted(flight.searching):
            sequence = flight.sampled[position]
            group = sequence.group
            if sequence.status is Status.FINISHED:
                self._state.counters.discarded_tokens += 1
                self._state.note(sequence.request, events_of.Discarded(sequence.index, 1))
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
        if moves is not None:
            self._follow(group, moves)
            return ()
        answers = answers_of(group.request, search)
        for answer in answers:
            event = events_of.Finished(answer.index, answer.finish_reason, len(answer.token_ids))
            self._state.note(group.request, event)
        for sequence in list(group.sequences):
            self._leaving.end(sequence, is_complete=True)
        return answers

    def _follow(self, group: Group, moves: list[Move]) -> None:
        lines = self._fork(group, moves)
        stays = {id(line.beam) for line in lines if line.source is None}
        dropped = [sequence for sequence in group.sequences if id(sequence) not in stays]
        for sequence in dropped:
            group.sequences.remove(sequence)
            self._leaving.drop(sequence)
        for line in lines:
            line.beam.token_ids.append(line.token)
            if group.is_running:
                self._tell(group, line)
        group.sequences = [line.beam for line in lines]
        self._state.requests.replace(group.request, list(group.sequences))
        if group.is_running:
            insort(self._state.running.searched, group, key=by_arrival)
            self._state.running.promise(group)

    def _fork(self, group: Group, moves: list[Move]) -> list[_Line]:
        """The beams in their new order, with tables of their own."""
        kept = {group.sequences[move.parent].index for move in moves}
        unused = iter(index for index in range(group.num_rows) if index not in kept)
        lines: list[_Line] = []
        seen: set[int] = set()
        for move in moves:
            parent = group.sequences[move.parent]
            if move.parent not in seen:
                seen.add(move.parent)
                lines.append(_Line(parent, None, move.token))
                continue
            index = next(unused)
            child = parent.branch(index, group.arrival + index)
            self._state.tables.fork(parent, child)
            lines.append(_Line(child, parent, move.token))
        return lines

    def _tell(self, group: Group, line: _Line) -> None:
        """The next plan's part of it."""
        beam, source = line.beam, line.source
        if source is not None:
            self._state.running.start(beam)
            self._state.changes.forked[beam.row] = Fork(source.row, beam.row, 0)
            self._state.note(group.request, events_of.Forked(source.index, beam.index))
        self._state.changes.told[beam.row] = line.token


def _candidates(token: int, logprobs: Logprobs | None) -> list[tuple[int, float]]:
    """What may follow a beam, best first; nothing where the logits were not numbers."""
    if token < 0:
        return []
    if logprobs is None:
        raise AuditError("a beam came back without log-probabilities")
    return list(zip(logprobs.token_ids[1:], logprobs.values[1:], strict=True))
