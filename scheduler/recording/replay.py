"""Follow a recording: the same calls into a scheduler made now, and whether it decides as was decided then.

With the configuration of the recording a difference means that the scheduler has changed, or is no function of its
inputs. With another configuration it shows the first decision that the change makes, and what came of it in the end
(rerun.py). Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.explaining.explain import Lives
from quire.scheduler.plan import StepEvents, StepPlan, StepResult
from quire.scheduler.recording.file import Kind, PlanWriter, Record, RecordingError, dump, load, read, unpack_result
from quire.scheduler.recording.record import error_text, outcome_of
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler

MAX_SHOWN = 8
"""Entries of a list that are shown on each side of a difference."""


class Difference(NamedTuple):
    """The first decision that came out otherwise."""

    step: int
    at_s: float
    """Seconds since the recording began."""
    what: str
    then: str
    now: str

    def lines(self) -> list[str]:
        return [
            f"first difference in step {self.step}, {self.at_s:.3f} s into the recording: {self.what}",
            f"  then: {self.then}",
            f"  now:  {self.now}",
        ]


@dataclass(slots=True)
class Watcher:
    """Told of what passes, where somebody wants to learn from it."""

    on_call: Callable[[str, tuple[Any, ...], int], None] | None = None
    """A method that did something, its arguments, and the step after which it was called."""
    on_result: Callable[[StepPlan, StepResult, StepEvents], None] | None = None


@dataclass(slots=True)
class Replay:
    """What came of following a recording."""

    scheduler: Scheduler
    """As it stands after the last record, or at the difference."""
    difference: Difference | None = None
    version: str = ""
    """Of the Quire that made the recording."""
    num_records: int = 0
    num_plans: int = 0
    num_ahead: int = 0
    """Most plans that were under way beyond the one that was awaited."""
    duration_s: float = 0.0
    lives: Lives | None = None


def replay(
    path: str | Path, changes: Mapping[str, str] | None = None, watcher: Watcher | None = None, explain: bool = False
) -> Replay:
    """Follow the recording to its end or to the first difference. `changes`: fields of SchedulerConfig, as text.

    `explain`: keep the lives of all requests, on the recording's clock. Raises RecordingError; ValueError for a
    change that makes no configuration."""
    records = read(path)
    start = next(records, None)
    if start is None or start.kind is not Kind.START:
        raise RecordingError(f"{path} ends before its first record: nothing was recorded")
    head = load(start.body)
    follower = _Follower(changed(head["config"], changes or {}), watcher or Watcher(), explain)
    follower.replay.version = head["quire"]
    for record in records:
        follower.replay.num_records += 1
        follower.replay.duration_s = record.at_s
        if difference := follower.follow(record):
            follower.replay.difference = difference
            break
    return follower.replay


def changed(config: SchedulerConfig, changes: Mapping[str, str]) -> SchedulerConfig:
    """With some fields given as text. Raises ValueError with a sentence for the user."""
    known = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    values: dict[str, Any] = {}
    for name, text in changes.items():
        if name not in known:
            raise ValueError(f"there is no setting {name!r}: give one of {', '.join(known)}")
        values[name] = _parsed(name, text, type(known[name]))
    return dataclasses.replace(config, **values)


def _parsed(name: str, text: str, kind: type) -> object:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} is true or false, not {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} takes a number, not {text!r}") from None


class _Follower:
    def __init__(self, config: SchedulerConfig, watcher: Watcher, explain: bool) -> None:
        lives = Lives(num_ended=1 << 30, clock=lambda: self._at_s) if explain else None
        self._scheduler = Scheduler(config, journal=lives)
        self.replay = Replay(self._scheduler, lives=lives)
        self._watcher = watcher
        self._plans_then, self._plans_now = _PlanReader(), PlanWriter()
        self._under_way: deque[StepPlan] = deque()
        self._step = 0
        self._at_s = 0.0
        self._outcome: dict[str, object] = {}
        """Of the last apply(), until the recording's own has been compared with it."""
        self._failure = ""
        """Of the last apply()."""

    def follow(self, record: Record) -> Difference | None:
        self._at_s = record.at_s
        if self._failure and record.kind is not Kind.FAILURE:
            return self._differs("taking the step's result", "it was taken", self._failure)
        if self._outcome and record.kind is not Kind.OUTCOME:
            return self._differs("what the step's result ended", "nothing", self._outcome)
        match record.kind:
            case Kind.PLAN | Kind.NO_PLAN:
                return self._schedule(record.body)
            case Kind.RESULT:
                return self._apply(unpack_result(record.body))
            case Kind.OUTCOME:
                return self._compare_outcome(record.body)
            case Kind.FAILURE:
                return self._fail(load(record.body))
            case Kind.CALL:
                return self._call(load(record.body))
        raise RecordingError(f"the recording has a second {record.kind.name}: it is damaged")

    def _fail(self, then: str) -> Difference | None:
        """Then, the scheduler failed here."""
        if not self._failure:
            try:
                self._scheduler.schedule()
            except Exception as error:  # whatever it was then
                self._failure = error_text(error)
        if self._failure == then:
            return None
        return self._differs("a failure of the scheduler", then, self._failure or "none")

    def _schedule(self, body: bytes) -> Difference | None:
        try:
            plan = self._scheduler.schedule()
        except Exception as error:  # whatever a scheduler that was changed may raise
            return self._differs("planning a step", "it was planned", error_text(error))
        if plan is None or not body:
            if plan is None and not body:
                return None
            then = f"step {self._step + 1}" if body else "no step"
            now = "no step" if plan is None else f"step {plan.step} with {plan.total_tokens} tokens"
            return self._differs("whether a step was planned", then, now)
        self._step = plan.step
        self.replay.num_plans += 1
        self._under_way.append(plan)
        self.replay.num_ahead = max(self.replay.num_ahead, len(self._under_way) - 1)
        now_body = self._plans_now.dump(plan)
        then_plan = self._plans_then.next(body)
        if now_body == body:
            return None
        now_plan = _PlanReader(then_plan.before).next(now_body)
        for name, now_value in now_plan.values.items():
            if then_plan.values.get(name, []) != now_value:
                return self._differs(f"the plan's {name!r}", then_plan.values.get(name, []), now_value)
        missing = sorted(then_plan.values.keys() - now_plan.values.keys())
        return self._differs(f"the plan's {missing[0]!r}", then_plan.values[missing[0]], [])

    def _apply(self, result: StepResult) -> Difference | None:
        if not self._under_way:
            return self._differs("a result", f"of step {result.step}", "none is awaited")
        plan = self._under_way.popleft()
        try:
            events = self._scheduler.apply(result)
        except Exception as error:  # the recording's next record says whether it did then
            self._failure = error_text(error)
            return None
        self._outcome = outcome_of(events)
        if self._watcher.on_result:
            self._watcher.on_result(plan, result, events)
        return None

    def _compare_outcome(self, body: bytes) -> Difference | None:
        outcome, self._outcome = self._outcome, {}
        if dump(outcome) == body:
            return None
        return self._differs("what the step's result ended", json.loads(body), outcome or "nothing")

    def _call(self, call: dict[str, Any]) -> Difference | None:
        name, arguments = call["call"], call["arguments"]
        try:
            outcome: object = getattr(self._scheduler, name)(*arguments)
            if self._watcher.on_call and outcome is not False:
                self._watcher.on_call(name, arguments, self._step)
        except Exception as error:  # as the recorder, which noted whatever the call ended with
            outcome = {"error": error_text(error)}
        now = load(dump(outcome))
        if now == call["outcome"]:
            return None
        return self._differs(f"what {name}({_of_whom(arguments)}) returned", call["outcome"], now)

    def _differs(self, what: str, then: object, now: object) -> Difference:
        return Difference(self._step, self._at_s, what, *_shown(then, now))


