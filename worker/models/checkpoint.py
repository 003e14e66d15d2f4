"""What a checkpoint of a model must contain, how each tensor is cut for the ranks, and what the files really contain.

Standard library only. `tensors(spec)` is the one table: loading, memory planning and validation read it and nothing
else. `open_checkpoint` compares the table with the headers of the files, strictly in both directions, before a byte
of weights is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from math import prod
from pathlib import Path

from quire.worker.models.spec import ModelError, ModelSpec

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
FILE_DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
"""Element types of a safetensors file that can be cast on loading, and their bytes."""
HEAD = "lm_head.weight"
HEADER_LIMIT = 100_000_000
"""The safetensors format's own limit."""


class Cut(Enum):
    """How a tensor is divided among ranks."""

    REPLICATED = "replicated"
    VOCABULARY = "vocabulary"  # dimension 0, by token id
    ROWS = "rows"  # dimension 0: a part of the outputs
    COLUMNS = "columns"  # dimension 1: a part of the inputs
    HEADS = "heads"  # dimension 0, by query head
    KV_HEADS = "kv_heads"  # dimension 0, by key-value head; repeated where ranks outnumber heads
    HEAD_COLUMNS = "head_columns"  # dimension 1, by query head


class Group(Enum):
    """Where a tensor's bytes are counted."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    NORMS = "norms"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the checkpoint and the parameter of the decoder that it fills, or fills in part."""

    name: str
    shape: tuple[int, ...]
    cut: Cut
    group: Group
    parameter: str
    """Name in the decoder's state."""
    part: str = ""
    """"q", "k", "v", "gate" or "up": the section of a fused parameter; "" is the whole."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor of the table lies, and under which name."""

    file: Path
    name: str


