"""The one thread of a worker that touches the model, from loading to the last step.

One thread, because whatever computes on a CPU keeps a pool of threads for each thread that calls it, and because steps
have one order. While steps run, Python's collector does not: everything that starting has made is set aside, and what
steps leave behind is collected in moments without one.
"""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

IDLE_S = 0.05
"""Without work for so long, there is time to collect."""

STOP_S = 5.0

COLLECT_S = 60.0
"""Under load without a pause the collector runs this often."""


class StepThread:
    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._quiet = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, function: Callable[[], None]) -> None:
        """Runs it after everything posted before; it may not raise."""
        self._calls.put(function)

    def call(self, function: Callable[[], T]) -> T:
        """Runs it there, and returns or raises what it does."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.post(run)
        return future.result()

    def be_quiet(self) -> None:
        """From here on the collector runs when this thread lets it; stop() undoes that."""

        def begin() -> None:
            gc.collect()
            gc.freeze()
            gc.disable()
            self._quiet = True

        self.call(begin)

    def stop(self, last: Callable[[], None] = lambda: None) -> None:
        """Returns when what was posted has run and `last` after it, or hangs: then whoever stops need not."""
        self._calls.put(last)
        self._calls.put(None)
        self._thread.join(STOP_S)

    def _run(self) -> None:
        collected, is_clean = time.monotonic(), True
        while True:
            try:
                call = self._calls.get(timeout=None if is_clean else IDLE_S)
            except queue.Empty:
                call = self._nothing
            if call is None:
                break
            call()
            is_clean = not self._quiet or call == self._nothing
            if self._quiet and (is_clean or time.monotonic() > collected + COLLECT_S):
                gc.collect()
                collected = time.monotonic()
        if self._quiet:
            gc.enable()
            gc.unfreeze()

    def _nothing(self) -> None:
        """What there is to do in an idle moment."""
