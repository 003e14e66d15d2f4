"""When to plan: as late as the running step allows, so that whoever comes while it runs is in the next one.

A plan that is sent ahead cannot be changed, and whoever comes after it waits for a step more. So a plan is not made as
soon as it could be, but when the running step is about to end: late enough for nearly all who come meanwhile, early
enough that the workers do not wait for it. Two things are learned from the steps that pass:

How long the running step takes: as long as the quickest of the last ones that computed no more tokens than it does. A
guess that is too long corrects itself, because the steps that it delays set the next.

How much of it must be left: workers say how long they had to wait for a plan. If it was more than nothing, plans are
made much earlier from then on, and later again little by little.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

LEAD = 0.4
"""The part of a step that is left, at least, when the next one is planned. 1: nobody is waited for."""

LEAST_LEAD_S = 0.003
"""But never less than this: a plan must be made, encoded, sent and read."""

TOLERANCE = 0.01
"""The part of a step for which workers may have waited."""

EARLIER, LATER = 1.5, 0.998
"""What becomes of the lead when they have waited longer, and when they have not."""

REMEMBERED = 16
"""Steps."""


class Pace:
    """Measures steps that follow one another. All calls from one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._lead = LEAD
        self._is_first = True
        """No step has ended since the last pause."""
        self._steps: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        """Tokens, and the seconds that they took."""

    def begin(self) -> None:
        """A step begins after a pause."""
        self._began, self._is_first = self._clock(), True

    def end(self, num_tokens: int, starved_s: float) -> None:
        """A step of so many tokens has ended, for whose plan the workers had waited. If there is a next one, it has
        begun."""
        now = self._clock()
        seconds = now - self._began
        self._steps.append((num_tokens, seconds))
        if not self._is_first:  # else they waited because there was nothing to do
            is_late = starved_s > TOLERANCE * seconds
            self._lead = min(1.0, self._lead * EARLIER) if is_late else max(LEAD, self._lead * LATER)
        self._began, self._is_first = now, False

    def spare_s(self, num_tokens: int) -> float:
        """Seconds until the next plan is due, while a step of so many tokens runs; 0: it is due now."""
        quickest = min((seconds for tokens, seconds in self._steps if tokens <= num_tokens), default=0.0)
        due = self._began + quickest - max(self._lead * quickest, LEAST_LEAD_S)
        return max(0.0, due - self._clock())
