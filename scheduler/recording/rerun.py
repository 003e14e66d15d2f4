"""What a changed policy would have made of a recorded run: the same requests, the same tokens, other decisions.

The workers are the recording: the token after a history of tokens is the one that came after it then, whatever else
runs beside it. Requests arrive after as many steps as then, those that were cancelled are cancelled with as much output
as then, and steps take no time: the sums compare work, not seconds.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from quire.scheduler.engine import Engine
from quire.scheduler.params import InvalidRequest, QueueFull, SamplingParams
from quire.scheduler.plan import Admission, Logprobs, StepEvents, StepPlan, StepResult
from quire.scheduler.recording.replay import Difference, Replay, Watcher, changed, replay
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.stats import Counters

_UNLIKELY = -1e9
_IDLE = 2
"""Steps without a plan after which nothing moves by itself: one that preempts somebody may be left with nobody."""


class Comparison(NamedTuple):
    recorded: Replay
    """With a difference of its own where the scheduler has changed since; there is nothing else then."""
    difference: Difference | None = None
    """The first decision that the change makes otherwise; None: it makes none."""
    then: Counters | None = None
    now: Counters | None = None
    num_refused: int = 0
    """Requests that would not have been taken: too many wait, or too few blocks for their beams."""

    def lines(self) -> list[str]:
        """The sums that differ, side by side."""
        if self.then is None or self.now is None:
            return []
        names = [item.name for item in dataclasses.fields(Counters)]
        rows = [(name, getattr(self.then, name), getattr(self.now, name)) for name in names]
        lines = [f"{'':24}{'then':>14}{'now':>14}"]
        lines += [f"{name:24}{then:>14}{now:>14}" for name, then, now in rows if then != now]
        if self.num_refused:
            lines.append(f"{'requests refused':24}{'':14}{self.num_refused:>14}")
        return lines if len(lines) > 1 else ["all sums are the same"]


def compare(path: str | Path, changes: Mapping[str, str]) -> Comparison:
    """Follow the recording as it is, then with the changes. Raises RecordingError, and ValueError as `replay`."""
    past = _Past()
    recorded = replay(path, watcher=Watcher(past.note_call, past.note_result))
    if recorded.difference is not None:
        return Comparison(recorded)
    otherwise = replay(path, changes)
    then = recorded.scheduler.counters
    if otherwise.difference is None:
        return Comparison(recorded, None, then, then)
    config = changed(recorded.scheduler.config, changes)
    if "max_num_waiting" not in changes:
        # Whoever was taken then is taken now: sums over other requests would say nothing.
        config = dataclasses.replace(config, max_num_waiting=1 << 30)
    run = _Rerun(past, Scheduler(config), recorded.num_ahead)
    run.run()
    return Comparison(recorded, otherwise.difference, then, run.scheduler.counters, run.num_refused)


@dataclass(slots=True)
class _Row:
    """A row of a worker, as far as tokens go."""

    voice: int
    """Stands for what decides, beside the history, about the next token: parameters, and where it samples the seed."""
    history: int
    """Hash of all its tokens."""
    history_before: int
    """Without the last."""
    gap: int
    """Known tokens that are not computed."""
    num_candidates: int | None

    @classmethod
    def of(cls, admission: Admission) -> _Row:
        history = before = hash(admission.token_ids[: admission.num_prompt_tokens])
        for token in admission.token_ids[admission.num_prompt_tokens :]:
            before, history = history, hash((history, token))
        gap = len(admission.token_ids) - admission.num_computed
        return cls(_voice(admission.params, admission.seed), history, before, gap, admission.logprobs)

    def take(self, token: int) -> None:
        self.history_before, self.history = self.history, hash((self.history, token))
        self.gap += 1

    def correct(self, token: int) -> None:
        self.history = hash((self.history_before, token))


class _Rows:
    """What a worker knows after a plan."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}
        self._params: dict[int, SamplingParams] = {}

    def advance(self, plan: StepPlan) -> list[_Row]:
        """Those that sample, in the order of the result."""
        rows = self._rows
        for row in plan.retired:
            del rows[row]
        for fork in plan.forked:
            rows[fork.child] = dataclasses.replace(rows[fork.parent])
        for row, token in plan.told:
            rows[row].correct(token)
        for admission in plan.admitted:
            rows[admission.row] = _Row.of(admission)
            self._params[admission.row] = admission.params
        sampled = []
        for row, count in zip(plan.rows, plan.num_tokens or (1,) * len(plan.rows), strict=True):
            rows[row].gap -= count
            if not rows[row].gap:
                sampled.append(rows[row])
        for fork in plan.branched:
            params = self._params[fork.child] = self._params[fork.parent]
            rows[fork.child] = dataclasses.replace(rows[fork.parent], voice=_voice(params, fork.seed))
            sampled.append(rows[fork.child])
        return sampled


def _voice(params: SamplingParams, seed: int) -> int:
    return hash((repr(params), 0 if params.beam_width is not None else seed))


class _Call(NamedTuple):
    step: int
    name: str
    arguments: tuple[Any, ...]


