"""The whole engine in one process: transformers' tokens in float32, and the results that vLLM's users know."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import build_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from quire.cluster import local
from quire.cluster.llm import LLM, CompletionOutput, Prompt, RequestOutput, SamplingParams
from quire.protos import worker_pb2
from quire.scheduler.plan import StepPlan, StepResult, TokenEvent
from quire.worker.config import WorkerConfig
from quire.worker.runner import Pending

MAX_MODEL_LEN = 96
NUM_TOKENS = 24
LENGTHS = (61, 1, 17, 33, 2, 15, 16, 7, 40)
MARGIN = 2e-3
"""Between the best and the second logit of every compared step: far above float32's noise, so that none is a tie."""
TOLERANCE = 1e-4

SMALL: dict[str, Any] = dict(
    vocab_size=199, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
OPT: dict[str, Any] = dict(
    vocab_size=199, hidden_size=48, ffn_dim=72, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=256, dropout=0.0,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-gqa-llama3-rope": lambda: LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama-mqa-biases": lambda: LlamaConfig(
        **SMALL | dict(num_key_value_heads=1), attention_bias=True, mlp_bias=True, head_dim=24
    ),
    "llama-mha-tied": lambda: LlamaConfig(**SMALL | dict(num_key_value_heads=4), tie_word_embeddings=True),
    "mistral-window": lambda: MistralConfig(**SMALL, sliding_window=13),
    "mistral-mqa-short-window": lambda: MistralConfig(
        **SMALL | dict(num_key_value_heads=1), sliding_window=6, head_dim=16
    ),
    "qwen2-tied": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-windows": lambda: Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32),
    "qwen3-mha-biases-layer-types": lambda: Qwen3Config(
        **SMALL | dict(num_key_value_heads=4), head_dim=16, attention_bias=True, tie_word_embeddings=True,
        use_sliding_window=True, sliding_window=5, layer_types=MIXED,
    ),
    "opt": lambda: OPTConfig(**OPT),
    "opt-gelu-untied-plain": lambda: OPTConfig(
        **OPT, activation_function="gelu", enable_bias=False, layer_norm_elementwise_affine=False,
        tie_word_embeddings=False,
    ),
    "opt-post-norm-narrow": lambda: OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=40),
    "opt-post-norm-wide": lambda: OPTConfig(
        **OPT | dict(num_attention_heads=6), do_layer_norm_before=False, word_embed_proj_dim=56, enable_bias=False
    ),
}  # fmt: skip

