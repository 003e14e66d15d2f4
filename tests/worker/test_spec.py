"""Reading config.json: each family and dialect, and every refusal with its way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, OPTConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from quire.worker.models.spec import ModelError, ModelSpec, Rope

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelSpec.from_pretrained(folder)


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(), MistralConfig(), Qwen2Config(), Qwen3Config(), OPTConfig()],
    ids=lambda config: config.model_type,
)
def test_missing_keys_take_the_familys_defaults(tmp_path: Path, config: PretrainedConfig) -> None:
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "opt": "OPT"}
    spec = read(tmp_path, {"architectures": [f"{name[config.model_type]}ForCausalLM"]})
    assert spec.vocab_size == config.vocab_size
    assert spec.hidden_size == config.hidden_size
    assert spec.num_layers == config.num_hidden_layers
    assert spec.num_heads == config.num_attention_heads
    assert spec.num_kv_heads == getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert spec.head_dim == getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    assert spec.intermediate_size == getattr(config, "intermediate_size", None) or config.ffn_dim
    assert spec.max_position_embeddings == config.max_position_embeddings
    assert spec.eos_token_ids == (() if config.eos_token_id is None else (config.eos_token_id,))
    assert spec.tied_head == config.tie_word_embeddings
    window = getattr(config, "sliding_window", None)
    assert spec.windows == (window,) * config.num_hidden_layers
    assert (spec.rope.theta if spec.rope else None) == (10000.0 if config.model_type != "opt" else None)


@pytest.mark.parametrize(
    "dialect",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "torch_dtype": "bfloat16"},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}, "torch_dtype": "torch.bfloat16"},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}, "dtype": "bfloat16"},
    ],
    ids=["transformers 4", "older", "transformers 5"],
)
def test_dialects_of_rope_and_dtype(tmp_path: Path, dialect: dict[str, Any]) -> None:
    spec = read(tmp_path, TINY | dialect)
    assert spec.rope == Rope(5e5, "llama3", 8.0, 8192, 1.0, 4.0)
    assert spec.dtype == "bfloat16"


def test_plain_rope_and_null_scaling(tmp_path: Path) -> None:
    assert read(tmp_path, TINY | {"rope_theta": 1e6, "rope_scaling": None}).rope == Rope(1e6)


def test_yarn(tmp_path: Path) -> None:
    raw = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 16}
    assert read(tmp_path, TINY | {"rope_scaling": raw}).rope == Rope(10000.0, "yarn", 4.0, 32768, beta_fast=16.0)


@pytest.mark.parametrize(
    ("positions", "scaling", "longest"),
    [
        (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # Qwen2.5's
        (40960, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # Qwen3's
        (131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (163840, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 163840),
        (4096, {"rope_type": "yarn", "factor": 2.5}, 10240),
        (4096, {"type": "linear", "factor": 2.0}, 8192),
        (8192, {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 4096}, 8192),
        (131072, {"rope_type": "llama3", **LLAMA3}, 131072),
        (4096, {"rope_type": "yarn", "factor": 1e300}, 1 << 28),
    ],
)
def test_the_longest_context_is_that_after_scaling(
    tmp_path: Path, positions: int, scaling: dict[str, Any], longest: int
) -> None:
    spec = read(tmp_path, TINY | {"max_position_embeddings": positions, "rope_scaling": scaling})
    assert spec.max_position_embeddings == longest


def test_end_tokens(tmp_path: Path) -> None:
    assert read(tmp_path, TINY | {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert read(tmp_path, TINY | {"eos_token_id": None}).eos_token_ids == ()
    assert read(tmp_path, TINY | {"eos_token_id": 5}, {"eos_token_id": [7, 5]}).eos_token_ids == (7, 5)
    assert read(tmp_path, TINY | {"eos_token_id": 5}, {"temperature": 0.6}).eos_token_ids == (5,)


def test_windows(tmp_path: Path) -> None:
    qwen = TINY | {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4, "sliding_window": 8}
    on = qwen | {"use_sliding_window": True}
    full, window = "full_attention", "sliding_attention"
    assert read(tmp_path, qwen).windows == (None,) * 4
    assert read(tmp_path, on | {"max_window_layers": 1}).windows == (None, 8, 8, 8)
    assert read(tmp_path, on | {"max_window_layers": 0}).windows == (8,) * 4
    assert read(tmp_path, on | {"layer_types": [full, window, full, window]}).windows == (None, 8, None, 8)
    mistral = TINY | {"architectures": ["MistralForCausalLM"]}
    assert read(tmp_path, mistral | {"sliding_window": None}).windows == (None, None)
    assert read(tmp_path, mistral | {"sliding_window": 7}).windows == (7, 7)


def test_opt(tmp_path: Path) -> None:
    small = {
        "architectures": ["OPTForCausalLM"], "hidden_size": 32, "num_attention_heads": 4, "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    }  # fmt: skip
    spec = read(tmp_path, small)
    assert (spec.norm_first, spec.final_norm, spec.embedding_size, spec.position_offset) == (False, False, 16, 2)
    assert spec.rope is None and spec.tied_head and spec.qkv_bias and not spec.gated


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["BertModel"]}, "architectures.*BertModel.*LlamaForCausalLM.*OPTForCausalLM"),
    "no architecture": ({"architectures": []}, "architectures.*LlamaForCausalLM"),
    "custom code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map.*never run"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config.*unquantized"),
    "dynamic rope": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        r"rope_scaling.rope_type.*'dynamic'.*llama3",
    ),
    "unknown rope": ({"rope_parameters": {"rope_type": "spiral"}}, "rope_parameters.rope_type.*'spiral'"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
    "llama3 factors": ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "rope_scaling.low_freq_factor"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "negative": ({"hidden_size": -1}, "hidden_size.*-1"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers.*0"),
    "absurd": ({"vocab_size": 10**12}, "vocab_size"),
    "not a number": ({"hidden_size": "big"}, "hidden_size.*'big'"),
    "a truth value": ({"hidden_size": True}, "hidden_size.*True"),
    "not a truth value": ({"tie_word_embeddings": "no"}, "tie_word_embeddings.*'no'"),
    "odd head": ({"head_dim": 7}, "head_dim.*7"),
    "heads": ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads.*5.*32"),
    "kv heads": ({"num_key_value_heads": 3}, "num_key_value_heads.*3.*4"),
    "activation": ({"hidden_act": "swiglu"}, "hidden_act.*'swiglu'.*silu"),
    "gated without a kernel": ({"hidden_act": "relu"}, "hidden_act.*'relu'.*silu"),
    "dtype": ({"dtype": "int8"}, "dtype.*int8.*bfloat16"),
    "end token": ({"eos_token_id": "</s>"}, "eos_token_id.*'</s>'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_file_and_the_field(tmp_path: Path, name: str) -> None:
    change, pattern = REFUSALS[name]
    with pytest.raises(ModelError, match=f"config.json: {pattern}"):
        read(tmp_path, TINY | change)


def test_layer_types_must_fit(tmp_path: Path) -> None:
    qwen = TINY | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
    with pytest.raises(ModelError, match=r"layer_types.*2 kinds"):
        read(tmp_path, qwen | {"layer_types": ["full_attention"]})
    with pytest.raises(ModelError, match=r"layer_types.*'chunked'"):
        read(tmp_path, qwen | {"layer_types": ["full_attention", "chunked"]})


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        ModelSpec.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config.json: missing"):
        ModelSpec.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match=r"config.json: cannot be read as JSON"):
        ModelSpec.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a folder"):
        ModelSpec.from_pretrained(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"),
    [(8, 2, {1, 2, 4, 8}), (12, 4, {1, 2, 4, 12}), (12, 3, {1, 3, 6, 12}), (7, 1, {1, 7})],
)
def test_parallel_sizes(tmp_path: Path, heads: int, kv_heads: int, sizes: set[int]) -> None:
    spec = read(tmp_path, TINY | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8})
    for tp in range(1, 14):
        if tp in sizes:
            spec.check_parallel(tp)
        else:
            with pytest.raises(ModelError, match=f"size {tp}.*Sizes that work: {', '.join(map(str, sorted(sizes)))}"):
                spec.check_parallel(tp)
    with pytest.raises(ModelError, match="positive"):
        spec.check_parallel(0)
