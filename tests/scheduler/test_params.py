"""Every range of the sampling parameters and of a request, and the sentence that names the way out."""

import math
from dataclasses import replace

import pytest

from quire.scheduler.params import InvalidRequest, SamplingParams
from quire.scheduler.request import ModelLimits, Request

LIMITS = ModelLimits(vocab_size=100, max_model_len=32, eos_token_ids=(2,))


@pytest.mark.parametrize(
    "field, value",
    [
        ("n", 0), ("n", -1), ("n", 129), ("n", 1.0), ("n", True),
        ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", "7"),
        ("min_tokens", -1), ("min_tokens", 17),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("top_p", 0.0), ("top_p", 1.0001), ("top_p", math.nan),
        ("top_k", -2), ("top_k", 1.5), ("top_k", 1 << 31),
        ("top_p", 1e-50), ("temperature", 1e39),
        ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("logprobs", -1), ("logprobs", 21),
        ("seed", 1 << 64), ("seed", 0.5),
        ("stop", [""]), ("stop", ["x" * 257]), ("stop", ["a"] * 17), ("stop", [3]),
        ("stop_token_ids", [-1]), ("stop_token_ids", list(range(129))),
        ("logit_bias", {-1: 0.0}), ("logit_bias", {1: 101.0}), ("logit_bias", {1: math.nan}),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**{field: value})
    assert (refusal.value.field == field and field in str(refusal.value)) or field == "stop"


def test_defaults_and_forms_users_know():
    params = SamplingParams(stop="END", top_k=-1)
    assert params.stop == ("END",) and params.top_k == 0 and params.max_tokens == 16


@pytest.mark.parametrize(
    "prompt, sentence",
    [
        ([], "the prompt is empty"),
        ([1] * 32, "the prompt has 32 tokens, but at most 31 fit"),
        ([1, 100], "token id 100 is outside the model's vocabulary: ids go from 0 to 99"),
        ([-1, 3], "token id -1 is outside"),
    ],
)
def test_prompts_that_cannot_be_served(prompt, sentence):
    with pytest.raises(InvalidRequest, match=sentence) as refusal:
        Request.checked("r", prompt, SamplingParams(), 0, LIMITS)
    assert refusal.value.field == "prompt"


@pytest.mark.parametrize(
    "params, sentence",
    [
        (dict(max_tokens=30), "max_tokens is 30, but the prompt's 3 tokens leave room for 29 of the 32"),
        (dict(max_tokens=None, min_tokens=30), "room for only 29"),
        (dict(stop_token_ids=[100]), "token id 100 is outside the vocabulary"),
        (dict(logit_bias={100: 1.0}), "token id 100 is outside the vocabulary"),
    ],
)
def test_parameters_that_the_model_rules_out(params, sentence):
    with pytest.raises(InvalidRequest, match=sentence):
        Request.checked("r", [1, 2, 3], SamplingParams(**params), 0, LIMITS)


def test_numbers_beyond_any_float_are_refused():
    for value in (10**400, -(10**400)):
        with pytest.raises(InvalidRequest, match="presence_penalty must be between -2 and 2"):
            SamplingParams(presence_penalty=value)


def test_what_passes_as_a_float32_passes():
    SamplingParams(top_p=1 + 1e-9, min_p=1 + 1e-9, presence_penalty=-2 - 1e-9, repetition_penalty=0.01, top_k=2**31 - 1)


def test_the_default_of_max_tokens_is_lowered_to_the_room_and_a_given_one_is_not():
    for length, max_len in ((10, 26), (16, 32), (17, 32), (31, 32)):
        assert Request.checked("r", [1] * length, SamplingParams(), 0, LIMITS).max_len == max_len
        assert Request.checked("r", [1] * length, replace(SamplingParams(), seed=1), 0, LIMITS).max_len == max_len
    with pytest.raises(InvalidRequest, match="max_tokens is 16, but"):
        Request.checked("r", [1] * 17, SamplingParams(max_tokens=16), 0, LIMITS)
    with pytest.raises(InvalidRequest, match="room for only 2"):
        Request.checked("r", [1] * 30, SamplingParams(min_tokens=3), 0, LIMITS)


def test_limits_are_resolved():
    request = Request.checked("r", [1, 2, 3], SamplingParams(max_tokens=None, stop_token_ids=[7]), -1, LIMITS)
    assert request.max_len == 32 and request.stop_token_ids == {2, 7} and request.seed == (1 << 64) - 1
    ignoring = Request.checked("r", [1], SamplingParams(ignore_eos=True), 5, LIMITS)
    assert ignoring.stop_token_ids == frozenset() and ignoring.sample_seed(0) == 5 != ignoring.sample_seed(1)