ROOMY: dict[str, Any] = dict(block_size=16, max_num_seqs=16, max_num_batched_tokens=512, num_gpu_blocks_override=128)
# Pools of hardly more than one longest sequence, and steps that cut prompts wherever they happen to.
TIGHT: dict[str, dict[str, Any]] = {
    "blocks-of-8": dict(block_size=8, max_num_seqs=7, max_num_batched_tokens=23, num_gpu_blocks_override=15),
    "blocks-of-16": dict(block_size=16, max_num_seqs=5, max_num_batched_tokens=7, num_gpu_blocks_override=8),
    "blocks-of-32": dict(block_size=32, max_num_seqs=9, max_num_batched_tokens=13, num_gpu_blocks_override=4),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Of every rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quire.worker.runner.default_threads", lambda num_ranks: 1)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture
def engine() -> Iterator[Callable[..., LLM]]:
    """Makes engines that audit every step; they must be empty at the end of the test."""
    made: list[LLM] = []

    def make(folder: Path, **settings: Any) -> LLM:
        llm = LLM(str(folder), device="cpu", max_model_len=MAX_MODEL_LEN, **settings)
        _audit_every_step(llm)
        made.append(llm)
        return llm

    yield make
    for llm in made:
        llm.close()
        assert _is_empty(llm)


def _audit_every_step(llm: LLM) -> None:
    scheduler, apply = llm.scheduler, llm.scheduler.apply

    def audited(result: StepResult) -> list[TokenEvent]:
        events = apply(result)
        scheduler.audit()
        return events

    scheduler.apply = audited  # type: ignore[method-assign]


def _is_empty(llm: LLM) -> bool:
    llm.scheduler.audit()
    pool = llm.scheduler.pool
    return not llm.scheduler.has_work and pool.num_free == pool.num_blocks


# -- against transformers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """A prompt and what transformers makes of it."""

    prompt: list[int]
    tokens: list[int]
    log_probs: torch.Tensor
    """[tokens, vocabulary]."""
    margin: float


@dataclass(frozen=True)
class Reference:
    folder: Path
    continuations: list[Continuation]
    eos: int

    @property
    def prompts(self) -> list[list[int]]:
        return [each.prompt for each in self.continuations]


def _reference(config: PretrainedConfig, folder: Path) -> Reference:
    """A model whose end-of-sequence token is one that comes up in few of the outputs."""
    model = build_model(config, folder)
    model.generation_config.eos_token_id = None
    endless = [_clear(model, length) for length in LENGTHS]
    number = Counter(token for each in endless for token in set(each.tokens))
    eos = min(number, key=lambda token: (number[token], token))
    model.generation_config.eos_token_id = eos
    model.generation_config.save_pretrained(folder)
    continuations = [_follow(model, each.prompt) for each in endless]
    for each, whole in zip(continuations, endless, strict=True):
        assert each.tokens == whole.tokens[: len(each.tokens)] and each.margin > MARGIN
    assert torch.cat([each.log_probs for each in continuations]).std() > 0.5, "too flat to compare with"
    return Reference(folder, continuations, eos)


def _clear(model: PreTrainedModel, length: int) -> Continuation:
    """Of the first prompt of this length on whose way nothing is close to a tie."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(1000 * seed + length)
        found = _follow(model, torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist())
        if found.margin > MARGIN:
            return found
    raise AssertionError(f"every prompt of {length} tokens leads to a tie")


@torch.no_grad()
def _follow(model: PreTrainedModel, prompt: list[int]) -> Continuation:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    logits = torch.cat(out.logits)
    best = logits.topk(2).values
    margin = (best[:, 0] - best[:, 1]).min().item()
    return Continuation(prompt, out.sequences[0, len(prompt) :].tolist(), logits.double().log_softmax(-1), margin)


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return _reference(CONFIGS[request.param](), tmp_path_factory.mktemp(request.param))


GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=5)


def _check(outputs: Sequence[RequestOutput], reference: Reference) -> None:
    for output, want in zip(outputs, reference.continuations, strict=True):
        (sample,) = output.outputs
        assert output.prompt_token_ids == want.prompt
        assert sample.token_ids == want.tokens, f"after a prompt of {len(want.prompt)} tokens"
        assert sample.finish_reason == ("stop" if want.tokens[-1] == reference.eos else "length")
        assert sample.stop_reason is None
        _check_logprobs(sample, want)


def _check_logprobs(sample: CompletionOutput, want: Continuation) -> None:
    assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids)
    for token, candidates, row in zip(sample.token_ids, sample.logprobs, want.log_probs, strict=True):
        assert len(candidates) == 5 and candidates[token].rank == 1
        assert sorted(entry.rank for entry in candidates.values()) == [1, 2, 3, 4, 5]
        for candidate, entry in candidates.items():
            assert entry.logprob == pytest.approx(row[candidate].item(), abs=TOLERANCE)
        best = sorted((entry.logprob for entry in candidates.values()), reverse=True)
        assert best == pytest.approx(row.topk(5).values.tolist(), abs=TOLERANCE)
    chosen = [candidates[token].logprob for token, candidates in zip(sample.token_ids, sample.logprobs, strict=True)]
    assert sample.cumulative_logprob == pytest.approx(sum(chosen), abs=1e-3)


@pytest.mark.parametrize("reference", CONFIGS, indirect=True)
def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(
    reference: Reference, engine: Callable[..., LLM]
) -> None:
    roomy = engine(reference.folder, **ROOMY)
    _check(roomy.generate(reference.prompts, GREEDY, use_tqdm=False), reference)
    assert roomy.scheduler.counters.num_preemptions == 0
    for settings in TIGHT.values():
        tight = engine(reference.folder, **settings)
        _check(tight.generate(reference.prompts, GREEDY, use_tqdm=False), reference)
        assert tight.scheduler.counters.num_preemptions > 0, settings


@pytest.mark.parametrize("reference", ["llama-gqa-llama3-rope"], indirect=True)
def test_the_end_of_sequence_is_among_what_is_compared(reference: Reference) -> None:
    ended = [each.tokens[-1] == reference.eos for each in reference.continuations]
    assert any(ended) and not all(ended)


@pytest.mark.parametrize("reference", ["llama-gqa-llama3-rope"], indirect=True)
def test_one_engine_serves_call_after_call(reference: Reference, engine: Callable[..., LLM]) -> None:
    llm = engine(reference.folder, **TIGHT["blocks-of-8"])
    for _ in range(2):
        _check(llm.generate(reference.prompts, GREEDY, use_tqdm=False), reference)
        assert _is_empty(llm)
    for each in reference.continuations[:3]:
        (output,) = llm.generate(each.prompt, GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == each.tokens


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["gqa", "mqa"])
def test_two_ranks_give_the_tokens_of_one(kv_heads: int, tmp_path: Path, engine: Callable[..., LLM]) -> None:
    """With a vocabulary and an intermediate size that two do not divide, and one KV head held by both."""
    reference = _reference(LlamaConfig(**SMALL | dict(num_key_value_heads=kv_heads, intermediate_size=71)), tmp_path)
    llm = engine(tmp_path, tensor_parallel_size=2, **TIGHT["blocks-of-8"])
    (child,) = _other_ranks()
    assert child.name == "quire-rank-1" and child.pid is not None
    _check(llm.generate(reference.prompts, GREEDY, use_tqdm=False), reference)
    assert llm.scheduler.counters.num_preemptions > 0
    os.kill(child.pid, signal.SIGINT)  # as a terminal does with every process
    _interrupt(llm, reference, before=False)
    _check(llm.generate(reference.prompts, GREEDY, use_tqdm=False), reference)
    # Where the other rank waits in the middle of a step, there is no way back.
    _interrupt(llm, reference, before=False, mid_step=True)
    with pytest.raises(RuntimeError, match="start them anew"):
        llm.generate(reference.prompts, GREEDY, use_tqdm=False)
    llm.close()
    assert not _other_ranks()


def test_ranks_that_cannot_start_leave_the_way_free_for_others(tmp_path: Path) -> None:
    build_model(LlamaConfig(**SMALL), tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="raise it, or lower max_model_len"):
            LLM(str(tmp_path), device="cpu", tensor_parallel_size=2, kv_cache_memory_bytes=40_000)
        assert not _other_ranks() and not torch.distributed.is_initialized()


def _other_ranks() -> list[BaseProcess]:
    return [child for child in multiprocessing.active_children() if child.name.startswith("quire-rank-")]


@pytest.mark.parametrize("reference", ["qwen3"], indirect=True)
def test_a_seed_decides_the_sample_alone_and_in_a_crowd(reference: Reference, engine: Callable[..., LLM]) -> None:
    each = [
        SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=100 + i, n=1 + i % 2, max_tokens=NUM_TOKENS)
        for i in range(len(reference.prompts))
    ]
    roomy = engine(reference.folder, **ROOMY)
    alone = [
        roomy.generate(prompt, params, use_tqdm=False)[0]
        for prompt, params in zip(reference.prompts, each, strict=True)
    ]
    for settings in TIGHT.values():
        tight = engine(reference.folder, **settings)
        crowd = tight.generate(reference.prompts[::-1], each[::-1], use_tqdm=False)[::-1]
        assert [_tokens(output) for output in crowd] == [_tokens(output) for output in alone]
        assert tight.scheduler.counters.num_preemptions > 0
    assert all(_tokens(output)[0] != _tokens(output)[1] for output in alone[1::2])
    greedy = [each.tokens for each in reference.continuations]
    assert [_tokens(output)[0] for output in alone] != greedy


def _tokens(output: RequestOutput) -> list[list[int]]:
    return [sample.token_ids for sample in output.outputs]


# -- text ------------------------------------------------------------------------------------------------------------

CORPUS = "The quick brown fox jumps over the lazy dog, and the dog runs after the fox until the sun goes down. "


def _save_tokenizer(folder: Path, kind: Any, decoder: Any) -> int:
    """Of some 90 pieces of the corpus, which all are plain text; returns their number."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = kind
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def _save_speaker(folder: Path, kind: Any, decoder: Any) -> None:
    """A model that writes gibberish."""
    size = _save_tokenizer(folder, kind, decoder)
    build_model(LlamaConfig(**SMALL | dict(vocab_size=size), eos_token_id=1), folder)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("speaker")
    _save_speaker(folder, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    with LLM(str(folder), device="cpu", max_model_len=MAX_MODEL_LEN, **ROOMY) as llm:
        _audit_every_step(llm)
        yield llm
        assert _is_empty(llm)


LONG = SamplingParams(seed=3, max_tokens=40, ignore_eos=True)


def _one(llm: LLM, prompt: Prompt, params: SamplingParams) -> CompletionOutput:
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    (sample,) = output.outputs
    return sample


def test_text_in_text_out(speaker: LLM) -> None:
    (output,) = speaker.generate("The quick fox", LONG, use_tqdm=False)
    (sample,) = output.outputs
    tokenizer = speaker.tokenizer
    assert tokenizer is not None
    assert output.prompt == "The quick fox" and output.finished
    assert output.prompt_token_ids == tokenizer.encode("The quick fox")
    assert sample.index == 0 and len(sample.token_ids) == 40
    assert sample.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    assert (sample.finish_reason, sample.stop_reason) == ("length", None)
    assert sample.logprobs is None and sample.cumulative_logprob is None


def test_all_forms_of_a_prompt_mean_the_same(speaker: LLM) -> None:
    assert speaker.tokenizer is not None
    ids = speaker.tokenizer.encode("over the dog")
    forms: list[Prompt] = ["over the dog", ids, tuple(ids), {"prompt": "over the dog"}, {"prompt_token_ids": ids}]
    outputs = speaker.generate(forms, LONG, use_tqdm=False)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert [output.prompt for output in outputs] == ["over the dog", None, None, "over the dog", None]
    for form in forms:
        assert _one(speaker, form, LONG) == outputs[0].outputs[0]


def test_results_come_in_the_order_of_the_prompts_each_with_its_own_parameters(speaker: LLM) -> None:
    prompts = ["the fox", "the dog", "the sun"]
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in (9, 2, 5)]
    outputs = speaker.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 2, 5]
    assert len({output.request_id for output in outputs}) == 3
    assert speaker.generate([], use_tqdm=False) == []


