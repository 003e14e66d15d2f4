"""`--deterministic` from the command line to the workers, the offline API with it, and sums over several ranks."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import build_model
from transformers import LlamaConfig

from quire.cluster import cli
from quire.cluster.config import EngineConfig, ServeConfig, resolve
from quire.cluster.llm import LLM, CompletionOutput, RequestOutput, SamplingParams

PROMPTS = ["Once upon a time", "Tom", "One day a little girl went to the park with her dog. The dog", "The sun was"]
LENGTHS = (61, 1, 17, 33, 7, 40)


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("how", ["flag", "environment"])
def test_the_choice_reaches_every_worker(how: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[ServeConfig] = []
    launch: Any = types.ModuleType("quire.cluster.launch")
    launch.serve, launch.LaunchError = lambda config: launched.append(config) or 0, RuntimeError
    monkeypatch.setitem(sys.modules, "quire.cluster.launch", launch)
    monkeypatch.setattr("quire.cluster.launch", launch, raising=False)
    monkeypatch.setattr("quire.cluster.fate.in_own_session", lambda run: run())
    if how == "environment":
        monkeypatch.setenv("QUIRE_DETERMINISTIC", "1" if on else "0")
    assert cli.run(["serve", "--device", "cpu", *(["--deterministic"] if on and how == "flag" else [])]) == 0
    (config,) = launched
    assert config.engine.deterministic is on
    engine = resolve(config.engine)
    assert [engine.worker_config(rank).deterministic for rank in range(2)] == [on, on]


def test_it_is_off_unless_asked_for() -> None:
    assert not EngineConfig().deterministic and not resolve(EngineConfig(device="cpu")).deterministic


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_gets_the_same_alone_and_in_a_crowd(dtype: str) -> None:
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=12, logprobs=2) for i in range(len(PROMPTS))]
    with LLM(device="cpu", dtype=dtype, deterministic=True, max_num_batched_tokens=11, max_num_seqs=3) as llm:
        crowd = llm.generate(PROMPTS, params, use_tqdm=False)
        alone = [llm.generate(prompt, param, use_tqdm=False)[0] for prompt, param in zip(PROMPTS, params, strict=True)]
    with LLM(device="cpu", dtype=dtype, deterministic=True) as llm:
        whole = llm.generate(PROMPTS, params, use_tqdm=False)
    assert all(output.outputs[0].text for output in crowd)
    assert bits(crowd) == bits(alone) == bits(whole)


def test_three_ranks_add_in_one_order(tmp_path: Path) -> None:
    """An all-reduce's own order of addition depends on the size of the message."""
    config = LlamaConfig(
        vocab_size=199, hidden_size=48, intermediate_size=71, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=256,
    )  # fmt: skip
    build_model(config, tmp_path)
    prompts = [[(i * i + 7 * length) % 199 for i in range(length)] for length in LENGTHS]
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
    with LLM(
        str(tmp_path),
        device="cpu",
        tensor_parallel_size=3,
        deterministic=True,
        max_num_seqs=5,
        max_num_batched_tokens=37,
    ) as llm:
        crowd = llm.generate(prompts, params, use_tqdm=False)
        alone = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    assert bits(crowd) == bits(alone)


def bits(outputs: list[RequestOutput]) -> list[list[Any]]:
    """Everything that numbers decide, log-probabilities as they lie in memory."""
    return [[_bits(sample) for sample in output.outputs] for output in outputs]


def _bits(sample: CompletionOutput) -> Any:
    assert sample.logprobs is not None
    logprobs = [
        {token: (np.float32(entry.logprob).tobytes(), entry.rank) for token, entry in entries.items()}
        for entries in sample.logprobs
    ]
    return sample.token_ids, sample.text, sample.finish_reason, logprobs
