"""Recorded decode steps and steps sent ahead, with the Triton kernels and stand-ins for CUDA's own part: the tokens are
those of an engine on a CPU that does one step at a time. That a real graph replays what was captured, the tests in
tests/gpu show where there is a GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_gpu import emulate
from random_models import build_model
from transformers import Qwen3Config

from quire.cluster.llm import LLM, SamplingParams
from quire.kernels.attention import SharedPrefixes
from quire.worker.graphs import DecodeGraphs, padded_sizes

# Padding computes with anything at all, and the interpreter's NumPy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

VOCAB_SIZE = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LIMITS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 40, "block_size": 4, "max_num_seqs": 5,
    "max_num_batched_tokens": 16, "num_gpu_blocks_override": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_model(Qwen3Config(**SMALL, head_dim=16), folder)
    return folder


def requests(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Half of them greedy and nothing else, so that steps of either kind come."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))] for _ in range(6)]
    params = []
    for index in range(6):
        greedy = SamplingParams(temperature=0, max_tokens=rng.randint(4, 9), stop_token_ids=[rng.randrange(90)])
        other = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.3]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.4]),
            logit_bias={3: 1.5, 5: -2.0} if rng.random() < 0.5 else {},
            min_tokens=2,
            max_tokens=rng.randint(3, 9),
            logprobs=rng.choice([None, 2]),
            seed=index,
        )
        params.append(greedy if index % 2 or seed % 2 else other)
    return prompts, params


def serve(folder: Path, seed: int, **settings: Any) -> tuple[list[Any], int]:
    with LLM(str(folder), **LIMITS | settings) as llm:
        outputs = llm.generate(*requests(seed), use_tqdm=False)
        llm.scheduler.audit()
        preemptions = llm.scheduler.counters.num_preemptions
    return [(o.outputs[0].token_ids, o.outputs[0].finish_reason, o.outputs[0].logprobs) for o in outputs], preemptions


def check(got: list[Any], want: list[Any]) -> None:
    assert [each[:2] for each in got] == [each[:2] for each in want]
    for (_, _, mine), (_, _, other) in zip(got, want, strict=True):
        assert (mine is None) == (other is None)
        for a, b in zip(mine or (), other or (), strict=True):
            for token in list(b)[:2]:
                assert abs(a[token].logprob - b[token].logprob) < 1e-3


@pytest.mark.parametrize(("seed", "run_ahead"), [(2, 1), (6, 4)])
def test_replayed_steps_give_the_tokens_of_a_cpu(
    seed: int, run_ahead: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, preemptions = serve(folder, seed, run_ahead=0)
    assert preemptions  # rows are given up and taken again
    recorder = emulate(monkeypatch, graphs=True)
    got, _ = serve(folder, seed, run_ahead=run_ahead)
    check(got, want)
    assert recorder.num_recorded == 2 * len(padded_sizes(5)) and recorder.num_replays > 10


def test_without_graphs_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want, _ = serve(folder, 2, run_ahead=0)
    emulate(monkeypatch, graphs=False)
    check(serve(folder, 2, run_ahead=2)[0], want)


def test_deterministic_steps_are_replayed_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want, _ = serve(folder, 1, run_ahead=0)
    recorder = emulate(monkeypatch, graphs=True)
    check(serve(folder, 1, run_ahead=0, deterministic=True)[0], want)
    assert recorder.num_replays > 10


def test_sizes_are_close_together_where_steps_are_short() -> None:
    assert padded_sizes(1) == [1] and padded_sizes(5) == [1, 2, 4, 5] and padded_sizes(8) == [1, 2, 4, 8]
    sizes = padded_sizes(1000)
    assert sizes[:6] == [1, 2, 4, 8, 16, 24] and sizes[-3:] == [976, 992, 1000]
    assert sizes == sorted(set(sizes)) and {256, 272, 288} < set(sizes) and 264 not in sizes


def test_a_long_prefix_of_many_rows_is_worth_the_launches() -> None:
    def shared(members: int, length: int) -> SharedPrefixes:
        return SharedPrefixes(np.arange(members), np.array([0, members], np.int32), np.array([length], np.int32))

    assert not DecodeGraphs.is_worth_launching(shared(4, 256), 4096)
    assert DecodeGraphs.is_worth_launching(shared(64, 2048), 4096)