def test_a_stop_string_ends_the_text_before_it(speaker: LLM) -> None:
    whole = _one(speaker, "The quick fox", LONG)
    stop = whole.text[20:24]
    before = whole.text[: whole.text.index(stop)]
    sample = _one(speaker, "The quick fox", replace(LONG, stop=["never so", stop]))
    assert (sample.text, sample.finish_reason, sample.stop_reason) == (before, "stop", stop)
    assert len(sample.token_ids) < len(whole.token_ids)
    assert sample.token_ids == whole.token_ids[: len(sample.token_ids)]
    kept = _one(speaker, "The quick fox", replace(LONG, stop=stop, include_stop_str_in_output=True))
    assert kept.text == before + stop
    unstopped = _one(speaker, "The quick fox", replace(LONG, stop=[stop + "never so", whole.text[-2:] + "?"]))
    assert unstopped == whole


def test_a_stop_string_ends_one_sample_and_not_its_siblings(speaker: LLM) -> None:
    both = speaker.generate("The dog", replace(LONG, n=2), use_tqdm=False)[0].outputs
    stop = next(both[0].text[i : i + 4] for i in range(30) if both[0].text[i : i + 4] not in both[1].text)
    first, second = speaker.generate("The dog", replace(LONG, n=2, stop=stop), use_tqdm=False)[0].outputs
    assert (first.finish_reason, first.stop_reason) == ("stop", stop) and stop not in first.text
    assert second == both[1]


