"""Python's own doings that hold a step up, moved to where they hold up nothing.

The collector stops every thread while it looks at what has been made since it last ran, and now and then at all there
is: tens of milliseconds in a process that has imported Ray. And a thread that computes keeps the others waiting for
the interpreter for five milliseconds, which is half a step.
"""

from __future__ import annotations

import gc
import sys
import time

IDLE_S = 0.05
"""Without work for so long, there is time for a full collection."""

COLLECT_S = 10.0
"""Under load without a pause, what was made since the last time is looked at this often."""

SWITCH_S = 0.001
"""How long a thread may keep the interpreter while another wants it."""


class QuietCollector:
    """Takes the collector over for the process. All calls from one thread."""

    def __init__(self) -> None:
        self._collected = time.monotonic()
        self._switch_s = sys.getswitchinterval()

    def begin(self) -> None:
        """What there is now will stay: it is never looked at again."""
        gc.collect()
        gc.freeze()
        gc.disable()
        sys.setswitchinterval(SWITCH_S)
        self._collected = time.monotonic()

    def after_step(self) -> None:
        """Bounds what gathers under load; survivors are left to the next idle moment."""
        if time.monotonic() > self._collected + COLLECT_S:
            gc.collect(1)
            self._collected = time.monotonic()

    def idle(self) -> None:
        gc.collect()
        self._collected = time.monotonic()

    def end(self) -> None:
        """As it was before begin()."""
        sys.setswitchinterval(self._switch_s)
        gc.enable()
        gc.unfreeze()
