"""Decode steps replayed on a CPU: the same tokens as launched ones, in whatever mixture of steps."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import build_model
from transformers import LlamaConfig, OPTConfig, PretrainedConfig, Qwen3Config

from quire.cluster.llm import LLM, SamplingParams
from quire.kernels.cpu import blocked_linear, decode, program
from quire.worker.programs import DecodePrograms

BUGS = [
    ("inputs of the step before", "worker/programs.py", "        self._batch(size)\n        program", "        program",
     "test_replayed_steps_give_the_same_tokens"),
    ("the program of another size", "worker/programs.py", "program = self._recorded[size]",
     "program = self._recorded[max(self._recorded)]", "test_replayed_steps_give_the_same_tokens"),
    ("shared prefixes forgotten", "worker/programs.py", "        return True\n", "        return False\n",
     "test_shared_prefixes_are_read_once"),
    ("tried again and again", "worker/programs.py",
     "self._too_many = num_rows\n", "pass\n", "test_what_cannot_be_recorded_is_launched"),
]  # fmt: skip

SMALL = dict(
    vocab_size=192, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=768, eos_token_id=None, bos_token_id=None,
    pad_token_id=None,
)  # fmt: skip
MODELS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3 with a window": lambda: Qwen3Config(
        **SMALL, use_sliding_window=True, sliding_window=70, max_window_layers=1
    ),
}

pytestmark = pytest.mark.skipif(
    not blocked_linear.suits_processor(),
    reason="products in bfloat16 are not compiled loops on this processor",
)


def outputs(folder: Path, prompts: list[list[int]], params: list[SamplingParams], **options: object) -> list[list[int]]:
    llm = LLM(str(folder), dtype="bfloat16", num_gpu_blocks_override=160, max_num_seqs=8, **options)  # type: ignore[arg-type]
    try:
        found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in found]
    finally:
        llm.close()


def mixture(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of one token to more than a split's; short and long answers, greedy and not."""
    rng = random.Random(0)
    prompts = [[rng.randrange(192) for _ in range(rng.choice([1, 5, 40, 250, 300]))] for _ in range(count)]
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.9]), seed=seed, max_tokens=rng.randint(3, 60), ignore_eos=True
        )
        for seed in range(count)
    ]
    return prompts, params


@pytest.mark.parametrize("name", MODELS)
def test_replayed_steps_give_the_same_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model(MODELS[name](), tmp_path)
    sizes = []
    forward = DecodePrograms.forward

    def noted(self: DecodePrograms, size: int) -> torch.Tensor:
        sizes.append(size)
        return forward(self, size)

    monkeypatch.setattr(DecodePrograms, "forward", noted)
    prompts, params = mixture(24)
    want = outputs(tmp_path, prompts, params, enforce_eager=True)
    assert not sizes
    assert outputs(tmp_path, prompts, params) == want
    assert set(sizes) >= {1, 4, 8} and len(sizes) > 50
    assert outputs(tmp_path, prompts, params, run_ahead=1) == want


def test_shared_prefixes_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such steps are launched: their result is that of the form which reads the prefix once."""
    build_model(LlamaConfig(**SMALL), tmp_path)
    sizes = []
    monkeypatch.setattr(DecodePrograms, "padded", lambda self, size: sizes.append(size) or 0)
    rng = random.Random(1)
    common = [rng.randrange(192) for _ in range(400)]
    prompts = [[*common, rng.randrange(192), k] for k in range(6)]
    outputs(tmp_path, prompts[:1], [SamplingParams(max_tokens=4, ignore_eos=True)])
    assert sizes.count(1) >= 3
    sizes.clear()
    outputs(tmp_path, prompts, [SamplingParams(max_tokens=20, ignore_eos=True)] * 6)
    assert 6 not in sizes


def opt() -> PretrainedConfig:
    return OPTConfig(
        vocab_size=192, hidden_size=128, ffn_dim=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=128, eos_token_id=1,
    )  # fmt: skip


def test_what_cannot_be_recorded_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried once and given up."""
    build_model(opt(), tmp_path)
    tried, replayed = [], []
    record, padded = program.record, DecodePrograms.padded

    def noted(self: DecodePrograms, size: int) -> int:
        replayed.append(padded(self, size))
        return replayed[-1]

    monkeypatch.setattr(program, "record", lambda *given: tried.append(given) or record(*given))
    monkeypatch.setattr(DecodePrograms, "padded", noted)
    params = [SamplingParams(max_tokens=5, ignore_eos=True)] * 2
    assert [len(ids) for ids in outputs(tmp_path, [[3, 4], [5]], params)] == [5, 5]
    assert len(tried) == 1 and len(replayed) > 3 and not any(replayed)


def test_fewer_rows_are_recorded_where_more_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model(LlamaConfig(**SMALL), tmp_path)
    prompts, params = mixture(8)
    params = [replace(each, max_tokens=20 + 2 * i) for i, each in enumerate(params)]
    want = outputs(tmp_path, prompts, params, enforce_eager=True)
    padded, sizes = DecodePrograms.padded, {}

    def noted(self: DecodePrograms, size: int) -> int:
        sizes[size] = padded(self, size)
        return sizes[size]

    monkeypatch.setattr(DecodePrograms, "padded", noted)
    # Four rows of three splits and four heads, a state for each.
    monkeypatch.setattr(decode, "MOST_STATES", 4 * 3 * 4 * 4 * decode.state_size(32))
    assert outputs(tmp_path, prompts, params) == want
    assert sizes == {size: size if size <= 4 else 0 for size in range(1, 9)}