def test_no_stop_string_counts_before_min_tokens(speaker: LLM) -> None:
    whole = _one(speaker, "The quick fox", replace(LONG, seed=8))
    stop = whole.text[3]
    count = len(_one(speaker, "The quick fox", replace(LONG, seed=8, stop=stop)).token_ids)
    later = _one(speaker, "The quick fox", replace(LONG, seed=8, stop=stop, min_tokens=count + 1))
    assert len(later.token_ids) > count and later.text.startswith(whole.text[: whole.text.index(stop) + 1])


def test_a_stop_token_ends_the_output_and_is_no_part_of_the_text(speaker: LLM) -> None:
    assert speaker.tokenizer is not None
    whole = _one(speaker, "The quick fox", LONG)
    stop = next(token for token in whole.token_ids[12:] if token not in whole.token_ids[:12] and token > 1)
    tokens = whole.token_ids[: whole.token_ids.index(stop) + 1]
    for extra in ({}, {"stop": "never so"}):
        sample = _one(speaker, "The quick fox", replace(LONG, stop_token_ids=[stop], **extra))
        assert (sample.token_ids, sample.finish_reason, sample.stop_reason) == (tokens, "stop", stop)
        assert sample.text == speaker.tokenizer.decode(tokens[:-1])
    kept = _one(speaker, "The quick fox", replace(LONG, stop_token_ids=[stop], include_stop_str_in_output=True))
    assert kept.text == speaker.tokenizer.decode(tokens)


