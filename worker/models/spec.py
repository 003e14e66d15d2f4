"""What a model is: one frozen value that normalises every dialect of Hugging Face's config.json at the door.

Standard library only. Nothing behind this file looks at a config again: layers, weights, memory planning and error
messages all read `ModelSpec`. A key that is missing takes the default of its family, as it does in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

Json: TypeAlias = dict[str, Any]

DTYPES = ("float32", "float16", "bfloat16")
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
LARGEST = {"vocab_size": 1 << 24, "max_position_embeddings": 1 << 28, "num_hidden_layers": 1 << 12}
LARGEST_SIZE = 1 << 20


class ModelError(ValueError):
    """The model folder cannot be served; the message names the file, the field and the way out."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions. `kind` says which of the fields below `factor` are read."""

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder's structure, complete: two models with equal specs run the same code on tensors of equal shapes."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    """Longest context, as the scaling of rotary positions makes it."""
    dtype: str
    """Of the checkpoint: one of DTYPES."""
    eos_token_ids: tuple[int, ...]

    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_affine: bool
    """Norms have a weight (and, for layer norm, a bias)."""
    norm_first: bool
    """Norm before attention and MLP; otherwise after the residual sum."""
    final_norm: bool

    rope: Rope | None
    """None: learned positions."""
    position_offset: int
    """Rows of the learned table that come before position 0."""

    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over each head of q and k, before the rotation."""
    tied_head: bool
    embedding_size: int
    """Width of the embedding and of the head; unequal to hidden_size when projected in and out."""
    windows: tuple[int | None, ...]
    """Per layer: a query at p sees keys k with p - k < window; None sees all."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ModelSpec:
        folder = Path(folder)
        config = _Config(folder / "config.json", _read_config(folder))
        for key, advice in REFUSED.items():
            if config.raw.get(key):
                raise config.error(key, advice)
        architecture = _architecture(config)
        return FAMILIES[architecture](config, architecture, _eos_token_ids(config, folder))

    def check_parallel(self, tp: int) -> None:
        """Raises ModelError unless the model can be cut for `tp` ranks."""
        if tp < 1:
            raise ModelError(f"tensor_parallel_size is {tp}; give a positive number of ranks")
        if self._can_cut(tp):
            return
        sizes = [n for n in range(1, self.num_heads + 1) if self._can_cut(n)]
        raise ModelError(
            f"{self.architecture} with {self.num_heads} attention heads, {self.num_kv_heads} key-value heads and "
            f"intermediate size {self.intermediate_size} cannot be cut for tensor_parallel_size {tp}: the attention "
            "heads must divide by it, and it must divide the key-value heads or be a multiple of them. "
            f"Sizes that work: {', '.join(map(str, sizes))}"
        )

    def _can_cut(self, tp: int) -> bool:
        heads = self.num_heads % tp == 0
        kv_heads = self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0
        return heads and kv_heads and min(self.intermediate_size, self.vocab_size) >= tp


