"""A scheduler that writes down what goes in and what comes out, so that a run can be followed again (replay.py).

It stands around the scheduler, not in it. A scheduler is a function of its calls alone: the same configuration and the
same calls, with the same results, give the same decisions. The time of each is recorded too, for who reads it later.

What is recorded waits in memory until a thread of its own compresses and writes it, a few times per second; a process
that is killed loses that much.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.explaining.journal import Journal
from quire.scheduler.plan import StepEvents, StepPlan, StepResult
from quire.scheduler.recording.file import CHUNK, MAGIC, RECORD, Kind, PlanWriter, dump, pack_result
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

T = TypeVar("T")

FLUSH_S = 0.25
_MAX_MICROS = (1 << 32) - 1


class Recorder:
    """The file being written. Raises OSError where it cannot be made; when it cannot be written later, it says so in
    the log and recording ends: serving goes on."""

    def __init__(self, path: str | Path, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.path = Path(path)
        self._clock_ns = clock_ns
        self._last_ns = clock_ns()
        self._pending: deque[bytes] = deque()
        self._some = threading.Event()
        self._closing = threading.Event()
        self._has_failed = False
        self._file = open(self.path, "wb")  # noqa: SIM115  (open for as long as the thread lives)
        self._file.write(MAGIC)
        self._file.flush()  # a full disk is to be known now
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def write(self, kind: Kind, body: bytes = b"") -> None:
        """Never waits for the disk."""
        if self._has_failed:
            return
        now = self._clock_ns()
        micros = min((now - self._last_ns) // 1000, _MAX_MICROS)
        self._last_ns += micros * 1000  # the rest counts next time
        self._pending.append(RECORD.pack(kind, micros, len(body)) + body)
        if not self._some.is_set():
            self._some.set()

    def close(self) -> None:
        """Everything is in the file on return. May be called twice."""
        self._closing.set()
        self._some.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._file:
                while not self._closing.is_set():
                    self._some.wait()
                    self._closing.wait(FLUSH_S)  # more may come
                    self._some.clear()
                    self._flush()
                self._flush()
        except OSError as error:
            self._has_failed = True
            self._pending.clear()
            logger.error("recording to %s has ended: %s", self.path, error)

    def _flush(self) -> None:
        records = b"".join([self._pending.popleft() for _ in range(len(self._pending))])
        if not records:
            return
        data = zlib.compress(records, 1)
        self._file.write(CHUNK.pack(len(data), zlib.crc32(data)) + data)
        self._file.flush()


class RecordingScheduler(Scheduler):
    """A scheduler, recorded from its beginning. Its recorder is its owner's to close."""

    def __init__(self, config: SchedulerConfig, recorder: Recorder, *, journal: Journal | None = None) -> None:
        super().__init__(config, journal=journal)
        self._recorder = recorder
        self._plans = PlanWriter()
        recorder.write(Kind.START, dump({"quire": _version(), "config": config}))

    def add(self, request: Request) -> None:
        self._call("add", super().add, request)

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        return self._call("cancel", super().cancel, request_id, index)

    def reserve_prefix(self, name: str, token_ids: Iterable[int], cache_salt: str = "") -> None:
        self._call("reserve_prefix", super().reserve_prefix, name, tuple(token_ids), cache_salt)

    def release_prefix(self, name: str) -> bool:
        return self._call("release_prefix", super().release_prefix, name)

    def schedule(self) -> StepPlan | None:
        plan = self._noting_failure(super().schedule)
        if plan is None:
            self._recorder.write(Kind.NO_PLAN)
        else:
            self._recorder.write(Kind.PLAN, self._plans.dump(plan))
        return plan

    def apply(self, result: StepResult) -> StepEvents:
        self._recorder.write(Kind.RESULT, pack_result(result))
        apply = super().apply
        events = self._noting_failure(lambda: apply(result))
        if outcome := outcome_of(events):
            self._recorder.write(Kind.OUTCOME, dump(outcome))
        return events

    def _noting_failure(self, method: Callable[[], T]) -> T:
        try:
            return method()
        except Exception as error:
            self._recorder.write(Kind.FAILURE, dump(error_text(error)))
            raise

    def _call(self, name: str, method: Callable[..., T], *arguments: Any) -> T:
        outcome: object = "interrupted"
        try:
            value = method(*arguments)
            outcome = value
            return value
        except Exception as error:
            outcome = {"error": error_text(error)}
            raise
        finally:
            self._recorder.write(Kind.CALL, dump({"call": name, "arguments": arguments, "outcome": outcome}))


def error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def outcome_of(events: StepEvents) -> dict[str, object]:
    """What apply() decided: who ended, and how ranked answers came out. Empty where nobody did."""
    outcome: dict[str, object] = {}
    if events.ends:
        outcome["ends"] = [
            [sequence.request.request_id, sequence.index, len(sequence.token_ids), reason]
            for sequence, reason in ((events.sequences[position], reason) for position, reason in events.ends.items())
        ]
    if events.answers:
        outcome["answers"] = [
            [answer.request.request_id, answer.index, answer.token_ids, answer.score, answer.finish_reason]
            for answer in events.answers
        ]
    return outcome


def _version() -> str:
    try:
        return metadata.version("quire")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
