"""Beam search through the whole engine gives what transformers' `generate(num_beams=…)` gives in float32: with every
kind of preemption, with and without the prefix cache, beside other requests, and steps ahead of results."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from random_models import build_model
from transformers import LlamaConfig, PreTrainedModel

from quire.cluster.llm import LLM, RequestOutput, SamplingParams

VOCAB, MAX_TOKENS = 173, 14
WIDTHS = (2, 4, 6)
PENALTIES = (-1.0, 0.0, 0.6, 1.0, 2.0)
EARLY_STOPPING: tuple[bool | str, ...] = (True, False, "never")
STOPS = (23, 131)
"""Made likely enough to come up at any place."""

ROOMY: dict[str, Any] = dict(num_gpu_blocks_override=400, max_num_seqs=24, max_num_batched_tokens=128)
TIGHT: dict[str, Any] = dict(num_gpu_blocks_override=32, max_num_seqs=14, max_num_batched_tokens=29)
"""Two searches of six beams do not fit in."""
SWAP: dict[str, Any] = dict(preemption_mode="swap", swap_space=0.01)


class Search(NamedTuple):
    prompt: tuple[int, ...]
    width: int
    length_penalty: float
    early_stopping: bool | str

    def params(self, **more: Any) -> SamplingParams:
        asked: dict[str, Any] = dict(
            beam_width=self.width,
            n=self.width,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            max_tokens=MAX_TOKENS,
        )
        return SamplingParams(**{**asked, **more})


def _prompt(length: int) -> tuple[int, ...]:
    return tuple((7 * length + 31 * i * i) % VOCAB for i in range(length))


COMMON = _prompt(13)
PROMPTS = (_prompt(5), COMMON + _prompt(4), COMMON + _prompt(9), _prompt(24), (77,))
SEARCHES = [
    Search(PROMPTS[i % len(PROMPTS)], width, penalty, early)
    for i, (width, penalty, early) in enumerate(itertools.product(WIDTHS, PENALTIES, EARLY_STOPPING))
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quire.worker.runner.default_threads", lambda num_ranks: 1)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=list(STOPS),
    )  # fmt: skip
    model = build_model(config, folder)
    with torch.no_grad():  # logits that vary twice as much: towards the top with every second token
        model.lm_head.weight[list(STOPS)] *= 2
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> list[list[tuple[list[int], float]]]:
    """Output and score of each answer to each of the searches."""
    return [_expect(model, search) for search in SEARCHES]


def _expect(model: PreTrainedModel, search: Search) -> list[tuple[list[int], float]]:
    ids = torch.tensor([search.prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=search.width,
        num_return_sequences=search.width,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
        do_sample=False,
        max_new_tokens=MAX_TOKENS,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    outputs = [_until_stop(row[len(search.prompt) :].tolist()) for row in found.sequences]
    return list(zip(outputs, found.sequences_scores.tolist(), strict=True))


def _until_stop(output: list[int]) -> list[int]:
    end = next((place for place, token in enumerate(output) if token in STOPS), len(output))
    return output[: end + 1]


def make_llm(folder: Path, **settings: Any) -> LLM:
    return LLM(str(folder), device="cpu", dtype="float32", max_model_len=64, block_size=4, **settings)


def serve(llm: LLM, searches: Sequence[Search]) -> list[RequestOutput]:
    outputs = llm.generate(
        [list(search.prompt) for search in searches], [search.params() for search in searches], use_tqdm=False
    )
    assert_all_free(llm)
    return outputs


def assert_all_free(llm: LLM) -> None:
    llm.scheduler.audit()
    memory = llm.scheduler.memory()
    assert not llm.scheduler.has_work and memory.blocks_used == 0 and memory.swap_blocks_used == 0


def compare(outputs: Sequence[RequestOutput], expected: Sequence[list[tuple[list[int], float]]]) -> None:
    for search, output, answers in zip(SEARCHES, outputs, expected, strict=True):
        assert [answer.token_ids for answer in output.outputs] == [tokens for tokens, _ in answers], search
        for answer, (tokens, score) in zip(output.outputs, answers, strict=True):
            assert answer.score == pytest.approx(score, rel=1e-4, abs=1e-5), search
            assert answer.finish_reason == ("stop" if tokens[-1] in STOPS else "length")


def test_the_cases_end_in_every_way(expected: list[list[tuple[list[int], float]]]) -> None:
    lengths = {len(tokens) for answers in expected for tokens, _ in answers}
    ends = {tokens[-1] for answers in expected for tokens, _ in answers}
    assert len(lengths) > 8 and ends.issuperset(STOPS) and len(ends) > 5


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_all_at_once(folder: Path, expected: list[list[tuple[list[int], float]]], cache: bool) -> None:
    with make_llm(folder, enable_prefix_caching=cache, **ROOMY) as llm:
        for _ in range(2):
            compare(serve(llm, SEARCHES), expected)
        counters = llm.scheduler.counters
        assert (counters.prefix_hit_tokens > 0) == cache
        assert counters.copied_blocks > 0 and counters.num_preemptions == 0


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preempted(folder: Path, expected: list[list[tuple[list[int], float]]], mode: str, cache: bool) -> None:
    how = SWAP if mode == "swap" else {"preemption_mode": mode}
    with make_llm(folder, enable_prefix_caching=cache, **TIGHT, **how) as llm:
        compare(serve(llm, SEARCHES), expected)
        counters = llm.scheduler.counters
        assert counters.num_preemptions > 0
        assert (counters.num_swap_preemptions > 0) == (mode == "swap")


@pytest.mark.parametrize("depth", [1, 3])
def test_steps_ahead_of_results(folder: Path, expected: list[list[tuple[list[int], float]]], depth: int) -> None:
    with make_llm(folder, run_ahead=depth, **TIGHT, **SWAP) as llm:
        compare(serve(llm, SEARCHES), expected)


def test_over_two_ranks(folder: Path, expected: list[list[tuple[list[int], float]]]) -> None:
    with make_llm(folder, tensor_parallel_size=2, **TIGHT, **SWAP) as llm:
        compare(serve(llm, SEARCHES), expected)
        assert llm.scheduler.counters.num_swap_preemptions > 0


def test_beside_others(folder: Path, expected: list[list[tuple[list[int], float]]]) -> None:
    """Whatever else is being served, in a pool that is too small for all of it; and the others get what they would."""
    others = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=4, n=4, max_tokens=11, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=5, best_of=3, n=2, max_tokens=9),
    ]
    prompts = [list(prompt) for prompt in PROMPTS[1:4]]
    with make_llm(folder, deterministic=True, **ROOMY) as llm:
        alone = [llm.generate([p], [o], use_tqdm=False)[0] for p, o in zip(prompts, others, strict=True)]
    with make_llm(folder, deterministic=True, **TIGHT, **SWAP) as llm:
        mixed_prompts, mixed = [], []
        for i, search in enumerate(SEARCHES):
            mixed_prompts += [list(search.prompt), prompts[i % 3]]
            mixed += [search.params(), others[i % 3]]
        outputs = llm.generate(mixed_prompts, mixed, use_tqdm=False)
        assert_all_free(llm)
        assert llm.scheduler.counters.num_preemptions > 0
    compare(outputs[::2], expected)
    for i, output in enumerate(outputs[1::2]):
        assert [s.token_ids for s in output.outputs] == [s.token_ids for s in alone[i % 3].outputs]


def test_fewer_answers_and_their_log_probabilities(folder: Path, expected: list[list[tuple[list[int], float]]]) -> None:
    search, answers = SEARCHES[-1], expected[-1]
    with make_llm(folder, **ROOMY) as llm:
        (output,) = llm.generate([list(search.prompt)], search.params(n=2, logprobs=3), use_tqdm=False)
    assert [answer.token_ids for answer in output.outputs] == [tokens for tokens, _ in answers[:2]]
    for answer in output.outputs:
        assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)
        chosen = [entries[token] for token, entries in zip(answer.token_ids, answer.logprobs, strict=True)]
        assert sum(entry.logprob for entry in chosen) == pytest.approx(answer.cumulative_logprob, rel=1e-5)
        for entry, entries in zip(chosen, answer.logprobs, strict=True):
            ranks = sorted(other.rank for other in entries.values())
            assert ranks[:3] == [1, 2, 3] and len(ranks) == (3 if entry.rank <= 3 else 4)
            assert all((other.logprob > entry.logprob) == (other.rank < entry.rank) for other in entries.values())


def test_one_beam_is_greedy(folder: Path) -> None:
    prompts = [list(prompt) for prompt in PROMPTS]
    with make_llm(folder, **ROOMY) as llm:
        greedy = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
        beams = llm.generate(prompts, SamplingParams(beam_width=1, max_tokens=MAX_TOKENS), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in beams] == [o.outputs[0].token_ids for o in greedy]
