"""How likely a language model's next tokens are, for beam search without a model.

What beams share depends on how long ago their ancestries met, and that on how unequal the candidates are. Each call
draws one distribution: the likeliest token's probability from a Beta distribution, heaped near 1 as it is on a model's
own text, the rest of the mass in geometric steps over the other candidates. Draws are independent of each other and
of the past. Ids are numbers from 1.
"""

from __future__ import annotations

import math
import random

from quire.scheduler.plan import Logprobs


class Likelihoods:
    """Candidates' log-probabilities, a function of the seed and of the number of calls."""

    def __init__(
        self, seed: int = 0, alpha: float = 2.5, beta: float = 0.5, ratio: float = 0.5, draws: int = 8191
    ) -> None:
        self._rng = random.Random(seed)
        self._alpha = alpha
        self._beta = beta
        self._ratio = ratio
        self._num_draws = draws
        """Distributions that are made for each number of candidates; after so many calls they come again, in another
        company."""
        self._tables: dict[int, list[Logprobs]] = {}
        self._calls = 0

    def draw(self, candidates: int) -> Logprobs:
        """Of a row whose likeliest token is sampled: that token, then so many of the likeliest."""
        table = self._tables.get(candidates)
        if table is None:
            table = self._tables[candidates] = [self._make(candidates) for _ in range(self._num_draws)]
        self._calls += 1
        return table[self._calls % self._num_draws]

    def _make(self, candidates: int) -> Logprobs:
        first = min(max(self._rng.betavariate(self._alpha, self._beta), 0.02), 1 - 1e-9)
        values = [first]
        share = 1 - self._ratio
        rest = 1 - first
        for _ in range(candidates - 1):
            values.append(min(rest * share, values[-1]))
            rest -= values[-1]
        logs = [math.log(max(value, 1e-30)) for value in values]
        return Logprobs((1, *range(1, candidates + 1)), (logs[0], *logs), 1)
