"""The engine's thread: the only one to touch the scheduler. Calls go in between steps, events come out of each."""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from quire.cluster.executor import WorkerLost
from quire.cluster.pace import Pace
from quire.cluster.quiet import IDLE_S, QuietCollector
from quire.scheduler.engine import Engine, Executor
from quire.scheduler.plan import StepEvents, StepPlan
from quire.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RemoteExecutor(Executor, Protocol):
    """An executor whose workers can be lost between steps."""

    @property
    def starved_s(self) -> float:
        """Seconds for which the workers had waited for the plan that was collected last."""

    def start(self) -> None:
        """Open the streams."""

    def check(self) -> None:
        """Raises WorkerLost if a worker was lost while nothing was awaited."""

    def close(self) -> None: ...


class EngineThread:
    """Runs the engine; everything that touches the scheduler runs here."""

    def __init__(
        self,
        engine: Engine,
        executor: RemoteExecutor,
        on_events: Callable[[StepEvents], None],
        on_failure: Callable[[Exception], None],
        pace: Pace | None = None,
    ) -> None:
        self._engine = engine
        self._executor = executor
        self._on_events = on_events
        self._on_failure = on_failure
        self._pace = pace or Pace()
        self._untold = StepEvents()
        """What a step has brought, until the workers have something to do again."""
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, function: Callable[[Scheduler], T]) -> asyncio.Future[T]:
        """Run `function` between two steps. The future belongs to the calling loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                settle = functools.partial(_resolve, future, function(self._engine.scheduler))
            except Exception as error:  # belongs to the caller, not to this thread
                settle = functools.partial(_reject, future, error)
            loop.call_soon_threadsafe(settle)

        self._calls.put(run)
        return future

    def wake(self) -> None:
        """Have an idle loop look after its executor."""
        self._calls.put(lambda: None)

    def stop(self) -> None:
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        quiet = QuietCollector()
        quiet.begin()
        try:
            self._executor.start()
            while self._take_calls(quiet):
                self._executor.check()
                self._step()
                quiet.after_step()
        except Exception as error:  # the thread's edge: whoever holds a stream is told
            self._tell()
            if not isinstance(error, WorkerLost):
                logger.exception("the engine failed")
            self._on_failure(error)
            self._serve_calls()
        finally:
            quiet.end()

    def _step(self) -> None:
        """Send a plan; where none is to be sent, take a result."""
        engine, is_pause = self._engine, not self._engine.in_flight
        has_planned = engine.plan()
        if has_planned and is_pause:
            self._pace.begin()
        self._tell()
        if has_planned and len(engine.in_flight) <= engine.run_ahead:
            return
        if engine.in_flight:
            num_tokens = engine.in_flight[0].total_tokens
            self._untold = engine.take()
            self._pace.end(num_tokens, self._executor.starved_s)
            if engine.in_flight:
                self._tell()

    def _tell(self) -> None:
        events, self._untold = self._untold, StepEvents()
        if events:
            self._on_events(events)

    def _take_calls(self, quiet: QuietCollector) -> bool:
        """Run what has been asked for, and wait for more when there is nothing else to do. False: stop."""
        if not self._engine.scheduler.has_work:
            self._tell()
            try:
                call = self._calls.get(timeout=IDLE_S)
            except queue.Empty:
                quiet.idle()  # once; then there is nothing left to collect
                call = self._calls.get()
            if call is None:
                return False
            call()
        running = self._running_step()
        while True:
            spare_s = self._pace.spare_s(running.total_tokens) if running is not None else 0.0
            try:
                call = self._calls.get(timeout=spare_s)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()

    def _running_step(self) -> StepPlan | None:
        """The step during which the last plan that may run ahead can wait for who may come. None: it cannot, or others
        are to be let in before them."""
        engine = self._engine
        if not engine.in_flight or len(engine.in_flight) < engine.run_ahead or engine.scheduler.waiting:
            return None
        return engine.in_flight[0]

    def _serve_calls(self) -> None:
        """After a failure: steps are over, cancellations and questions still get their answers."""
        while (call := self._calls.get()) is not None:
            call()


def _resolve(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _reject(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
