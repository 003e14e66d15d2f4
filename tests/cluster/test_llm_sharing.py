"""The offline API's ranked answers, salts, reserved prefixes and memory settings, on the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from quire.cluster.llm import LLM, CompletionOutput, Prompt, SamplingParams
from quire.scheduler.params import InvalidRequest
from quire.scheduler.plan import StepPlan
from quire.scheduler.request import Request

PROMPT = (
    "Once upon a time there was a fox named Mia. Mia had a red key and a blue cup, and she lived near the old mill."
)
BLOCKS = dict(device="cpu", dtype="float32", max_model_len=256, block_size=16, num_gpu_blocks_override=100)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**BLOCKS) as made:  # type: ignore[arg-type]
        yield made
        made.scheduler.audit()
        assert not made.scheduler.has_work


def answers(llm: LLM, prompt: Prompt, params: SamplingParams) -> list[CompletionOutput]:
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    return output.outputs


def test_the_best_of_more_samples_are_the_answers(llm: LLM) -> None:
    params = SamplingParams(n=5, seed=7, max_tokens=12, temperature=1.3, logprobs=0)
    samples = answers(llm, PROMPT, params)
    best = answers(llm, PROMPT, replace(params, n=2, best_of=5))
    means = {s.index: (s.cumulative_logprob or 0.0) / len(s.token_ids) for s in samples}
    expected = sorted(samples, key=lambda s: -means[s.index])[:2]
    assert [s.index for s in expected] != [0, 1], "no ranking was needed"
    assert [(a.index, a.token_ids, a.text) for a in best] == [
        (rank, s.token_ids, s.text) for rank, s in enumerate(expected)
    ]
    assert [a.score for a in best] == pytest.approx([means[s.index] for s in expected])
    assert [a.cumulative_logprob for a in best] == pytest.approx([s.cumulative_logprob for s in expected])
    assert [len(a.logprobs or ()) for a in best] == [len(a.token_ids) for a in best]


def test_samples_are_single_requests_with_the_seeds_derived_from_theirs(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(PROMPT + " One day")
    params = SamplingParams(n=4, seed=77, max_tokens=16)
    request = Request.checked("r", ids, params, 77, llm.config.limits)
    single = [replace(params, n=1, seed=request.sample_seed(index)) for index in range(4)]
    copied = llm.scheduler.counters.copied_blocks
    samples = [sample.token_ids for sample in answers(llm, ids, params)]
    # The last block, which is not full, once fewer than there are samples.
    assert len(ids) % 16 and llm.scheduler.counters.copied_blocks - copied == 3
    assert samples == [answers(llm, ids, each)[0].token_ids for each in single]
    assert len(set(map(tuple, samples))) > 1


def test_beams_come_best_first_with_text_and_score(llm: LLM) -> None:
    params = SamplingParams(n=3, beam_width=4, max_tokens=10, length_penalty=0.6, logprobs=2, ignore_eos=True)
    found = answers(llm, PROMPT, params)
    assert [a.index for a in found] == [0, 1, 2]
    assert len({tuple(a.token_ids) for a in found}) == 3
    scores = [a.score or 0.0 for a in found]
    assert scores == sorted(scores, reverse=True)
    for a in found:
        assert a.finish_reason == "length" and len(a.token_ids) == len(a.logprobs or ()) == 10
        said = sum(each[token].logprob for each, token in zip(a.logprobs or (), a.token_ids, strict=True))
        assert a.cumulative_logprob == pytest.approx(said, rel=1e-4)
        assert a.score == pytest.approx(said / 10**0.6, rel=1e-4)
        assert llm.tokenizer is not None and a.text == llm.tokenizer.decode(a.token_ids)
    (greedy,) = answers(llm, PROMPT, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0))
    assert (found[0].cumulative_logprob or 0.0) >= (greedy.cumulative_logprob or 0.0) - 1e-4
    assert answers(llm, PROMPT, replace(params, logprobs=None))[0].logprobs is None


@pytest.mark.parametrize("how", [{"beam_width": 3}, {"best_of": 4, "seed": 5}])
def test_a_stop_string_cuts_a_ranked_answer_afterwards(how: dict[str, int], llm: LLM) -> None:
    params = SamplingParams(n=2, max_tokens=20, ignore_eos=True, logprobs=0, **how)  # type: ignore[arg-type]
    whole = answers(llm, PROMPT, params)
    stop = whole[0].text[7:11]
    cut = answers(llm, PROMPT, replace(params, stop=[stop]))
    assert (cut[0].finish_reason, cut[0].stop_reason) == ("stop", stop)
    assert cut[0].text == whole[0].text[: whole[0].text.index(stop)]
    assert cut[0].token_ids == whole[0].token_ids[: len(cut[0].token_ids)] != whole[0].token_ids
    assert len(cut[0].logprobs or ()) == len(cut[0].token_ids)
    assert [(a.score, a.cumulative_logprob) for a in cut] == [(a.score, a.cumulative_logprob) for a in whole]


def hits(llm: LLM, prompt: Prompt) -> int:
    """Tokens of the prompt that were found."""
    before = llm.scheduler.counters.prefix_hit_tokens
    answers(llm, prompt, SamplingParams(max_tokens=1, temperature=0))
    return llm.scheduler.counters.prefix_hit_tokens - before


def test_what_is_computed_is_shared_within_a_salt() -> None:
    with LLM(**BLOCKS) as llm:  # type: ignore[arg-type]
        assert llm.tokenizer is not None
        full = (len(llm.tokenizer.encode(PROMPT)) - 1) // 16 * 16
        assert full >= 16
        assert [hits(llm, PROMPT) for _ in range(2)] == [0, full]
        salted: Prompt = {"prompt": PROMPT, "cache_salt": "tenant"}
        assert [hits(llm, salted) for _ in range(2)] == [0, full]
        assert llm.scheduler.memory().blocks_cached == llm.reset_prefix_cache() > 0
        assert [hits(llm, PROMPT) for _ in range(2)] == [0, full]
        for salt in ("x" * 129, "a\nb", 7):
            with pytest.raises(InvalidRequest, match="cache_salt"):
                hits(llm, {"prompt": PROMPT, "cache_salt": salt})
    with LLM(**BLOCKS, enable_prefix_caching=False) as llm:  # type: ignore[arg-type]
        assert [hits(llm, PROMPT) for _ in range(2)] == [0, 0]


def test_a_reserved_prefix_is_kept_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(**BLOCKS, enable_prefix_caching=False) as llm:  # type: ignore[arg-type]
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode(PROMPT)
        llm.reserve_prefix("story", {"prompt": PROMPT, "cache_salt": "s"})
        salted: Prompt = {"prompt_token_ids": [*ids, 5, 6], "cache_salt": "s"}
        expected = answers(llm, [*ids, 5, 6], SamplingParams(max_tokens=9, temperature=0))
        assert (hits(llm, [*ids, 5, 6]), hits(llm, salted)) == (0, len(ids))
        assert answers(llm, salted, SamplingParams(max_tokens=9, temperature=0)) == expected
        assert llm.scheduler.memory().blocks_used == -(-len(ids) // 16)

        submit, interrupted = llm._executor.submit, []

        def once(plan: StepPlan) -> None:
            if not interrupted:
                interrupted.append(plan)
                raise KeyboardInterrupt
            submit(plan)

        monkeypatch.setattr(llm._executor, "submit", once)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPT, use_tqdm=False)
        hits(llm, "Now it is computed anew.")
        assert hits(llm, salted) == len(ids)

        with pytest.raises(InvalidRequest, match="already"):
            llm.reserve_prefix("story", PROMPT)
        with pytest.raises(InvalidRequest, match="too little"):
            llm.reserve_prefix("long", [5] * 255)
            for number in range(9):
                llm.reserve_prefix(f"long{number}", [5 + number] * 255)
        others = llm.scheduler.memory().blocks_used - -(-len(ids) // 16)
        llm.release_prefix("story")
        assert llm.scheduler.memory().blocks_used == others
        with pytest.raises(InvalidRequest, match="no prefix 'story'"):
            llm.release_prefix("story")


def test_memory_settings_reach_the_scheduler_and_the_worker() -> None:
    with LLM(**BLOCKS, preemption_mode="swap", swap_space=1.0) as llm:  # type: ignore[arg-type]
        config = llm.scheduler.config
        assert (config.preemption_mode, config.enable_prefix_caching) == ("swap", True)
        assert config.num_swap_blocks == config.num_blocks == 100  # a gigabyte is more than the pool
        assert config.block_bytes == llm._executor.descriptions[0].bytes_per_block
        assert config.link_bytes_per_s > 0 and config.prefill_tokens_per_s > 0
    with LLM(**BLOCKS) as llm:  # type: ignore[arg-type]
        assert llm.scheduler.config.num_swap_blocks == 0 and llm.config.max_num_batched_tokens == 2048
