"""Model shapes to measure with where no weights are at hand: a config.json each, for random-normal weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Sizes:
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True
    """The MLP has a gate."""


_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, head_dim: int | None = None, **other: Any
) -> dict[str, Any]:
    return {
        **_LLAMA,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        **other,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "m30": _llama(384, 1024, 8, 6, 6, 8192),
    "m160": _llama(768, 2048, 12, 12, 12, 32000),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, rope_theta=500000.0, max_position_embeddings=131072),
    "llama-3.1-8b": _llama(
        4096, 14336, 32, 32, 8, 128256, rope_theta=500000.0, max_position_embeddings=131072, tie_word_embeddings=False
    ),
    "qwen3-0.6b": _llama(
        1024, 3072, 28, 16, 8, 151936, head_dim=128, rope_theta=1000000.0, max_position_embeddings=40960,
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", rms_norm_eps=1e-6,
    ),
    "qwen3-8b": _llama(
        4096, 12288, 36, 32, 8, 151936, head_dim=128, rope_theta=1000000.0, max_position_embeddings=40960,
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "opt-13b": {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 5120, "ffn_dim": 20480,
        "num_hidden_layers": 40, "num_attention_heads": 40, "vocab_size": 50272, "max_position_embeddings": 2048,
        "word_embed_proj_dim": 5120, "do_layer_norm_before": True, "activation_function": "relu", "dtype": "float16",
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
    },
}  # fmt: skip


def config(name: str) -> dict[str, Any]:
    """Of one of this file's shapes, or of a model's folder."""
    if name in SHAPES:
        return SHAPES[name]
    found: dict[str, Any] = json.loads((Path(name) / "config.json").read_text())
    return found


def sizes(name: str) -> Sizes:
    """What kernels see of that shape, or of that folder's model."""
    found = config(name)
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    return Sizes(
        layers=found["num_hidden_layers"],
        hidden=hidden,
        mlp=found.get("intermediate_size") or found["ffn_dim"],
        heads=heads,
        kv_heads=found.get("num_key_value_heads", heads),
        head_dim=found.get("head_dim", hidden // heads),
        vocab=found["vocab_size"],
        gated="ffn_dim" not in found,
    )


def linears(name: str) -> dict[str, tuple[int, int]]:
    """[out, in] of the weights of a layer, as they are multiplied: fused."""
    s = sizes(name)
    return {
        "qkv": ((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden),
        "out": (s.hidden, s.heads * s.head_dim),
        "gate_up": ((1 + s.gated) * s.mlp, s.hidden),
        "down": (s.hidden, s.mlp),
    }


def write(name: str, folder: Path) -> Path:
    """A model folder of that shape, without weights: serve it with load_format="dummy"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name], indent=1))
    return folder
