"""A preemption leaves no trace in the output: what was swapped comes back bit for bit, what is computed again gives the
same tokens. And one small pool serves everything that is mixed, with a real model, to the last block."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from random_models import build_model
from transformers import LlamaConfig

from quire.cluster.llm import LLM, RequestOutput, SamplingParams

VOCAB = 199
MAX_MODEL_LEN = 64
BLOCK = 4
LEAST = MAX_MODEL_LEN // BLOCK
"""Blocks that the longest sequence takes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    build_model(config, path)
    return path


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[LLM]:
    defaults = dict(
        device="cpu", dtype="float32", max_model_len=MAX_MODEL_LEN, block_size=BLOCK, max_num_seqs=8,
        max_num_batched_tokens=32, num_gpu_blocks_override=600,
    )  # fmt: skip
    with LLM(str(folder), **defaults | settings) as llm:
        yield llm
        llm.scheduler.audit()
        memory = llm.scheduler.memory()
        assert memory.blocks_used == memory.swap_blocks_used == 0


def small(mode: str) -> dict[str, Any]:
    """A pool for one and a half of the longest sequences, and all of it again to swap to."""
    return dict(num_gpu_blocks_override=LEAST + LEAST // 2, preemption_mode=mode, swap_space=1.0)


def draw_requests(rng: random.Random, temperatures: list[float]) -> tuple[list[list[int]], list[SamplingParams]]:
    prompts, params = [], []
    for _ in range(rng.randint(3, 6)):
        length = rng.randint(1, 40)
        prompts.append([rng.randrange(1, VOCAB) for _ in range(length)])
        params.append(
            SamplingParams(
                n=rng.choice([1, 1, 1, 2, 3]), temperature=rng.choice(temperatures), seed=rng.randrange(1 << 30),
                max_tokens=rng.randint(4, min(20, MAX_MODEL_LEN - length)), logprobs=0,
            )
        )  # fmt: skip
    return prompts, params


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def logprobs(outputs: list[RequestOutput]) -> list[list[float | None]]:
    return [[sample.cumulative_logprob for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_bit_for_bit(folder: Path, mode: str) -> None:
    """With fixed order of sums, so that nothing else differs between the two pools."""
    sets = [draw_requests(random.Random(seed), [0.0, 1.0]) for seed in range(10)]
    with engine(folder, deterministic=True) as llm:
        expected = [llm.generate(*each, use_tqdm=False) for each in sets]
        assert not llm.scheduler.counters.num_preemptions
    with engine(folder, deterministic=True, **small(mode)) as llm:
        for each, wanted in zip(sets, expected, strict=True):
            found = llm.generate(*each, use_tqdm=False)
            assert tokens(found) == tokens(wanted) and logprobs(found) == logprobs(wanted)
        counters = llm.scheduler.counters
        swaps = counters.num_swap_preemptions
        assert swaps > 10 if mode == "swap" else counters.num_preemptions - swaps > 10


@pytest.mark.parametrize("ranks, count", [(1, 75), (2, 25)])
def test_two_hundred_random_schedules(folder: Path, ranks: int, count: int) -> None:
    """Half of them with each kind of preemption; token for token at temperature 0."""
    sets = [draw_requests(random.Random(1_000 * ranks + seed), [0.0]) for seed in range(count)]
    with engine(folder, tensor_parallel_size=ranks) as llm:
        expected = [tokens(llm.generate(*each, use_tqdm=False)) for each in sets]
    for mode in ("swap", "recompute"):
        with engine(folder, tensor_parallel_size=ranks, **small(mode)) as llm:
            for each, wanted in zip(sets, expected, strict=True):
                assert tokens(llm.generate(*each, use_tqdm=False)) == wanted
            assert llm.scheduler.counters.num_preemptions > count


def mixed_requests(rng: random.Random) -> tuple[list[list[int]], list[SamplingParams]]:
    """100: greedy ones, samples, beams, half of them behind one of two common beginnings."""
    stems = [[rng.randrange(3, 400) for _ in range(40)] for _ in range(2)]
    prompts, params = [], []
    for number in range(100):
        prompt = [rng.randrange(3, 400) for _ in range(rng.randint(1, 24))]
        prompts.append(rng.choice(stems) + prompt if number % 2 else prompt)
        kind = rng.choice(["greedy", "samples", "beams"])
        common = dict(max_tokens=rng.randint(4, 24), ignore_eos=rng.random() < 0.5)
        if kind == "greedy":
            params.append(SamplingParams(temperature=0, **common))  # type: ignore[arg-type]
        elif kind == "samples":
            params.append(SamplingParams(n=4, seed=number, **common))  # type: ignore[arg-type]
        else:
            params.append(SamplingParams(beam_width=4, n=2, **common))  # type: ignore[arg-type]
    return prompts, params


def test_a_hundred_mixed_requests_in_sixty_four_blocks() -> None:
    """The bundled model: answers as with a large pool, the use of memory adding up after every step."""
    prompts, params = mixed_requests(random.Random(5))
    common: dict[str, Any] = dict(device="cpu", dtype="float32", max_model_len=128, block_size=8, max_num_seqs=32)

    def texts(outputs: list[RequestOutput]) -> list[list[tuple[int, list[int], str]]]:
        return [[(sample.index, sample.token_ids, sample.text) for sample in each.outputs] for each in outputs]

    with LLM(**common, num_gpu_blocks_override=2_000) as llm:
        expected = texts(llm.generate(prompts, params, use_tqdm=False))
        assert not llm.scheduler.counters.num_preemptions
    with LLM(**common, num_gpu_blocks_override=64, swap_space=1.0) as llm:
        seen: list[int] = []
        step = llm._engine.step

        def audited() -> Any:
            events = step()
            llm.scheduler.audit()
            memory = llm.scheduler.memory()
            assert memory.blocks_free + memory.blocks_cached + memory.blocks_used == 64
            assert memory.slots_filled + memory.slots_reserved == 8 * memory.blocks_used
            seen.append(memory.slots_shared)
            return events

        llm._engine.step = audited  # type: ignore[method-assign]
        assert texts(llm.generate(prompts, params, use_tqdm=False)) == expected
        counters, memory = llm.scheduler.counters, llm.scheduler.memory()
        assert counters.num_preemptions > 5 and counters.prefix_hit_tokens > 500 and counters.copied_blocks > 50
        assert max(seen) > 100 and memory.blocks_used == memory.swap_blocks_used == memory.slots_shared == 0
