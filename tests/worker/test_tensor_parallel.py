"""Two and four ranks compute what one computes: cut heads, repeated key-value heads, uneven shares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensor_parallel_rank
import torch
from tensor_parallel_rank import compute
from transformers import LlamaConfig, OPTConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from quire.worker.parallel import TensorParallel

SMALL: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "divisible": LlamaConfig(**SMALL),
    "one key-value head": Qwen2Config(**SMALL | {"num_key_value_heads": 1}),
    "uneven": Qwen3Config(**SMALL | {"vocab_size": 151, "intermediate_size": 77}, head_dim=8, tie_word_embeddings=True),
    "biases": LlamaConfig(**SMALL | {"vocab_size": 163}, attention_bias=True, mlp_bias=True),
    "projected": OPTConfig(
        vocab_size=155, hidden_size=64, ffn_dim=90, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=24,
        do_layer_norm_before=False, max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, build_model: Any) -> list[str]:
    folders = []
    for config in CONFIGS.values():
        folders.append(str(tmp_path_factory.mktemp("model")))
        build_model(config, folders[-1])
    return [*folders, f"dummy:{folders[2]}"]


@pytest.fixture(scope="module")
def single(models: list[str]) -> list[torch.Tensor]:
    return [compute(model, TensorParallel.single()) for model in models]


@pytest.mark.parametrize(("size", "count"), [(2, 6), (4, 2)])
def test_ranks_compute_what_one_computes(
    size: int, count: int, models: list[str], single: list[torch.Tensor], tmp_path: Path
) -> None:
    script = tensor_parallel_rank.__file__
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                script,
                str(rank),
                str(size),
                str(tmp_path / "rendezvous"),
                str(tmp_path),
                *models[:count],
            ],
            env=environment,
        )
        for rank in range(size)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank in range(size):
        got = torch.load(tmp_path / f"{size}-{rank}.pt")
        assert len(got) == count
        for name, have, want in zip([*CONFIGS, "dummy"], got, single, strict=False):
            assert have.shape == want.shape, name
            assert want.std() > 0.01, name
            torch.testing.assert_close(have, want, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_one_rank_needs_no_group() -> None:
    tp = TensorParallel.start(0, 1, "unused", "cpu")
    x = torch.ones(2, 3)
    assert tp.all_reduce(x) is x and tp.all_gather(x, -1) is x
    assert tp.split(7) == (0, 7)
    tp.close()
