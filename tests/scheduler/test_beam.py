"""Beam search's decisions: against transformers' own, bit for bit, and one by one on probabilities made up here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import build_model
from schedulers import make_request
from transformers import LlamaConfig, PreTrainedModel

from quire.scheduler.beam import BeamSearch, Hypothesis, Move, answers_of
from quire.scheduler.plan import Logprobs
from quire.scheduler.sequence import FinishReason

VOCAB, MAX_NEW = 61, 11
PENALTIES = (-1.0, 0.0, 0.6, 1.0, 2.0)
EARLY_STOPPING: tuple[bool | str, ...] = (True, False, "never")
STOPS = {(): 0.0, (7,): 5.0, (7, 11): 4.0, (3, 7, 11, 50): 3.0}
"""Stop tokens, and what makes them likelier."""
PROMPTS = ((5, 9, 2), (40, 41, 42, 43, 1, 1, 8), (17,), (60, 0, 33, 12, 12))


# -- against transformers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreTrainedModel]:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    folder: Path = tmp_path_factory.mktemp("model")
    model = build_model(config, folder)
    weight = model.lm_head.weight
    model.lm_head = torch.nn.Linear(16, VOCAB)
    model.lm_head.weight = weight
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield model
    torch.set_num_threads(threads)


def favour(model: PreTrainedModel, tokens: Sequence[int], by: float) -> None:
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[list(tokens)] = by


def expect(
    model: PreTrainedModel, prompt: Sequence[int], width: int, n: int, stops: Sequence[int], **options: Any
) -> list[tuple[tuple[int, ...], float]]:
    """Output and score of each answer of transformers."""
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=width,
        num_return_sequences=n,
        max_new_tokens=MAX_NEW,
        do_sample=False,
        use_cache=False,  # all of it computed again in every step, as it is here: the same bits
        eos_token_id=list(stops) or None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    outputs = [_until_stop(row[len(prompt) :].tolist(), stops) for row in found.sequences]
    return list(zip(outputs, found.sequences_scores.tolist(), strict=True))


def _until_stop(output: list[int], stops: Sequence[int]) -> tuple[int, ...]:
    ends = [position for position, token in enumerate(output) if token in stops]
    return tuple(output[: ends[0] + 1] if ends else output)


def logits_after(model: PreTrainedModel, batch: list[list[int]]) -> torch.Tensor:
    """[rows, vocabulary], computed as `generate` has it computed."""
    ids = torch.tensor(batch)
    logits: torch.Tensor = model(ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1).logits
    return logits[:, -1]


@torch.no_grad()
def search_with(
    model: PreTrainedModel, prompt: Sequence[int], width: int, n: int, stops: Sequence[int], **options: Any
) -> tuple[list[Hypothesis], int]:
    """Answers, and the number of steps."""
    search = BeamSearch(width, n, len(prompt), len(prompt) + MAX_NEW, frozenset(stops), **options)
    beams = [list(prompt)]
    for step in itertools.count(1):
        batch = beams + beams[:1] * (width - len(beams))
        logprobs = torch.log_softmax(logits_after(model, batch), dim=-1)
        top = torch.topk(logprobs, min(search.num_candidates, logprobs.shape[1]))
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        candidates = [list(zip(ids, values, strict=True)) for ids, values in rows]
        moves = search.step(candidates[: len(beams)])
        if moves is None:
            return search.answers(), step
        beams = [[*beams[move.parent], move.token] for move in moves]
    raise AssertionError


@pytest.mark.parametrize("stops", STOPS, ids=lambda stops: f"{len(stops)}-stops")
@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_answers_and_scores_are_those_of_transformers(
    model: PreTrainedModel, width: int, stops: tuple[int, ...]
) -> None:
    favour(model, stops, STOPS[stops])
    reasons, steps = set(), set()
    cases = itertools.product(PENALTIES, EARLY_STOPPING, range(2))
    for i, (penalty, early, which) in enumerate(cases):
        prompt, n = PROMPTS[(i + which) % len(PROMPTS)], width - i % 3 % 2
        options: dict[str, Any] = dict(length_penalty=penalty, early_stopping=early)
        want = expect(model, prompt, width, n, stops, **options)
        answers, num_steps = search_with(model, prompt, width, n, stops, **options)
        assert [(answer.token_ids, answer.score) for answer in answers] == want, (prompt, n, options)
        reasons |= {answer.finish_reason for answer in answers}
        steps.add(num_steps)
    if stops:  # the cases are worth their name
        assert FinishReason.STOP in reasons and len(steps) > 2, steps


def test_one_beam_is_the_greedy_answer(model: PreTrainedModel) -> None:
    favour(model, (7,), 3.0)
    lengths = set()
    for prompt, early in itertools.product(PROMPTS, EARLY_STOPPING):
        ids = torch.tensor([prompt])
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW, eos_token_id=7,
            pad_token_id=0,
        )  # fmt: skip
        ((answer,), _) = search_with(model, prompt, 1, 1, (7,), early_stopping=early)
        assert answer.token_ids == tuple(want[0, len(prompt) :].tolist())
        lengths.add(len(answer.token_ids))
    assert len(lengths) > 1


def test_more_candidates_than_a_vocabulary_has(model: PreTrainedModel) -> None:
    """With four tokens for six beams there are too few continuations at first."""
    favour(model, range(4, VOCAB), -math.inf)
    want = expect(model, PROMPTS[0], 6, 6, ())
    answers, _ = search_with(model, PROMPTS[0], 6, 6, ())
    assert [(answer.token_ids, answer.score) for answer in answers] == want


# -- one by one


def search_of(width: int, **options: Any) -> BeamSearch:
    defaults: dict[str, Any] = dict(n=width, prompt_len=10, max_len=13, stop_token_ids=frozenset({9}))
    return BeamSearch(width, **{**defaults, **options})


def test_parents_and_tokens_in_order_of_score() -> None:
    search = search_of(2)
    assert search.num_candidates == 3 and search.num_live == 1
    assert search.step([[(4, -1.0), (5, -1.5), (6, -3.0), (7, -4.0)]]) == [Move(0, 4, -1.0), Move(0, 5, -1.5)]
    # What follows the second beam is the best, the stop token after it complete, and the third best lives on too.
    moves = search.step([[(1, -2.0), (2, -2.5), (3, -9.0)], [(8, -0.25), (9, -0.5), (7, -1.0)]])
    assert moves == [Move(1, 8, -0.25), Move(1, 7, -1.0)] and search.num_live == 2
    assert search.step([[(1, -1.0), (2, -2.0)], [(3, -1.0), (2, -9.0)]]) is None and search.is_over
    assert search.answers() == [
        Hypothesis((5, 8, 1), (), -2.75, pytest.approx(-2.75 / 3), FinishReason.LENGTH),
        Hypothesis((5, 9), (), -2.0, -1.0, FinishReason.STOP),
    ]


def test_equal_scores_keep_their_order() -> None:
    search = search_of(2, stop_token_ids=frozenset())
    assert search.step([[(4, -1.0), (3, -1.0), (2, -1.0)]]) == [Move(0, 4, -1.0), Move(0, 3, -1.0)]
    assert search.step([[(5, -1.0), (1, -1.0)], [(0, -1.0)]]) == [Move(0, 5, -1.0), Move(0, 1, -1.0)]


def test_an_end_that_is_not_among_the_best_is_lost() -> None:
    search = search_of(2, max_len=12)
    assert search.step([[(4, -1.0), (5, -1.5), (9, -2.0), (7, -4.0)]]) == [Move(0, 4, -1.0), Move(0, 5, -1.5)]
    assert search.step([[(1, -1.0), (9, -8.0)], [(2, -1.0), (9, -8.0)]]) is None
    assert [answer.token_ids for answer in search.answers()] == [(4, 1), (5, 2)]


def test_a_stop_token_at_full_length_is_a_stop() -> None:
    search = search_of(2, max_len=11)
    assert search.step([[(9, -0.5), (4, -1.0), (5, -2.0)]]) is None
    ends = [(answer.token_ids, answer.finish_reason) for answer in search.answers()]
    assert ends == [((9,), FinishReason.STOP), ((4,), FinishReason.LENGTH)]


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "steps"),
    [
        # Complete after step 2: at -1 and -2. The best that is live stands at -0.7, then -2.7, -4.7, -6.7, -8.7 …
        (True, 1.0, 2),
        (False, 1.0, 4),  # -2.7 / 3 is better than -1 / 1, -4.7 / 4 is not
        ("never", 1.0, 6),  # -6.7 / 8 might be, -8.7 / 8 cannot
        (False, 0.0, 3),
        ("never", 0.0, 3),
        (False, -1.0, 3),  # -0.7 * 2 is better than -2 * 2, -2.7 * 3 is not
        ("never", -1.0, 3),
    ],
)
def test_when_it_ends(early_stopping: bool | str, length_penalty: float, steps: int) -> None:
    search = search_of(2, max_len=18, length_penalty=length_penalty, early_stopping=early_stopping)
    assert search.step([[(4, -0.5), (9, -1.0), (5, -1.2)]]) == [Move(0, 4, -0.5), Move(0, 5, -1.2)]
    after = [[(1, -0.2), (9, -1.5)], [(2, -1.0), (9, -7.0)]]
    while search.step(after) is not None:
        after = [[(1, -2.0)], [(2, -2.0)]]
    assert search.num_generated == steps
    assert [answer.token_ids for answer in search.answers()] == [(9,), (4, 9)]


def test_to_draw_level_is_not_to_improve() -> None:
    search = search_of(2, length_penalty=0.0)
    assert search.step([[(9, -1.0), (4, -2.0), (5, -2.25)]]) is not None
    assert search.step([[(9, -0.5), (1, -0.5)], [(2, -1.0), (3, -1.0)]]) is None
    assert [answer.score for answer in search.answers()] == [-1.0, -2.5] and search.num_generated == 2


def test_log_probabilities_of_every_token_of_an_answer() -> None:
    row = [(4, -0.5), (9, -1.0), (5, -1.25), (6, -2.0)]
    found = {}
    for num_logprobs in (None, 0, 2):
        search = search_of(2, n=1, max_len=12, num_logprobs=num_logprobs)
        assert search.num_candidates == 3
        search.step([row])
        assert search.step([[(1, -6.0), (2, -7.0)], [(7, -0.25), (8, -3.0)]]) is None
        (answer,) = answers_of(make_request("a", [1] * 10), search)
        assert (answer.request.request_id, answer.index, answer.token_ids) == ("a", 0, (5, 7))
        assert (answer.cumulative_logprob, answer.score) == (-1.5, -0.75)
        found[num_logprobs] = answer.logprobs
    assert search_of(2, num_logprobs=20).num_candidates == 20
    assert found == {
        None: (),
        0: (Logprobs((5,), (-1.25,), 3), Logprobs((7,), (-0.25,), 1)),
        2: (Logprobs((5, 4, 9), (-1.25, -0.5, -1.0), 3), Logprobs((7, 7, 8), (-0.25, -0.25, -3.0), 1)),
    }


@pytest.mark.parametrize("bad", [[], [(-1, math.nan), (3, math.nan)]])
def test_logits_that_are_not_numbers_end_the_search(bad: list[tuple[int, float]]) -> None:
    search = search_of(3)
    assert search.step([bad]) is None and search.is_over
    assert search.answers() == [Hypothesis((), (), 0.0, 0.0, FinishReason.ERROR)] * 3

    search = search_of(3)
    search.step([[(9, -0.5), (4, -1.0), (5, -2.0), (6, -3.0), (7, -3.5)]])
    assert search.step([[(1, -1.0)], bad, [(2, -1.0)]]) is None
    ends = [(answer.token_ids, answer.finish_reason) for answer in search.answers()]
    assert ends == [((9,), FinishReason.STOP), ((4,), FinishReason.ERROR), ((5,), FinishReason.ERROR)]


def test_what_cannot_be_sampled_is_never_taken() -> None:
    """Stop tokens that min_tokens holds back are reported at minus infinity where the vocabulary is small."""
    search = search_of(2, max_len=11)
    assert search.step([[(4, -1.0), (9, -math.inf), (5, -math.inf)]]) is None
    first, second = search.answers()
    assert first.token_ids == (4,) and second == Hypothesis((), (), 0.0, 0.0, FinishReason.ERROR)


@pytest.mark.parametrize("length_penalty", [-100.0, 100.0])
def test_a_penalty_beyond_all_numbers_is_no_error(length_penalty: float) -> None:
    length = 5000
    search = search_of(2, max_len=10 + length, length_penalty=length_penalty, early_stopping="never")
    after = [[(4, -1.0), (5, -1.5)]]
    while search.step(after) is not None:
        after = [[(4, -1.0)], [(5, -1.0)]]
    best, second = search.answers()
    assert best.token_ids == (4,) * length and second.token_ids == (5,) * length
    assert math.isfinite(best.score) and math.isfinite(second.score)


def test_a_request_says_how_to_search() -> None:
    request = make_request(
        "a", [1, 2, 3], eos=(9,), stop_token_ids=[4], beam_width=3, n=2, max_tokens=5, length_penalty=0.5,
        early_stopping=True, logprobs=1,
    )  # fmt: skip
    search = BeamSearch.of(request)
    assert (search.width, search.n, search.num_candidates) == (3, 2, 5)
    search.step([[(9, -1.0), (4, -1.5), (1, -2.0), (2, -3.0), (3, -4.0), (5, -5.0)]])
    assert search.step([[(9, -1.0)], [(6, -1.0)], [(6, -1.0)]]) is None  # three are complete
    best, second = answers_of(request, search)
    assert best.token_ids == (9,) and best.logprobs == (Logprobs((9, 9), (-1.0, -1.0), 1),)
    assert second.token_ids == (4,) and (second.index, second.finish_reason) == (1, FinishReason.STOP)
