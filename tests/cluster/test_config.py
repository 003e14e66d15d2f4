"""From what a user asks for to what is in force: defaults, refusals, where models are found."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire.cluster import config as config_module
from quire.cluster.config import (
    BUNDLED_NAME,
    ConfigError,
    EngineConfig,
    ServeConfig,
    find_model,
    gpu_is_visible,
    resolve,
)
from quire.protos import worker_pb2
from quire.scheduler.config import SchedulerConfig
from quire.worker.models.spec import ModelError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "eos_token_id": 2,
    "dtype": "float16",
}


def write_model(folder: Path, **changes: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(folder)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "model")


def on_cpu(model: str, **settings: Any) -> EngineConfig:
    return EngineConfig(**({"model": model, "device": "cpu", "load_format": "dummy"} | settings))


def test_defaults_on_a_cpu_are_told(model: str) -> None:
    engine = resolve(on_cpu(model))
    assert (engine.device, engine.dtype, engine.max_model_len) == ("cpu", "float32", 4096)
    assert (engine.max_num_seqs, engine.max_num_batched_tokens, engine.max_num_waiting) == (64, 512, 512)
    assert (engine.swap_space_bytes, engine.preemption_mode, engine.enable_prefix_caching) == (0, "auto", True)
    assert engine.model == model and engine.model_name == model
    length, dtype = engine.notes
    assert "4096" in length and "8192" in length and "--max-model-len" in length
    assert "float16" in dtype and "float32" in dtype


def test_defaults_on_a_gpu(model: str) -> None:
    engine = resolve(on_cpu(model, device="cuda"))
    assert (engine.dtype, engine.max_model_len, engine.max_num_seqs) == ("float16", 8192, 256)
    assert (engine.max_num_batched_tokens, engine.swap_space_bytes) == (2048, 4 << 30)
    assert engine.notes == ()


def test_what_is_asked_for_is_had(model: str) -> None:
    engine = resolve(on_cpu(model, dtype="float16", max_model_len=8192, max_num_seqs=4096, max_num_waiting=0))
    assert (engine.dtype, engine.max_model_len) == ("float16", 8192)
    assert (engine.max_num_seqs, engine.max_num_batched_tokens, engine.max_num_waiting) == (4096, 4096, 0)
    assert engine.notes == ()


def test_steps_are_shorter_where_somebody_waits_for_a_first_token(model: str) -> None:
    sizes = [
        resolve(on_cpu(model, **settings), offline=offline).max_num_batched_tokens
        for settings in ({}, {"max_num_seqs": 700}, {"max_num_batched_tokens": 100, "max_num_seqs": 9})
        for offline in (False, True)
    ]
    assert sizes == [512, 2048, 700, 2048, 100, 100]


def test_swap_space_is_where_swapping_is_meant(model: str) -> None:
    def swap_space(**settings: Any) -> int:
        engine = resolve(on_cpu(model, **settings))
        assert engine.worker_config(0).swap_space_bytes == engine.swap_space_bytes
        return engine.swap_space_bytes

    assert swap_space(swap_space=0.5) == 1 << 29
    assert swap_space(preemption_mode="swap") == 4 << 30
    assert swap_space(preemption_mode="recompute", swap_space=1) == 0
    assert swap_space(device="cuda", preemption_mode="recompute") == 0
    assert swap_space(device="cuda", swap_space=0) == 0


def test_the_scheduler_gets_what_all_ranks_have_at_the_pace_of_the_slowest(model: str) -> None:
    engine = resolve(on_cpu(model, preemption_mode="swap", enable_prefix_caching=False, max_num_waiting=3))
    ranks = [
        worker_pb2.WorkerDescription(
            num_swap_blocks=30, bytes_per_block=500, link_bytes_per_s=3e9, prefill_tokens_per_s=900.0
        ),
        worker_pb2.WorkerDescription(
            num_swap_blocks=20, bytes_per_block=700, link_bytes_per_s=2e9, prefill_tokens_per_s=950.0
        ),
    ]
    made = engine.scheduler_config(300, ranks)
    assert made == SchedulerConfig(
        num_blocks=300, block_size=16, max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=512,
        prefill_floor=64, max_num_waiting=3,
        enable_prefix_caching=False, preemption_mode="swap", num_swap_blocks=20, block_bytes=700,
        link_bytes_per_s=2e9, prefill_tokens_per_s=900.0,
    )  # fmt: skip
    assert engine.scheduler_config(256, ranks[:1]).num_swap_blocks == 30


def test_bfloat16_is_kept_and_told_where_it_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path, dtype="bfloat16", max_position_embeddings=128)
    monkeypatch.setattr(config_module, "packs_bfloat16", lambda: False)
    engine = resolve(on_cpu(folder))
    assert engine.dtype == "bfloat16" and "--dtype float32" in engine.notes[0]
    monkeypatch.setattr(config_module, "packs_bfloat16", lambda: True)
    assert resolve(on_cpu(folder)).notes == ()


def test_workers_get_equal_settings_but_for_the_rank(model: str) -> None:
    engine = resolve(on_cpu(model, tensor_parallel_size=2, kv_cache_memory_bytes=1 << 20, seed=5))
    first, second = engine.worker_config(0), engine.worker_config(1)
    assert replace(first, rank=1) == second
    assert (first.model, first.dtype, first.tensor_parallel_size, first.seed) == (model, "float32", 2, 5)
    assert (first.kv_cache_memory_bytes, first.load_format, first.max_model_len) == (1 << 20, "dummy", 4096)


def test_graphs_and_depth_reach_those_who_need_them(model: str) -> None:
    engine = resolve(on_cpu(model))
    assert not engine.worker_config(0).enforce_eager and engine.run_ahead == 0
    engine = resolve(on_cpu(model, enforce_eager=True, run_ahead=3))
    assert engine.worker_config(0).enforce_eager and engine.run_ahead == 3


def test_limits_info_and_names(model: str) -> None:
    engine = resolve(on_cpu(model))
    assert (engine.limits.vocab_size, engine.limits.max_model_len, engine.limits.eos_token_ids) == (1000, 4096, (2,))
    assert ServeConfig().names(engine) == (model,)
    named = ServeConfig(served_model_names=("a", "b"))
    assert named.names(engine) == ("a", "b")
    info = engine.model_info(named, 77)
    assert (info.model, info.architecture, info.num_blocks) == ("a", "LlamaForCausalLM", 77)
    assert (info.vocab_size, info.max_model_len, list(info.eos_token_ids)) == (1000, 4096, [2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"load_format": "pickle"}, "--load-format must be one of"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size must be at least 1"),
        ({"max_num_seqs": 0}, "--max-num-seqs must be at least 1"),
        ({"preemption_mode": "drop"}, "--preemption-mode must be one of auto, swap, recompute"),
        ({"swap_space": -1.0}, "--swap-space must be a number of GiB"),
        ({"swap_space": math.nan}, "--swap-space must be a number of GiB"),
        ({"swap_space": 0.0, "preemption_mode": "swap"}, "needs a swap space"),
        ({"max_num_batched_tokens": -1}, "--max-num-batched-tokens must be at least 1"),
        ({"kv_cache_memory_bytes": 0}, "--kv-cache-memory-bytes must be at least 1"),
        ({"max_num_waiting": -1}, "--max-num-waiting"),
        ({"run_ahead": -1}, "--run-ahead must be 0, one step at a time, or more, not -1"),
        ({"block_size": 0}, "--block-size must be a power of two"),
        ({"block_size": 12}, "--block-size must be a power of two"),
        ({"block_size": 2048}, "--block-size must be a power of two from 1 to 1024"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization"),
        ({"gpu_memory_utilization": math.nan}, "--gpu-memory-utilization"),
        ({"max_model_len": 1}, "--max-model-len must be at least 2"),
        ({"max_model_len": 8193}, "--max-model-len 8193 is more than the model's 8192"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 16}, "must be at least --max-num-seqs"),
        ({"num_gpu_blocks_override": 10, "max_model_len": 161}, "raise it to 11, or lower --max-model-len to 160"),
    ],
)
def test_refused(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(on_cpu(model, **settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_models_own_refusals_pass_through(model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Sizes that work: 1, 2, 4"):
        resolve(on_cpu(model, tensor_parallel_size=3))
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        resolve(on_cpu(model, load_format="auto"))
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(on_cpu(str(tmp_path)))


@pytest.mark.parametrize(
    "settings",
    [
        {"grpc_port": -1}, {"grpc_port": 65536}, {"step_timeout": 0.0}, {"step_timeout": math.inf},
        {"drain_timeout": -1.0}, {"drain_timeout": math.nan},
        {"served_model_names": ("",)}, {"served_model_names": ("a\n",)},
    ],
)  # fmt: skip
def test_serve_settings_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServeConfig(**settings)


# -- where models are found


def test_no_model_is_the_bundled_one() -> None:
    folder = find_model(None)
    assert (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    assert resolve(EngineConfig(device="cpu")).model_name == BUNDLED_NAME


def test_paths_become_absolute(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(model).parent)
    assert find_model("model") == Path(model)
    monkeypatch.setenv("HOME", str(Path(model).parent))
    assert find_model("~/model") == Path(model)


def test_names_are_looked_up_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "models--org--my.model"
    with pytest.raises(ConfigError, match=r"hf download org/my\.model"):
        find_model("org/my.model")
    write_model(cache / "snapshots" / "aaa")
    assert find_model("org/my.model") == cache / "snapshots" / "aaa"
    write_model(cache / "snapshots" / "bbb")
    with pytest.raises(ConfigError):
        find_model("org/my.model")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbb\n")
    assert find_model("org/my.model") == cache / "snapshots" / "bbb"
    shutil.move(tmp_path / "hub", tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert find_model("org/my.model").name == "bbb"


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"there is no folder '\./nothing/here'"):
        find_model("./nothing/here")


# -- the machine


def test_gpus_are_seen_and_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()
    assert not gpu_is_visible(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert gpu_is_visible(tmp_path)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not gpu_is_visible(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert gpu_is_visible(tmp_path)


def test_device_auto_follows(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "gpu_is_visible", lambda: True)
    assert resolve(on_cpu(model, device="auto")).device == "cuda"
    monkeypatch.setattr(config_module, "gpu_is_visible", lambda: False)
    assert resolve(on_cpu(model, device="auto")).device == "cpu"