def share(n: int, rank: int, size: int) -> tuple[int, int]:
    """The rank's range of n items: equal where that is possible, else in multiples of 16 (aligned rows for the matrix
    units) where there are enough of them."""
    unit = 1 if n % size == 0 or n < 16 * size else 16
    units = -(-n // unit)
    return units * rank // size * unit, min(n, units * (rank + 1) // size * unit)


def kv_head_share(num_kv_heads: int, rank: int, size: int) -> tuple[int, int]:
    """The rank's range of key-value heads: a part of them, or the one that its query heads read."""
    if num_kv_heads >= size:
        return share(num_kv_heads, rank, size)
    head = rank * num_kv_heads // size
    return head, head + 1


def bounds(tensor: TensorSpec, spec: ModelSpec, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """The rank's (start, stop) in each dimension."""
    full = [(0, n) for n in tensor.shape]
    if size == 1 or tensor.cut is Cut.REPLICATED:
        return tuple(full)
    dimension = 1 if tensor.cut in (Cut.COLUMNS, Cut.HEAD_COLUMNS) else 0
    if tensor.cut in (Cut.HEADS, Cut.HEAD_COLUMNS):
        start, stop = (head * spec.head_dim for head in share(spec.num_heads, rank, size))
    elif tensor.cut is Cut.KV_HEADS:
        start, stop = (head * spec.head_dim for head in kv_head_share(spec.num_kv_heads, rank, size))
    else:
        start, stop = share(tensor.shape[dimension], rank, size)
    full[dimension] = (start, stop)
    return tuple(full)


def local_shape(tensor: TensorSpec, spec: ModelSpec, rank: int, size: int) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds(tensor, spec, rank, size))


def bytes_by_group(spec: ModelSpec, dtype: str, rank: int = 0, size: int = 1, packed: bool = False) -> dict[Group, int]:
    """Bytes of one rank's weights; a tied head counts as embedding. `packed`: weights are laid out for fast products,
    and a tied head is then a copy of the embedding, which stays as it is."""
    total = dict.fromkeys(Group, 0)
    if packed and spec.tied_head:
        start, stop = share(spec.vocab_size, rank, size)
        total[Group.HEAD] = (stop - start) * spec.embedding_size * DTYPE_BYTES[dtype]
    for tensor in tensors(spec):
        total[tensor.group] += prod(local_shape(tensor, spec, rank, size)) * DTYPE_BYTES[dtype]
    return total


# -- The table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Names:
    """A family's names for the parts of a layer."""

    root: str
    attention_out: str
    attention_norm: str
    mlp_norm: str
    up: str
    down: str
    final_norm: str


LLAMA_NAMES = _Names(
    root="model.",
    attention_out="self_attn.o_proj",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    up="mlp.up_proj",
    down="mlp.down_proj",
    final_norm="norm",
)
OPT_NAMES = _Names(
    root="model.decoder.",
    attention_out="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    up="fc1",
    down="fc2",
    final_norm="final_layer_norm",
)


def tensors(spec: ModelSpec) -> list[TensorSpec]:
    """Every tensor of a checkpoint, in the order in which the model uses them."""
    names = OPT_NAMES if spec.architecture == "OPTForCausalLM" else LLAMA_NAMES
    table = list(_embedding(spec, names))
    for index in range(spec.num_layers):
        table += _layer(spec, names, f"{names.root}layers.{index}.", f"layers.{index}.")
    table += _head(spec, names)
    return table


def _embedding(spec: ModelSpec, names: _Names) -> Iterator[TensorSpec]:
    width, hidden = spec.embedding_size, spec.hidden_size
    yield TensorSpec(
        name=f"{names.root}embed_tokens.weight",
        shape=(spec.vocab_size, width),
        cut=Cut.VOCABULARY,
        group=Group.EMBEDDING,
        parameter="embedding.weight",
    )
    if spec.rope is None:
        rows = spec.max_position_embeddings + spec.position_offset
        name = f"{names.root}embed_positions.weight"
        yield TensorSpec(name, (rows, hidden), Cut.REPLICATED, Group.EMBEDDING, "positions.weight")
    if width != hidden:
        name = f"{names.root}project_in.weight"
        yield TensorSpec(name, (hidden, width), Cut.REPLICATED, Group.EMBEDDING, "project_in.weight")


def _layer(spec: ModelSpec, names: _Names, source: str, target: str) -> Iterator[TensorSpec]:
    hidden, attention = spec.hidden_size, Group.ATTENTION
    query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    yield from _norm(spec, f"{source}{names.attention_norm}", f"{target}attention_norm")
    for part, size, cut in (("q", query_size, Cut.HEADS), ("k", kv_size, Cut.KV_HEADS), ("v", kv_size, Cut.KV_HEADS)):
        name, parameter = f"{source}self_attn.{part}_proj", f"{target}attention.qkv"
        yield TensorSpec(f"{name}.weight", (size, hidden), cut, attention, f"{parameter}.weight", part)
        if spec.qkv_bias:
            yield TensorSpec(f"{name}.bias", (size,), cut, attention, f"{parameter}.bias", part)
    if spec.qk_norm:
        for part in ("q", "k"):
            name, parameter = f"{source}self_attn.{part}_norm.weight", f"{target}attention.{part}_norm.weight"
            yield TensorSpec(name, (spec.head_dim,), Cut.REPLICATED, Group.NORMS, parameter)
    name, parameter = f"{source}{names.attention_out}", f"{target}attention.out"
    yield TensorSpec(f"{name}.weight", (hidden, query_size), Cut.HEAD_COLUMNS, attention, f"{parameter}.weight")
    if spec.out_bias:
        yield TensorSpec(f"{name}.bias", (hidden,), Cut.REPLICATED, attention, f"{parameter}.bias")

    yield from _norm(spec, f"{source}{names.mlp_norm}", f"{target}mlp_norm")
    yield from _mlp(spec, names, source, target)


def _mlp(spec: ModelSpec, names: _Names, source: str, target: str) -> Iterator[TensorSpec]:
    hidden, wide = spec.hidden_size, spec.intermediate_size
    gate_and_up = [("gate", f"{source}mlp.gate_proj"), ("up", f"{source}{names.up}")]
    for part, name in gate_and_up if spec.gated else gate_and_up[1:]:
        yield TensorSpec(f"{name}.weight", (wide, hidden), Cut.ROWS, Group.MLP, f"{target}mlp.up.weight", part)
        if spec.mlp_bias:
            yield TensorSpec(f"{name}.bias", (wide,), Cut.ROWS, Group.MLP, f"{target}mlp.up.bias", part)
    name, parameter = f"{source}{names.down}", f"{target}mlp.down"
    yield TensorSpec(f"{name}.weight", (hidden, wide), Cut.COLUMNS, Group.MLP, f"{parameter}.weight")
    if spec.mlp_bias:
        yield TensorSpec(f"{name}.bias", (hidden,), Cut.REPLICATED, Group.MLP, f"{parameter}.bias")


def _head(spec: ModelSpec, names: _Names) -> Iterator[TensorSpec]:
    width, hidden = spec.embedding_size, spec.hidden_size
    if spec.final_norm:
        yield from _norm(spec, f"{names.root}{names.final_norm}", "norm")
    if width != hidden:
        name = f"{names.root}project_out.weight"
        yield TensorSpec(name, (width, hidden), Cut.REPLICATED, Group.HEAD, "project_out.weight")
    if not spec.tied_head:
        yield TensorSpec(HEAD, (spec.vocab_size, width), Cut.VOCABULARY, Group.HEAD, "head.weight")


def _norm(spec: ModelSpec, name: str, parameter: str) -> Iterator[TensorSpec]:
    if not spec.norm_affine:
        return
    for kind in ("weight", "bias") if spec.norm == "layer" else ("weight",):
        shape = (spec.hidden_size,)
        yield TensorSpec(f"{name}.{kind}", shape, Cut.REPLICATED, Group.NORMS, f"{parameter}.{kind}")


# -- The files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor as a file's header describes it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def open_checkpoint(folder: str | Path, spec: ModelSpec) -> dict[str, StoredTensor]:
    """Where each tensor of the table lies, by the table's name, and where a tied head is stored beside its embedding,
    HEAD. Raises ModelError at the first thing that is not exactly as expected; reads headers only."""
    folder = Path(folder)
    found: dict[str, _Found] = {}
    for file in _files(folder):
        for tensor in _read_header(file):
            name = _canonical(tensor.name, spec)
            if name in found:
                raise ModelError(f"{file}: tensor {tensor.name} is also in {found[name].file.name}; remove one of them")
            found[name] = tensor
    expected = {tensor.name: tensor for tensor in tensors(spec)}
    if spec.tied_head and HEAD in found:
        embedding = next(tensor for tensor in expected.values() if tensor.parameter == "embedding.weight")
        if embedding.name not in found:  # converted by way of a format that keeps one of the two
            found[embedding.name] = found.pop(HEAD)
        elif found[HEAD].shape != embedding.shape:
            raise not_tied(found[HEAD].file)
        else:
            expected[HEAD] = replace(embedding, name=HEAD)
    for name, wanted in expected.items():
        _check(folder, wanted, found.get(name))
    for name, extra in found.items():
        if name not in expected and not _harmless(name):
            raise ModelError(
                f"{extra.file}: unexpected tensor {extra.name} of shape {list(extra.shape)}: {spec.architecture} as "
                "described by config.json has no place for it; config and weights do not belong together"
            )
    return {name: StoredTensor(found[name].file, found[name].name) for name in expected}


def not_tied(file: Path) -> ModelError:
    return ModelError(
        f"{file}: {HEAD} differs from the embedding, though config.json ties them (tie_word_embeddings): set "
        "tie_word_embeddings to false"
    )


def _check(folder: Path, expected: TensorSpec, found: _Found | None) -> None:
    shape = list(expected.shape)
    if found is None:
        raise ModelError(
            f"{folder}: tensor {expected.name} of shape {shape} is missing from the safetensors files; download the "
            "model again, or correct config.json"
        )
    if found.shape != expected.shape:
        raise ModelError(
            f"{found.file}: tensor {found.name}: config.json asks for shape {shape}, found {list(found.shape)}; config "
            "and weights do not belong together"
        )
    if found.dtype not in FILE_DTYPES:
        raise ModelError(
            f"{found.file}: tensor {found.name}: expected one of {', '.join(FILE_DTYPES)}, found {found.dtype}; use an "
            "unquantized model"
        )


def _canonical(name: str, spec: ModelSpec) -> str:
    """OPT was published without the outermost prefix too."""
    return f"model.{name}" if spec.architecture == "OPTForCausalLM" and name.startswith("decoder.") else name


def _harmless(name: str) -> bool:
    """Buffers that old versions of transformers saved."""
    return name.endswith((".rotary_emb.inv_freq", ".masked_bias"))


def _files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, all of them present."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        files = [folder / name for name in _index_files(index)]
        for file in files:
            if not file.exists():
                raise ModelError(f"{file}: missing, though {index.name} names it; download the model again")
        return files
    if single.exists():
        return [single]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: holds {', '.join(pickles)} but no safetensors; pickles are refused because loading one can run "
            "code: convert the model to safetensors (save_pretrained writes them)"
        )
    raise ModelError(f"{folder}: no {single.name} and no {index.name}; give the folder of a model with its weights")


