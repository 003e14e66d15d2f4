"""The one decoder against transformers, family by family, in float32."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from stepper import Stepper
from transformers import (
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from quire.worker.config import WorkerConfig
from quire.worker.models.decoder import Decoder
from quire.worker.models.spec import ModelSpec
from quire.worker.parallel import TensorParallel
from quire.worker.weights import load_model

MakeModel = Callable[[PretrainedConfig], tuple[Path, PreTrainedModel]]

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
OPT: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "ffn_dim": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "dropout": 0.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-gqa": lambda: LlamaConfig(**SMALL),
    "llama-mha-tied": lambda: LlamaConfig(**SMALL | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa-biases": lambda: LlamaConfig(
        **SMALL | {"num_key_value_heads": 1}, attention_bias=True, mlp_bias=True, head_dim=24
    ),
    "llama3-rope": lambda: LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama-linear-rope": lambda: LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    ),
    "llama-yarn-rope": lambda: LlamaConfig(**SMALL, rope_parameters=YARN),
    "mistral-window": lambda: MistralConfig(**SMALL, sliding_window=13),
    "mistral-no-window": lambda: MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-windows": lambda: Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32),
    "qwen3-biases-tied": lambda: Qwen3Config(
        **SMALL | {"num_key_value_heads": 4}, head_dim=16, attention_bias=True, tie_word_embeddings=True
    ),
    "qwen3-layer-types": lambda: Qwen3Config(
        **SMALL,
        head_dim=32,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "opt": lambda: OPTConfig(**OPT),
    "opt-post-norm-projected": lambda: OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=40),
    "opt-gelu-untied-plain": lambda: OPTConfig(
        **OPT,
        activation_function="gelu",
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        tie_word_embeddings=False,
    ),
    "opt-no-final-norm": lambda: OPTConfig(**OPT, _remove_final_layer_norm=True),
}


def load(folder: Path, **settings: Any) -> Decoder:
    config = WorkerConfig(model=str(folder), **settings)
    return load_model(config, ModelSpec.from_pretrained(folder), TensorParallel.single())


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), -1)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, 199, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def expected(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    return log_probs(model(torch.tensor([tokens])).logits[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, make_model: MakeModel) -> None:
    folder, reference = make_model(CONFIGS[name]())
    model = load(folder)
    long, short = prompt(75, 1), prompt(23, 2)
    want_long, want_short = expected(reference, long), expected(reference, short)
    assert want_long.std() > 0.5, "the reference is too flat to compare with"
    for block_size in (8, 16, 32):
        stepper = Stepper(model, block_size)
        got_long, got_short = [], []
        # Chunks of awkward sizes; from the second step on in one batch with a sequence that decodes.
        cuts = [0, 1, 18, 19, 50, 75]
        at = 0
        for start, stop in pairwise(cuts):
            new = {0: long[start:stop]}
            size = 19 if at == 0 else 1
            new[1] = short[at : at + size]
            logits = log_probs(stepper.step(new, sample="all"))
            got_long.append(logits[: stop - start])
            got_short.append(logits[stop - start :])
            at += size
        torch.testing.assert_close(torch.cat(got_long), want_long, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.cat(got_short), want_short[:at], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama-mha-tied", "qwen3", "opt-post-norm-projected"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(name: str, dtype: str, make_model: MakeModel) -> None:
    folder, reference = make_model(CONFIGS[name]())
    tokens = prompt(40, 3)
    stepper = Stepper(load(folder, dtype=dtype))
    steps = [tokens[:30], *([token] for token in tokens[30:])]
    got = torch.cat([stepper.step({0: step}, sample="all") for step in steps])
    assert got.dtype == torch.float32
    # Measured against transformers in the same type: the order of roundings differs, their size does not.
    with torch.no_grad():
        half = reference.to(getattr(torch, dtype))(torch.tensor([tokens])).logits[0]
        want = reference.float()(torch.tensor([tokens])).logits[0]
    assert (log_probs(got) - log_probs(want)).abs().mean() < 2 * (log_probs(half) - log_probs(want)).abs().mean() + 1e-3


def test_only_the_sampling_tokens_come_back(make_model: MakeModel) -> None:
    folder, _ = make_model(CONFIGS["llama-gqa"]())
    model = load(folder)
    every = Stepper(model).step({0: prompt(20, 1), 1: prompt(9, 2)}, sample="all")
    last = Stepper(model).step({0: prompt(20, 1), 1: prompt(9, 2)})
    torch.testing.assert_close(last, every[[19, 28]])


def test_a_step_in_which_nothing_samples(make_model: MakeModel) -> None:
    folder, _ = make_model(CONFIGS["llama-gqa"]())
    model, tokens = load(folder), prompt(20, 1)
    stepper = Stepper(model)
    assert stepper.step({0: tokens[:12]}, sample="none").shape == (0, 199)
    torch.testing.assert_close(stepper.step({0: tokens[12:]}), Stepper(model).step({0: tokens}))


def test_a_shorter_rotary_table_changes_nothing(make_model: MakeModel) -> None:
    folder, _ = make_model(CONFIGS["llama3-rope"]())
    short, long = load(folder, max_model_len=32), load(folder, max_model_len=10**6)
    assert short.cos_sin is not None and len(short.cos_sin) == 32
    assert long.cos_sin is not None and len(long.cos_sin) == 256
    assert torch.equal(Stepper(short).step({0: prompt(32, 1)}), Stepper(long).step({0: prompt(32, 1)}))
