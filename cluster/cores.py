"""How processes share the cores on which a CPU worker computes."""

from __future__ import annotations

import contextlib
import os
import sys


def give_way() -> None:
    """From here on no thread of this process, nor one that it starts, interrupts a thread that is running when it
    wakes up; it waits for an idle core or for its turn, which comes within milliseconds.

    Whoever delivers tokens would else interrupt the computation once for each of them, and the processes on the way to
    the client one another: several times the cost of the delivery. Linux only, elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended, or the container does not allow it
            os.sched_setscheduler(int(thread), os.SCHED_BATCH, os.sched_param(0))
