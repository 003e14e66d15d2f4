"""The table of tensors against real files, and every way in which files can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedModel

from quire.kernels.linear import packed_product
from quire.worker.config import WorkerConfig
from quire.worker.host import packs_bfloat16
from quire.worker.models.checkpoint import (
    Group,
    bounds,
    bytes_by_group,
    kv_head_share,
    local_shape,
    open_checkpoint,
    share,
    tensors,
)
from quire.worker.models.decoder import Decoder
from quire.worker.models.spec import ModelError, ModelSpec
from quire.worker.parallel import TensorParallel
from quire.worker.weights import Staging, dummy_tensor, load_model

MakeModel = Callable[[PretrainedConfig], tuple[Path, PreTrainedModel]]
SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
OPT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(make_model: MakeModel) -> tuple[Path, ModelSpec]:
    folder, _ = make_model(LlamaConfig(**SMALL))
    return folder, ModelSpec.from_pretrained(folder)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def test_finds_every_tensor(checkpoint: tuple[Path, ModelSpec]) -> None:
    folder, spec = checkpoint
    stored = open_checkpoint(folder, spec)
    assert set(stored) == {tensor.name for tensor in tensors(spec)} == set(load_file(folder / WEIGHTS))
    assert all(place.file == folder / WEIGHTS for place in stored.values())


def test_shards(checkpoint: tuple[Path, ModelSpec]) -> None:
    folder, spec = checkpoint
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: weights[name] for name in names if index[name] == file}, folder / file)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    assert {name: place.file.name for name, place in open_checkpoint(folder, spec).items()} == index
    load_model(WorkerConfig(str(folder)), spec, TensorParallel.single())

    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-1.safetensors: missing, though .*index.json names it"):
        open_checkpoint(folder, spec)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(ModelError, match=r"weight_map: '\.\./x.safetensors' is not a file of this folder"):
        open_checkpoint(folder, spec)
    (folder / f"{WEIGHTS}.index.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be read as an index"):
        open_checkpoint(folder, spec)


def test_missing_tensor(checkpoint: tuple[Path, ModelSpec]) -> None:
    folder, spec = checkpoint
    rewrite(folder, lambda weights: weights.pop(Q_PROJ))
    with pytest.raises(ModelError, match=rf"{Q_PROJ} of shape \[32, 32\] is missing"):
        open_checkpoint(folder, spec)


def test_unexpected_tensor(checkpoint: tuple[Path, ModelSpec]) -> None:
    folder, spec = checkpoint
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    with pytest.raises(ModelError, match=rf"{WEIGHTS}: unexpected tensor .*q_proj.bias of shape \[32\]"):
        open_checkpoint(folder, spec)


def test_wrong_shape_and_type(checkpoint: tuple[Path, ModelSpec]) -> None:
    folder, spec = checkpoint
    rewrite(folder, lambda weights: weights.update({Q_PROJ: torch.zeros(32, 16)}))
    with pytest.raises(ModelError, match=rf"{WEIGHTS}: tensor {Q_PROJ}: .*\[32, 32\], found \[32, 16\]"):
        open_checkpoint(folder, spec)
    rewrite(folder, lambda weights: weights.update({Q_PROJ: torch.zeros(32, 32, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=rf"{Q_PROJ}: expected one of F32, .*found I8"):
        open_checkpoint(folder, spec)


def test_harmless_tensors_are_ignored(make_model: MakeModel) -> None:
    folder, _ = make_model(LlamaConfig(**SMALL, tie_word_embeddings=True))
    spec = ModelSpec.from_pretrained(folder)
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    open_checkpoint(folder, spec)
    with pytest.raises(ModelError, match=r"lm_head.weight of shape .* is missing"):
        open_checkpoint(folder, replace(spec, tied_head=False))


@pytest.mark.parametrize("size", [1, 2])
def test_a_tied_head_that_is_stored_too_must_be_the_embedding(
    make_model: MakeModel, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_model(LlamaConfig(**SMALL, tie_word_embeddings=True))
    spec = ModelSpec.from_pretrained(folder)
    monkeypatch.setattr("quire.worker.weights.COMPARED_ROWS", 20)

    def load() -> None:
        for rank in range(size):
            load_model(WorkerConfig(str(folder)), spec, TensorParallel(rank, size))

    def copy(weights: dict[str, torch.Tensor], row: int | None = None) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        if row is not None:
            weights["lm_head.weight"][row, 3] += 1

    rewrite(folder, copy)
    load()
    for row in (0, 45, 98):
        rewrite(folder, lambda weights, row=row: copy(weights, row))
        with pytest.raises(ModelError, match=f"{WEIGHTS}: lm_head.weight differs .* tie_word_embeddings to false"):
            load()
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(98, 32)}))
    with pytest.raises(ModelError, match="set tie_word_embeddings to false"):
        open_checkpoint(folder, spec)


def test_a_tied_checkpoint_may_keep_the_head_alone(make_model: MakeModel) -> None:
    folder, _ = make_model(OPTConfig(**OPT))
    spec = ModelSpec.from_pretrained(folder)
    config, alone = WorkerConfig(str(folder)), TensorParallel.single()
    want = load_model(config, spec, alone).state_dict()
    name = "model.decoder.embed_tokens.weight"
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": weights.pop(name)}))
    assert open_checkpoint(folder, spec)[name].name == "lm_head.weight"
    got = load_model(config, spec, alone).state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(98, 32)}))
    with pytest.raises(ModelError, match=r"lm_head.weight: config.json asks for shape \[99, 32\], found \[98, 32\]"):
        open_checkpoint(folder, spec)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_file(checkpoint: tuple[Path, ModelSpec], keep: int) -> None:
    folder, spec = checkpoint
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(ModelError, match=f"{WEIGHTS}: .*truncated"):
        open_checkpoint(folder, spec)


def test_not_safetensors(checkpoint: tuple[Path, ModelSpec]) -> None:
    folder, spec = checkpoint
    (folder / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=f"{WEIGHTS}: .*Git LFS pointer"):
        open_checkpoint(folder, spec)
    (folder / WEIGHTS).write_bytes((8).to_bytes(8, "little") + b"not json")
    with pytest.raises(ModelError, match="the header is not that of a safetensors file"):
        open_checkpoint(folder, spec)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ModelError, match="tensor a: its bytes do not match its shape"):
        open_checkpoint(folder, spec)


def test_pickles_are_refused(checkpoint: tuple[Path, ModelSpec]) -> None:
    folder, spec = checkpoint
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"no model.safetensors and no model.safetensors.index.json"):
        open_checkpoint(folder, spec)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"pytorch_model.bin but no safetensors; pickles are refused .*convert"):
        open_checkpoint(folder, spec)


def test_opt_without_the_outer_prefix(make_model: MakeModel) -> None:
    folder, _ = make_model(OPTConfig(**OPT))
    spec = ModelSpec.from_pretrained(folder)
    bare = {name.removeprefix("model."): data for name, data in load_file(folder / WEIGHTS).items()}
    save_file(bare, folder / WEIGHTS)
    assert open_checkpoint(folder, spec)["model.decoder.embed_tokens.weight"].name == "decoder.embed_tokens.weight"
    load_model(WorkerConfig(str(folder)), spec, TensorParallel.single())


@given(n=st.integers(1, 3000), size=st.integers(1, 8))
def test_shares_cover_everything_once(n: int, size: int) -> None:
    shares = [share(n, rank, size) for rank in range(size)]
    assert shares[0][0] == 0 and shares[-1][1] == n
    assert all(stop == start for (_, stop), (start, _) in pairwise(shares))
    widths = [stop - start for start, stop in shares]
    assert min(widths) > 0 or n < size
    assert max(widths) - min(widths) <= (0 if n % size == 0 else 31)


def test_key_value_heads_are_those_that_the_query_heads_read() -> None:
    for size, kv_heads in ((1, 2), (2, 2), (4, 2), (8, 2), (8, 1), (2, 4)):
        for rank in range(size):
            start, stop = share(8, rank, size)
            read = {head * kv_heads // 8 for head in range(start, stop)}
            assert read == set(range(*kv_head_share(kv_heads, rank, size)))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_bytes_are_those_of_the_model(checkpoint: tuple[Path, ModelSpec], size: int) -> None:
    _, spec = checkpoint
    for rank in range(size):
        groups = bytes_by_group(spec, "bfloat16", rank, size)
        model = Decoder(spec, TensorParallel(rank, size), torch.bfloat16, "cpu")
        assert sum(groups.values()) == model.weight_bytes == 2 * sum(part.numel() for part in model.parameters())
    whole = bytes_by_group(spec, "float32")
    assert whole[Group.EMBEDDING] == whole[Group.HEAD] == 99 * 32 * 4
    assert whole[Group.NORMS] == (2 * 2 + 1) * 32 * 4


def test_the_packed_copy_of_a_tied_head_is_counted(make_model: MakeModel) -> None:
    folder, _ = make_model(LlamaConfig(**SMALL, tie_word_embeddings=True))
    spec = ModelSpec.from_pretrained(folder)
    ours = packed_product(torch.zeros(64, 8, dtype=torch.bfloat16)) is not None
    supported = ours or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert packs_bfloat16() == supported
    for dtype, packed in (("bfloat16", supported), ("float32", False)):
        model = load_model(WorkerConfig(str(folder), dtype=dtype), spec, TensorParallel.single())
        copy = 99 * 32 * 2 if packed else 0
        assert model.weight_bytes == sum(bytes_by_group(spec, dtype).values()) + copy
        assert model.weight_bytes == sum(bytes_by_group(spec, dtype, packed=packed).values())


def test_flags_of_processors_that_take_packed_weights(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    assert not packs_bfloat16(info)
    for flags, packs in (("fpu sse4_2 avx fma", False), ("fpu avx avx2 fma", True), ("asimd bf16", True)):
        info.write_text(f"flags : {flags}\n")
        assert packs_bfloat16(info) == packs, flags


def test_progress_ends_at_the_total(checkpoint: tuple[Path, ModelSpec]) -> None:
    folder, spec = checkpoint
    calls: list[tuple[int, int]] = []
    model = load_model(WorkerConfig(str(folder)), spec, TensorParallel.single(), lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (model.weight_bytes, model.weight_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_bytes", [64, 96, 1 << 20])
def test_what_goes_through_staging_buffers_arrives_whole(num_bytes: int, dtype: torch.dtype) -> None:
    """Buffers are taken in turn, by pieces that do not divide the tensors, from tensors that do not lie in order."""
    staging = Staging(num_bytes, pinned=False)
    data = torch.randn(37, 19)
    for source in (data, data.t(), data[:, 3:7], data[0], torch.empty(0, 4)):
        target = torch.full(source.shape, torch.nan, dtype=dtype)
        staging.copy(target, source)
        assert torch.equal(target, source.to(dtype))


def test_dummy_weights_of_a_type_are_the_same_numbers_rounded(checkpoint: tuple[Path, ModelSpec]) -> None:
    _, spec = checkpoint
    for tensor in tensors(spec)[:4]:
        cut = bounds(tensor, spec, 0, 1)
        assert torch.equal(dummy_tensor(tensor, 7, cut, torch.bfloat16), dummy_tensor(tensor, 7, cut).bfloat16())


def test_dummy_weights_do_not_depend_on_the_cut(checkpoint: tuple[Path, ModelSpec]) -> None:
    _, spec = checkpoint
    # Wide enough that a tensor is drawn in several chunks.
    spec = replace(spec, vocab_size=3000, hidden_size=1024, embedding_size=1024, head_dim=256)
    for tensor in tensors(spec)[:8]:
        whole = dummy_tensor(tensor, 7, bounds(tensor, spec, 0, 1))
        assert whole.shape == tensor.shape and (whole != 0).any()
        assert abs(whole.mean().item() - ("norm" in tensor.name)) < 0.01
        assert 0.015 < whole.std() < 0.025
        for size in (2, 4):
            for rank in range(size):
                cut = bounds(tensor, spec, rank, size)
                part = dummy_tensor(tensor, 7, cut)
                assert part.shape == local_shape(tensor, spec, rank, size) and prod(part.shape) > 0
                assert torch.equal(part, whole[tuple(slice(*bound) for bound in cut)])
        assert not torch.equal(whole, dummy_tensor(tensor, 8, bounds(tensor, spec, 0, 1)))
