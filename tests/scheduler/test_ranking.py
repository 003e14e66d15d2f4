"""best_of: which of the samples are the answers, in which order, and with what."""

from __future__ import annotations

import pytest
from schedulers import make_request

from quire.scheduler.plan import Logprobs
from quire.scheduler.ranking import Ranking
from quire.scheduler.sequence import FinishReason


def ranking_of(best_of: int, n: int, **params: object) -> Ranking:
    return Ranking(make_request("a", [1, 2, 3], best_of=best_of, n=n, **params))


def feed(ranking: Ranking, index: int, *values: float, end: FinishReason | None = FinishReason.LENGTH) -> None:
    """Sample `index` gets tokens 10 * index, 10 * index + 1 …, with these log-probabilities."""
    for i, value in enumerate(values):
        token = 10 * index + i
        ranking.add(index, token, Logprobs((token, 7), (value, -0.1), 2), end if i == len(values) - 1 else None)


def test_the_mean_decides_and_not_the_sum() -> None:
    ranking = ranking_of(best_of=3, n=2)
    feed(ranking, 0, -1.0)
    feed(ranking, 1, -0.5, -0.75, -0.25, end=FinishReason.STOP)
    assert not ranking.is_complete
    feed(ranking, 2, -2.0, -0.25)
    assert ranking.is_complete
    best, second = ranking.answers()
    assert (best.index, best.token_ids, best.finish_reason) == (0, (10, 11, 12), FinishReason.STOP)
    assert (best.cumulative_logprob, best.score) == (-1.5, -0.5)
    assert (second.index, second.token_ids, second.score) == (1, (0,), -1.0)


def test_equal_ones_stand_in_the_order_of_their_indices() -> None:
    ranking = ranking_of(best_of=4, n=3)
    for index in (3, 1, 0, 2):
        feed(ranking, index, -1.0 if index else -2.0)
    assert [answer.token_ids for answer in ranking.answers()] == [(10,), (20,), (30,)]


@pytest.mark.parametrize("wanted", [None, 0, 1])
def test_log_probabilities_are_given_to_those_who_asked(wanted: int | None) -> None:
    ranking = ranking_of(best_of=2, n=1, logprobs=wanted)
    feed(ranking, 0, -1.0, -2.0)
    feed(ranking, 1, -3.0)
    (answer,) = ranking.answers()
    given = (Logprobs((0, 7), (-1.0, -0.1), 2), Logprobs((1, 7), (-2.0, -0.1), 2))
    assert answer.logprobs == (() if wanted is None else given) and answer.score == -1.5


def test_a_sample_whose_logits_were_not_numbers_comes_last() -> None:
    ranking = ranking_of(best_of=3, n=3)
    feed(ranking, 0, -0.1, end=None)
    ranking.add(0, -1, Logprobs((-1, 7), (float("nan"), float("nan")), 1), FinishReason.ERROR)
    ranking.add(1, -1, None, FinishReason.ERROR)
    feed(ranking, 2, -9.0)
    answers = ranking.answers()
    assert [answer.token_ids for answer in answers] == [(20,), (), (0,)]
    assert [answer.finish_reason for answer in answers] == [FinishReason.LENGTH] + [FinishReason.ERROR] * 2
