"""Where the time of a start goes: the consecutive stages of one process, by a clock that all processes of a machine
share. Standard library only."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path


class Laps:
    """Seconds by stage, in the order in which the stages first ended. Their sum is the time since `started`."""

    def __init__(self, started: float | None = None) -> None:
        """`started`: a value of time.monotonic(); None: now."""
        self._last = time.monotonic() if started is None else started
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Whatever has passed since the last lap belongs to `stage`."""
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def split(self, stage: str, part: str, seconds: float) -> None:
        """Up to so many of a stage's seconds are a part with a name of its own, which comes after it."""
        whole = self.seconds[stage]
        cut = min(max(seconds, 0.0), whole)
        self.seconds = {
            name: value
            for key, spent in self.seconds.items()
            for name, value in ([(stage, whole - cut), (part, cut)] if key == stage else [(key, spent)])
        }


@functools.cache
def process_started(stat: Path = Path("/proc/self/stat")) -> float:
    """When this process was started, as a value of time.monotonic(); now, where nothing tells. A process that forks
    after the first call gives its answer to its children."""
    now = time.monotonic()
    try:
        # The 22nd field; the second, the command's name, is in parentheses and may hold spaces.
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return now
    return now - max(age, 0.0) if ticks > 0 else now


def describe(seconds: dict[str, float]) -> str:
    """Such as "command 0.42, Ray 2.41, torch 0.97"; what took no time is left out."""
    return ", ".join(f"{stage} {spent:.2f}" for stage, spent in seconds.items() if spent >= 0.005)
