"""`best_of`: more samples than answers. What they bring is kept here until all have ended; the best are the answers."""

from __future__ import annotations

from quire.scheduler.plan import Answer, Logprobs
from quire.scheduler.request import Request
from quire.scheduler.sequence import FinishReason


class _Sample:
    __slots__ = ("cumulative", "end", "index", "logprobs", "token_ids")

    def __init__(self, index: int) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.cumulative = 0.0
        self.end: FinishReason | None = None

    @property
    def mean(self) -> float:
        return self.cumulative / max(1, len(self.token_ids))


class Ranking:
    """The samples of one request, whose rows report log-probabilities whether the client wants them or not."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._samples = [_Sample(index) for index in range(request.params.num_sequences)]
        self._num_running = len(self._samples)

    @property
    def is_complete(self) -> bool:
        """Whether every sample has ended."""
        return self._num_running == 0

    def add(self, index: int, token: int, logprobs: Logprobs | None, end: FinishReason | None) -> None:
        """Sample `index` has one more token, the last where `end` is set. ERROR comes with no token of the output."""
        sample = self._samples[index]
        assert sample.end is None
        if end is not FinishReason.ERROR:
            assert logprobs is not None
            sample.token_ids.append(token)
            sample.cumulative += logprobs.values[0]
            if self.request.params.logprobs is not None:
                sample.logprobs.append(logprobs)
        if end is not None:
            sample.end = end
            self._num_running -= 1

    def answers(self) -> tuple[Answer, ...]:
        """The n samples with the highest mean log-probability, best first, equal ones in the order of their indices.
        One that ended with ERROR is worse than any other."""
        assert self.is_complete
        ranked = sorted(self._samples, key=_order)[: self.request.params.n]
        return tuple(_answer(self.request, rank, sample) for rank, sample in enumerate(ranked))


def _order(sample: _Sample) -> tuple[bool, float, int]:
    return sample.end is FinishReason.ERROR, -sample.mean, sample.index


def _answer(request: Request, rank: int, sample: _Sample) -> Answer:
    assert sample.end is not None
    return Answer(
        request=request,
        index=rank,
        token_ids=tuple(sample.token_ids),
        logprobs=tuple(sample.logprobs),
        cumulative_logprob=sample.cumulative,
        score=sample.mean,
        finish_reason=sample.end,
    )