def test_the_models_own_end_has_no_reason_beside_it(speaker: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logit_bias={1: 100.0})
    sample = _one(speaker, "The fox", params)
    assert (sample.token_ids, sample.text) == ([1], "")
    assert (sample.finish_reason, sample.stop_reason) == ("stop", None)
    assert _one(speaker, "The fox", replace(params, skip_special_tokens=False)).text == "</s>"
    assert _one(speaker, "The fox", replace(params, min_tokens=4)).token_ids[3:] != [1]
    assert len(_one(speaker, "The fox", replace(params, ignore_eos=True)).token_ids) == 8


def test_samples_differ_and_seeds_repeat(speaker: LLM) -> None:
    params = SamplingParams(n=3, seed=11, max_tokens=30, ignore_eos=True)
    (output,) = speaker.generate("The fox", params, use_tqdm=False)
    assert [sample.index for sample in output.outputs] == [0, 1, 2]
    assert len({sample.text for sample in output.outputs}) == 3
    again, other = speaker.generate(["The fox"] * 2, [params, replace(params, seed=12)], use_tqdm=False)
    assert again.outputs == output.outputs
    assert {sample.text for sample in other.outputs}.isdisjoint(sample.text for sample in output.outputs)
    assert _one(speaker, "The fox", replace(params, n=1)) == output.outputs[0]


def test_requests_without_a_seed_differ_and_a_new_engine_repeats_them(speaker: LLM) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    runs = []
    for seed in (0, 0, 1):
        with LLM(speaker.config.model, device="cpu", max_model_len=MAX_MODEL_LEN, seed=seed, **ROOMY) as llm:
            runs.append([output.outputs[0].text for output in llm.generate(["The fox"] * 3, params, use_tqdm=False)])
    assert len(set(runs[0])) == 3
    assert runs[0] == runs[1] and set(runs[0]).isdisjoint(runs[2])


def test_log_probabilities_by_token_with_rank_and_text(speaker: LLM) -> None:
    params = replace(LONG, temperature=2.0, max_tokens=12)
    for count in (0, 1, 4):
        sample = _one(speaker, "The fox", replace(params, logprobs=count))
        assert sample.logprobs is not None and len(sample.logprobs) == 12
        for token, candidates in zip(sample.token_ids, sample.logprobs, strict=True):
            assert next(iter(candidates)) == token
            likeliest = {entry.rank for entry in candidates.values()} - {candidates[token].rank}
            assert likeliest | {candidates[token].rank} >= set(range(1, count + 1))
            assert len(candidates) == count + (candidates[token].rank > count)
        said = [sample.logprobs[i][token] for i, token in enumerate(sample.token_ids)]
        assert "".join(entry.decoded_token or "" for entry in said) == sample.text
        assert sample.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in said))
        assert count or any(entry.rank > 1 for entry in said)


def test_the_space_before_the_first_word_is_there_with_and_without_stop_strings(tmp_path: Path) -> None:
    """A decoder that takes the first space of a text away must know that the prompt comes before."""
    _save_speaker(tmp_path, pre_tokenizers.Metaspace(), decoders.Metaspace())
    with LLM(str(tmp_path), device="cpu", max_model_len=MAX_MODEL_LEN, **ROOMY) as llm:
        assert llm.tokenizer is not None
        (word,) = (id for id in range(90) if llm.tokenizer.token_text(id) == " the")
        params = SamplingParams(temperature=0, max_tokens=3, logit_bias={word: 100.0}, logprobs=0)
        sample = _one(llm, "over the", params)
        assert sample.text == " the the the"
        assert sample.logprobs is not None
        assert [entry.decoded_token for each in sample.logprobs for entry in each.values()] == [" the"] * 3
        assert _one(llm, "over the", replace(params, stop="never so")).text == sample.text
        (chat,) = llm.chat([{"role": "user", "content": "over the"}], params, use_tqdm=False)
        assert chat.outputs[0].text == "the the the"