def _index_files(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: cannot be read as an index of shards ({error}); download it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: weight_map: {name!r} is not a file of this folder; download the index again")
    return names


def _read_header(file: Path) -> list[_Found]:
    """A safetensors file is 8 bytes of length, a JSON header of that length, then the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < length <= min(HEADER_LIMIT, size - 8):
            raise ModelError(
                f"{file}: a header of {length} bytes does not fit in a file of {size}; the file is truncated or not "
                "safetensors (a Git LFS pointer?): download it again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        found = [_Found(file, name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()]
        ranges = [(int(start), int(stop)) for start, stop in (entry["data_offsets"] for entry in header.values())]
        wrong = [
            tensor.name
            for tensor, (start, stop) in zip(found, ranges, strict=True)
            if tensor.dtype in FILE_DTYPES and stop - start != prod(tensor.shape) * FILE_DTYPES[tensor.dtype]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: the header is not that of a safetensors file; download it again") from error
    expected = 8 + length + max((stop for _, stop in ranges), default=0)
    if size != expected:
        raise ModelError(
            f"{file}: expected {expected} bytes, found {size}; the file is truncated or damaged: download it again"
        )
    if wrong:
        raise ModelError(f"{file}: tensor {wrong[0]}: its bytes do not match its shape; download the file again")
    return found