@dataclass(slots=True)
class _Past:
    """What the recording knows of tokens and arrivals. Requests have a name of their own here: an id may be used again
    when its request has ended, and with another policy that may be later."""

    calls: deque[_Call] = field(default_factory=deque)
    next_tokens: dict[tuple[int, int], tuple[int, Logprobs | None]] = field(default_factory=dict)
    """By voice and history."""
    lengths: dict[tuple[str, int], int] = field(default_factory=dict)
    """Output of the sequences that have not ended by themselves."""
    ended: set[tuple[str, int]] = field(default_factory=set)
    """The sequences that have."""
    requests: dict[str, Request] = field(default_factory=dict)
    rows: _Rows = field(default_factory=_Rows)
    _names: dict[str, str] = field(default_factory=dict)
    """Of the latest request with an id."""
    _num_requests: int = 0

    def note_call(self, name: str, arguments: tuple[Any, ...], step: int) -> None:
        if name == "add":
            request: Request = arguments[0]
            self._num_requests += 1
            own = self._names[request.request_id] = f"{request.request_id} ({self._num_requests})"
            self.requests[own] = dataclasses.replace(request, request_id=own)
            arguments = (self.requests[own],)
        elif name == "cancel":
            own = self._names.get(arguments[0], arguments[0])
            arguments = (own, *arguments[1:])
        self.calls.append(_Call(step, name, arguments))

    def note_result(self, plan: StepPlan, result: StepResult, events: StepEvents) -> None:
        for position, (row, token) in enumerate(zip(self.rows.advance(plan), result.token_ids, strict=True)):
            self.next_tokens[row.voice, row.history] = token, result.logprobs.get(position)
            row.take(token)
        for position, sequence in enumerate(events.sequences):
            key = self._names[sequence.request.request_id], sequence.index
            self.lengths[key] = self.lengths.get(key, 0) + 1
            if position in events.ends:
                del self.lengths[key]
                self.ended.add(key)


class _Rerun:
    """An engine whose executor is this."""

    def __init__(self, past: _Past, scheduler: Scheduler, run_ahead: int) -> None:
        self.scheduler = scheduler
        self.num_refused = 0
        self._past = past
        self._engine = Engine(scheduler, self, run_ahead)
        self._plans: deque[StepPlan] = deque()
        self._rows = _Rows()
        self._step = 0
        self._lost: set[int] = set()
        """Voices of rows that went on where the recording does not."""

    def run(self) -> None:
        calls, num_idle = self._past.calls, 0
        while calls or num_idle < _IDLE:  # at the end of a recording that was cut, some may be left who can do nothing
            while calls and (calls[0].step <= self._step or num_idle >= _IDLE):
                self._make(calls.popleft())
                num_idle = 0
            before = self._step
            self._end_as_then(self._engine.step())
            num_idle = num_idle + 1 if self._step == before and not self._plans else 0

    def _make(self, call: _Call) -> None:
        if call.name == "cancel":
            self._cancel(*call.arguments)
            return
        try:
            getattr(self.scheduler, call.name)(*call.arguments)
        except (QueueFull, InvalidRequest):
            self.num_refused += 1

    def _cancel(self, name: str, index: int | None) -> None:
        """Those that had no output then. The others end with as much as they had, or by themselves."""
        request = self._past.requests.get(name)
        if request is None or request.params.is_ranked:
            self.scheduler.cancel(name)
            return
        for sample in range(request.params.num_sequences) if index is None else [index]:
            if (name, sample) not in self._past.lengths and (name, sample) not in self._past.ended:
                self.scheduler.cancel(name, sample)

    def _end_as_then(self, events: StepEvents) -> None:
        """Cancel who was cancelled with so much output, and who goes on where the recording has ended."""
        for sequence in events.sequences:
            key = sequence.request.request_id, sequence.index
            output = len(sequence.token_ids) - sequence.num_prompt_tokens
            if output >= self._past.lengths.get(key, output + 1):
                self.scheduler.cancel(*key)
        if self._lost:
            ranked = [s for s in self.scheduler.running if s.request.params.is_ranked]
            for sequence in ranked:
                request = sequence.request
                if _voice(request.params, request.sample_seed(sequence.index)) in self._lost:
                    self.scheduler.cancel(request.request_id)
            self._lost.clear()

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)
        self._step = plan.step

    def collect(self) -> StepResult:
        plan = self._plans.popleft()
        tokens: list[int] = []
        logprobs: dict[int, Logprobs] = {}
        for row in self._rows.advance(plan):
            token, entry = self._next(row)
            if entry is not None:
                logprobs[len(tokens)] = entry
            tokens.append(token)
            row.take(token)
        return StepResult(plan.step, tuple(tokens), logprobs)

    def _next(self, row: _Row) -> tuple[int, Logprobs | None]:
        found = self._past.next_tokens.get((row.voice, row.history))
        if found is not None:
            return found
        # Planned ahead of its end, or beyond that of the recording: nobody will see this token.
        self._lost.add(row.voice)
        if row.num_candidates is None:
            return 0, None
        count = row.num_candidates + 1
        return 0, Logprobs((0, *range(count - 1)), (_UNLIKELY,) * count, 1)