@pytest.mark.parametrize("stop", [(), ("never so",)])
def test_logits_that_are_not_numbers_end_one_sample_and_not_the_others(
    stop: Sequence[str], speaker: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = replace(LONG, stop=stop, logprobs=0)
    prompts = ["The quick fox", "The dog"]
    whole = speaker.generate(prompts, sampling_params=params, use_tqdm=False)
    decoder = speaker._executor._runner.decoder
    logits, steps = decoder.logits, []

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        out = logits(hidden)
        steps.append(out)
        if len(steps) == 5:
            out[0] = torch.nan
        return out

    monkeypatch.setattr(decoder, "logits", broken)
    first, second = speaker.generate(prompts, sampling_params=params, use_tqdm=False)
    (sample,), (full,) = first.outputs, whole[0].outputs
    assert (sample.finish_reason, sample.stop_reason) == ("error", None)
    assert sample.token_ids == full.token_ids[:4] and len(sample.logprobs or ()) == 4
    assert sample.text and full.text.startswith(sample.text)
    (sample,), (full,) = second.outputs, whole[1].outputs
    assert (sample.token_ids, sample.text, sample.finish_reason) == (full.token_ids, full.text, "length")
    monkeypatch.setattr(decoder, "logits", lambda hidden: logits(hidden) * torch.nan)
    nothing = _one(speaker, "The dog", params)
    assert (nothing.token_ids, nothing.text, nothing.finish_reason) == ([], "", "error")


def test_a_prompt_close_to_the_limit_needs_no_max_tokens(speaker: LLM) -> None:
    sample = _one(speaker, [5] * (MAX_MODEL_LEN - 3), SamplingParams(ignore_eos=True))
    assert (len(sample.token_ids), sample.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    "edges",
    [
        dict(temperature=1e-45, top_p=1 + 1e-9, min_p=1 + 1e-9, top_k=2**31 - 1, repetition_penalty=0.01),
        dict(temperature=100 + 1e-9, top_p=1e-45, min_p=1e-50, presence_penalty=-2 - 1e-9, frequency_penalty=2 + 1e-9),
        dict(temperature=1e-50, repetition_penalty=100 + 1e-9, logit_bias={1: -100 - 1e-9}, seed=-(1 << 63)),
    ],
)
def test_whatever_a_request_may_ask_for_a_worker_takes(edges: dict[str, Any], speaker: LLM) -> None:
    sample = _one(speaker, "The fox", SamplingParams(max_tokens=3, ignore_eos=True, logprobs=20, **edges))
    assert (len(sample.token_ids), sample.finish_reason) == (3, "length")


def test_each_rank_on_gpus_sees_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, 5,2,nonsense")
    assert local._visible_gpus(3) == ["GPU-a", "5", "2"]
    with local._seeing("5"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a, 5,2,nonsense"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert local._visible_gpus(2) == ["0", "1", "2"]
    with local._seeing("1"), local._seeing(None):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    with pytest.raises(ValueError, match="--tensor-parallel-size 4 takes as many GPUs, and 3 can be seen"):
        local.LocalExecutor(WorkerConfig("unused", device="cuda", tensor_parallel_size=4))
    assert not _other_ranks()


# -- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no text": ("", None, "prompt is empty"),
    "no tokens": ([[]], None, "prompt is empty"),
    "one of several is empty": (["the fox", [], "the dog"], None, "prompt is empty"),
    "too long": ([5] * MAX_MODEL_LEN, None, "at most 95 fit"),
    "too long with its output": ([5] * 90, SamplingParams(max_tokens=7), "lower it"),
    "an unknown token": ([5, 4000], None, "outside the model's vocabulary"),
    "too few parameters": (["a", "b", "c"], [SamplingParams()] * 2, "3 prompts but 2 SamplingParams"),
    "too many parameters": ("a", [SamplingParams()] * 2, "1 prompts but 2 SamplingParams"),
    "parameters as a dictionary": ("the fox", {"temperature": 0}, "sampling_params must be SamplingParams"),
    "a number": (5, None, "a prompt is"),
    "nothing": (None, None, "a prompt is"),
    "a fraction": ([0.5], None, "a prompt is"),
    "nothing among others": (["the fox", None], None, "a prompt is"),
    "bytes": (b"the fox", None, "a prompt is"),
    "a list of texts as tokens": ([["the fox"]], None, "a prompt is"),
    "a mapping without a prompt": ({"text": "the fox"}, None, "a prompt is"),
    "a mapping with another type": ({"prompt": 5}, None, "a prompt is"),
    "a biased token outside": ("the fox", SamplingParams(logit_bias={4000: 1.0}), "logit_bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_in_a_sentence_and_leaves_nothing(case: str, speaker: LLM) -> None:
    prompts, params, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        speaker.generate(prompts, params, use_tqdm=False)
    assert _is_empty(speaker)
    assert len(_one(speaker, "the fox", LONG).token_ids) == 40


@pytest.mark.parametrize("reference", ["llama-gqa-llama3-rope"], indirect=True)
def test_without_a_tokenizer_there_are_tokens_but_no_text(reference: Reference, engine: Callable[..., LLM]) -> None:
    llm = engine(reference.folder, **ROOMY)
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate("the fox", use_tqdm=False)
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate([5, 6], SamplingParams(stop="fox"), use_tqdm=False)
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.chat([{"role": "user", "content": "the fox"}], use_tqdm=False)
    sample = _one(llm, [5, 6], SamplingParams(max_tokens=3, logprobs=1))
    assert sample.text == "" and sample.logprobs is not None
    assert {entry.decoded_token for entry in sample.logprobs[0].values()} == {None}


@pytest.mark.parametrize("reference", ["llama-gqa-llama3-rope"], indirect=True)
@pytest.mark.parametrize("before", [True, False], ids=["before-the-step", "after-the-step"])
def test_after_an_interrupt_the_next_call_starts_afresh(
    before: bool, reference: Reference, engine: Callable[..., LLM]
) -> None:
    llm = engine(reference.folder, **TIGHT["blocks-of-8"])
    _interrupt(llm, reference, before)
    _check(llm.generate(reference.prompts, GREEDY, use_tqdm=False), reference)


def _interrupt(llm: LLM, reference: Reference, before: bool, mid_step: bool = False) -> None:
    """In the fifth step of a call."""
    step, submit, launch = llm.scheduler.counters.num_steps + 5, llm._executor.submit, llm._executor._runner.launch

    def interrupted_submit(plan: StepPlan) -> None:
        if plan.step != step or not before:
            submit(plan)
        if plan.step == step:
            raise KeyboardInterrupt

    def interrupted_launch(plan: worker_pb2.StepPlan) -> Pending:
        pending = launch(plan)
        if plan.step == step:
            raise KeyboardInterrupt
        return pending

    with pytest.MonkeyPatch.context() as patch:
        if mid_step:
            patch.setattr(llm._executor._runner, "launch", interrupted_launch)
        else:
            patch.setattr(llm._executor, "submit", interrupted_submit)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(reference.prompts, GREEDY, use_tqdm=False)
    assert _is_empty(llm)


# -- the bundled model -----------------------------------------------------------------------------------------------


def test_the_bundled_model_needs_no_argument() -> None:
    facts = "Mia has the red key. Tom has the blue cup."
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM() as llm:
        (story,) = llm.generate("Once upon a time", replace(params, max_tokens=200), use_tqdm=False)
        assert story.outputs[0].finish_reason == "stop" and story.outputs[0].text.endswith((".", '."', "?"))
        (answer,) = llm.chat([{"role": "user", "content": f"{facts} Who has the blue cup?"}], params, use_tqdm=False)
        assert (answer.outputs[0].text, answer.outputs[0].finish_reason) == ("Tom.", "stop")
        several = [[{"role": "user", "content": f"{facts} Who has the {thing}?"}] for thing in ("red key", "blue cup")]
        answers = llm.chat(several, params, use_tqdm=False)
        assert [each.outputs[0].text for each in answers] == ["Mia.", "Tom."]
        assert _is_empty(llm)