class _PlanReader:
    """Recorded plans: what each says, where it differs from the one before."""

    def __init__(self, before: Mapping[str, Any] | None = None) -> None:
        self.before: dict[str, Any] = dict(before or {})
        self.values: dict[str, Any] = dict(self.before)

    def next(self, body: bytes) -> _PlanReader:
        self.before = self.values
        self.values = {**self.before, **json.loads(body)}
        return self


# -- in words


def _of_whom(arguments: tuple[Any, ...]) -> str:
    first = arguments[0] if arguments else ""
    return first.request_id if isinstance(first, Request) else str(first)


def _shown(then: object, now: object) -> tuple[str, str]:
    """Of lists the part in which they differ."""
    then, now = json.loads(dump(then)), json.loads(dump(now))
    if not isinstance(then, list) or not isinstance(now, list):
        return _short(then), _short(now)
    start = 0
    while start < min(len(then), len(now)) and then[start] == now[start]:
        start += 1
    return _part(then, start), _part(now, start)


def _part(values: list[Any], start: int) -> str:
    if start == len(values):
        return f"ends after {start} entries" if start else "nothing"
    shown = ", ".join(_short(value) for value in values[start : start + MAX_SHOWN])
    more = len(values) - start - MAX_SHOWN
    place = f"from entry {start}: " if start else ""
    return f"{place}{shown}" + (f", and {more} more" if more > 0 else "")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}…"