class _Config:
    """config.json with typed access; every error names the file and the field."""

    def __init__(self, path: Path, raw: Json) -> None:
        self.path = path
        self.raw = raw

    def error(self, field: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {field}: {problem}")

    def value(self, key: str, default: Any) -> Any:
        """An absent key takes the default; so does null, which transformers writes for "not set"."""
        value = self.raw.get(key)
        return default if value is None else value

    def size(self, key: str, default: int) -> int:
        value = self.value(key, default)
        limit = LARGEST.get(key, LARGEST_SIZE)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise self.error(key, f"expected a whole number from 1 to {limit}, found {value!r}; correct the config")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise self.error(key, f"expected a number that is not negative, found {value!r}; correct the config")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, found {value!r}; correct the config")
        return value

    def token_ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """None, an id or a list of ids; here null does mean none."""
        value = self.raw.get(key, default)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.error(key, f"expected a token id or a list of them, found {value!r}; correct the config")
        return ids


REFUSED = {
    "auto_map": "the model brings its own Python code, which is never run; use a model of a built-in architecture",
    "quantization_config": "quantized checkpoints are not supported; use the unquantized model",
}


def _read_config(folder: Path) -> Json:
    if not folder.exists():
        raise ModelError(f"{folder}: no such folder; give the path of a model that has been downloaded")
    if not folder.is_dir():
        raise ModelError(f"{folder}: not a folder; give the folder that holds config.json")
    config = _read_json(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder / 'config.json'}: missing; give the folder of a model saved by save_pretrained")
    return config


def _read_json(path: Path) -> Json | None:
    """The object in `path`; None if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}; download the file again")
    return value


def _architecture(config: _Config) -> str:
    names = config.value("architectures", [])
    known = ", ".join(sorted(FAMILIES))
    if not isinstance(names, list) or not names:
        raise config.error("architectures", f"missing or empty; name one of {known}")
    for name in names:
        if name in FAMILIES:
            return str(name)
    raise config.error("architectures", f"{', '.join(map(str, names))} is not supported; known: {known}")


def _eos_token_ids(config: _Config, folder: Path) -> Callable[[int | None], tuple[int, ...]]:
    """generation_config.json wins, as in transformers' generate; it lists the ends of turns that config.json lacks."""
    path = folder / "generation_config.json"
    generation = _Config(path, _read_json(path) or {})
    ids = generation.token_ids("eos_token_id", None)
    return lambda default: ids or config.token_ids("eos_token_id", default)


def _common(config: _Config, architecture: str) -> Json:
    """The fields that every family reads alike, but for names and defaults."""
    dtype = str(config.value("dtype", config.value("torch_dtype", "float32"))).removeprefix("torch.")
    if dtype not in DTYPES:
        raise config.error("dtype", f"{dtype} is not supported; convert the model to one of {', '.join(DTYPES)}")
    return {"architecture": architecture, "dtype": dtype}


def _activation(config: _Config, key: str, default: str) -> str:
    name = config.value(key, default)
    if name not in ACTIVATIONS:
        raise config.error(key, f"activation {name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _gate(config: _Config) -> str:
    name = _activation(config, "hidden_act", "silu")
    if name != "silu":
        raise config.error("hidden_act", f"a gated MLP with {name!r} is not supported; known: silu, swish")
    return name


def _head_dim(config: _Config, hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise config.error(
            "num_attention_heads", f"{num_heads} heads do not divide hidden_size {hidden_size}; correct the config"
        )
    return hidden_size // num_heads


# -- Llama and its descendants: RMSNorm first, rotary positions, gated MLP --------------------------------------------

LLAMA: Json = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as attention heads
    "head_dim": None,  # hidden_size / attention heads
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}
MISTRAL: Json = LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN2: Json = LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "eos_token_id": None,
}
QWEN3: Json = QWEN2 | {"head_dim": 128}

EosTokenIds: TypeAlias = Callable[[int | None], tuple[int, ...]]


def _llama(config: _Config, architecture: str, eos: EosTokenIds) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return _rotary_decoder(
        config, architecture, eos, LLAMA, qkv_bias=bias, out_bias=bias, mlp_bias=config.flag("mlp_bias", False)
    )


def _mistral(config: _Config, architecture: str, eos: EosTokenIds) -> ModelSpec:
    # Absent means the family's 4096; null means none.
    window = config.size("sliding_window", 4096) if config.raw.get("sliding_window", 4096) else None
    layers = config.size("num_hidden_layers", MISTRAL["num_hidden_layers"])
    return _rotary_decoder(config, architecture, eos, MISTRAL, windows=(window,) * layers)


def _qwen2(config: _Config, architecture: str, eos: EosTokenIds) -> ModelSpec:
    return _rotary_decoder(config, architecture, eos, QWEN2, qkv_bias=True, windows=_qwen_windows(config))


def _qwen3(config: _Config, architecture: str, eos: EosTokenIds) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    windows = _qwen_windows(config)
    return _rotary_decoder(
        config, architecture, eos, QWEN3, qkv_bias=bias, out_bias=bias, qk_norm=True, windows=windows
    )


def _rotary_decoder(
    config: _Config, architecture: str, eos: EosTokenIds, family: Json, **differences: Any
) -> ModelSpec:
    hidden_size = config.size("hidden_size", family["hidden_size"])
    num_layers = config.size("num_hidden_layers", family["num_hidden_layers"])
    num_heads = config.size("num_attention_heads", family["num_attention_heads"])
    num_kv_heads = config.size("num_key_value_heads", family["num_key_value_heads"] or num_heads)
    if num_heads % num_kv_heads:
        raise config.error(
            "num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}; correct the config"
        )
    has_head_dim = config.value("head_dim", family["head_dim"]) is not None
    head_dim = family["head_dim"] if has_head_dim else _head_dim(config, hidden_size, num_heads)
    head_dim = config.size("head_dim", head_dim)
    if head_dim % 2:
        raise config.error("head_dim", f"rotary positions need an even head size, found {head_dim}; correct the config")
    rope, max_positions = _rope(config, config.size("max_position_embeddings", family["max_position_embeddings"]))
    fields: Json = {
        "vocab_size": config.size("vocab_size", family["vocab_size"]),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": config.size("intermediate_size", family["intermediate_size"]),
        "max_position_embeddings": max_positions,
        "eos_token_ids": eos(family["eos_token_id"]),
        "norm": "rms",
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "norm_affine": True,
        "norm_first": True,
        "final_norm": True,
        "rope": rope,
        "position_offset": 0,
        "activation": _gate(config),
        "gated": True,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "tied_head": config.flag("tie_word_embeddings", False),
        "embedding_size": hidden_size,
        "windows": (None,) * num_layers,
    }
    return ModelSpec(**(_common(config, architecture) | fields | differences))


def _qwen_windows(config: _Config) -> tuple[int | None, ...]:
    layers = config.size("num_hidden_layers", QWEN2["num_hidden_layers"])
    if not config.flag("use_sliding_window", False):
        return (None,) * layers
    # Absent means the family's 4096; null means none.
    window = config.size("sliding_window", 4096) if config.raw.get("sliding_window", 4096) else None
    kinds = config.raw.get("layer_types")
    if kinds is None:
        # Windows may begin at layer 0, so this one number may be zero.
        first = int(config.number("max_window_layers", 28))
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise config.error("layer_types", f"expected a list of {layers} kinds, one per layer; correct the config")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise config.error("layer_types", f"{kind!r} is not supported; known: sliding_attention, full_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: _Config, max_positions: int) -> tuple[Rope, int]:
    """Rotary positions, and the longest context with them: `max_positions`, or what linear and yarn stretch the
    original length to. transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and, when scaled,
    `rope_scaling`."""
    key = "rope_parameters" if config.raw.get("rope_parameters") else "rope_scaling"
    raw = config.value(key, {})
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise config.error(key, "expected one set of parameters for all layers; other forms are not supported")
    rope = _Config(config.path, raw)
    kind = rope.value("rope_type", rope.value("type", "default"))
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    if rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1.0:
        raise config.error("partial_rotary_factor", "turning a part of each head is not supported; use another model")
    if theta <= 0:
        raise config.error("rope_theta", f"expected a positive number, found {theta}; correct the config")
    if kind == "default":
        return Rope(theta), max_positions
    if kind not in ("linear", "llama3", "yarn"):
        raise config.error(
            f"{key}.rope_type",
            f"{kind!r} is not supported; known: default, linear, llama3, yarn. Remove the scaling to serve the model "
            "at its original length",
        )
    factor = rope.number("factor", 0.0)
    if factor < 1.0:
        raise config.error(f"{key}.factor", f"expected a number of at least 1, found {raw.get('factor')!r}")
    original = config.raw.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    scaled = _Config(config.path, {"original_max_position_embeddings": original})
    length = scaled.size("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor", 0.0), rope.number("high_freq_factor", 0.0)
        if not 0 < low < high:
            raise config.error(f"{key}.low_freq_factor", f"expected 0 < low < high_freq_factor, found {low} and {high}")
        return Rope(theta, "llama3", factor, length, low, high), max_positions
    # Configs are published with the length before scaling (Qwen's instructions add the scaling alone) and after it.
    longest = max(max_positions, int(min(length * factor, LARGEST["max_position_embeddings"])))
    if kind == "linear":
        return Rope(theta, "linear", factor), longest

    def optional(name: str) -> float | None:
        return rope.number(name, 0.0) or None

    yarn = Rope(
        theta,
        "yarn",
        factor,
        length,
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )
    return yarn, longest


# -- OPT: layer norm, learned positions, plain MLP ---------------------------------------------------------------------


def _opt(config: _Config, architecture: str, eos: EosTokenIds) -> ModelSpec:
    hidden_size = config.size("hidden_size", 768)
    num_heads = config.size("num_attention_heads", 12)
    num_layers = config.size("num_hidden_layers", 12)
    bias = config.flag("enable_bias", True)
    norm_first = config.flag("do_layer_norm_before", True)
    return ModelSpec(
        **_common(config, architecture),
        vocab_size=config.size("vocab_size", 50272),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=_head_dim(config, hidden_size, num_heads),
        intermediate_size=config.size("ffn_dim", 3072),
        max_position_embeddings=config.size("max_position_embeddings", 2048),
        eos_token_ids=eos(2),
        norm="layer",
        norm_eps=1e-5,
        norm_affine=config.flag("layer_norm_elementwise_affine", True),
        norm_first=norm_first,
        final_norm=norm_first and not config.flag("_remove_final_layer_norm", False),
        rope=None,
        position_offset=2,
        activation=_activation(config, "activation_function", "relu"),  # type: ignore[arg-type]
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        qk_norm=False,
        tied_head=config.flag("tie_word_embeddings", True),
        embedding_size=config.size("word_embed_proj_dim", hidden_size),
        windows=(None,) * num_layers,
    )


FAMILIES: dict[str, Callable[[_Config, str, EosTokenIds], ModelSpec]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "OPTForCausalLM": _opt,
}
