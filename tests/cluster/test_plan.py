"""What fits: exact byte counts for a model small enough to count by hand, and advice that is true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire.cluster.config import EngineConfig, ResolvedEngine, resolve
from quire.cluster.plan import Plan, _needed_on_cpu, make_plan, render

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "dtype": "float16",
}
EMBEDDING = 1000 * 64 * 2
ATTENTION = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64) * 2  # q, k and v, out
MLP = 2 * 3 * 64 * 128 * 2
NORMS = (2 * 2 + 1) * 64 * 2
WEIGHTS = 2 * EMBEDDING + ATTENTION + MLP + NORMS
# 256 tokens: three times the hidden size, and gate, up and their product, which are wider than q, k, v and out.
ACTIVATIONS = 256 * (3 * 64 + 3 * 128) * 2
SAMPLING = 8 * 1000 * 16
FIXED = WEIGHTS + ACTIVATIONS + SAMPLING
KV_PER_TOKEN = 2 * 2 * 2 * 16 * 2  # layers, K and V, heads, head size, bytes
BLOCK = 16 * KV_PER_TOKEN


@pytest.fixture
def engine(tmp_path: Path) -> ResolvedEngine:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return resolve(
        EngineConfig(
            model=str(tmp_path),
            device="cuda",
            load_format="dummy",
            max_num_seqs=8,
            max_num_batched_tokens=256,
            gpu_memory_utilization=0.5,
        )
    )


def budget(num_bytes: int) -> int:
    """Memory of a device, half of which is `num_bytes`."""
    return 2 * num_bytes


def test_bytes_by_cause(engine: ResolvedEngine) -> None:
    plan = make_plan(engine)
    assert dict(plan.weights) == {
        "embedding": EMBEDDING, "attention": ATTENTION, "mlp": MLP, "norms": NORMS, "head": EMBEDDING
    }  # fmt: skip
    assert plan.weight_bytes == WEIGHTS
    assert (plan.activations, plan.sampling) == (ACTIVATIONS, SAMPLING)
    assert plan.kv_bytes_per_token == KV_PER_TOKEN
    assert plan.required_bytes == FIXED + 64 * BLOCK
    assert (plan.fits, plan.num_blocks, plan.pool_bytes, plan.max_concurrency) == (None, None, None, None)
    assert plan.advice == ()


def test_ranks_share(engine: ResolvedEngine) -> None:
    two = make_plan(replace(engine, tensor_parallel_size=2))
    assert dict(two.weights) == {
        "embedding": EMBEDDING // 2, "attention": ATTENTION // 2, "mlp": MLP // 2, "norms": NORMS,
        "head": EMBEDDING // 2,
    }  # fmt: skip
    assert two.kv_bytes_per_token == KV_PER_TOKEN // 2
    # Two KV heads for four ranks: each is there twice.
    assert make_plan(replace(engine, tensor_parallel_size=4)).kv_bytes_per_token == KV_PER_TOKEN // 2


def test_what_is_left_is_the_pool(engine: ResolvedEngine) -> None:
    plan = make_plan(engine, budget(FIXED + 130 * BLOCK + BLOCK - 1))
    assert (plan.num_blocks, plan.pool_bytes, plan.capacity_tokens) == (130, 130 * BLOCK, 2080)
    assert (plan.max_concurrency, plan.fits, plan.advice) == (2, True, ())


def test_concurrency_is_bounded_by_the_rows(engine: ResolvedEngine) -> None:
    assert make_plan(engine, budget(FIXED + 10_000 * BLOCK)).max_concurrency == 8


def test_sizes_that_are_given(engine: ResolvedEngine) -> None:
    assert make_plan(replace(engine, kv_cache_memory_bytes=65 * BLOCK - 1)).num_blocks == 64
    plan = make_plan(replace(engine, num_gpu_blocks_override=70), budget(FIXED + 69 * BLOCK))
    assert (plan.num_blocks, plan.fits) == (70, False)


def advised(plan: Plan, flag: str) -> list[str]:
    return [advice.rsplit(" ", 1)[-1] for advice in plan.advice if flag in advice]


def test_exactly_one_sequence_fits_or_it_does_not(engine: ResolvedEngine) -> None:
    assert make_plan(engine, budget(FIXED + 64 * BLOCK)).fits
    plan = make_plan(engine, budget(FIXED + 64 * BLOCK - 1))
    assert (plan.fits, plan.num_blocks, plan.max_concurrency) == (False, 63, 0)
    assert advised(plan, "--max-model-len") == ["1008"]
    assert advised(plan, "--max-num-batched-tokens") == ["128"]
    assert advised(plan, "--tensor-parallel-size") == ["2"]
    assert advised(plan, "--gpu-memory-utilization") == ["0.95"]


def test_advice_is_true(engine: ResolvedEngine) -> None:
    memory = budget(FIXED + 20 * BLOCK)
    plan = make_plan(engine, memory)
    changes: dict[str, Any] = {
        "max_model_len": int(advised(plan, "--max-model-len")[0]),
        "tensor_parallel_size": int(advised(plan, "--tensor-parallel-size")[0]),
        "max_num_batched_tokens": int(advised(plan, "--max-num-batched-tokens")[0]),
        "gpu_memory_utilization": float(advised(plan, "--gpu-memory-utilization")[0]),
    }
    for name, value in changes.items():
        assert make_plan(replace(engine, **{name: value}), memory).fits, name
    assert not make_plan(replace(engine, max_model_len=changes["max_model_len"] + 1), memory).fits


def test_advice_for_a_pool_of_a_given_size(engine: ResolvedEngine) -> None:
    plan = make_plan(replace(engine, kv_cache_memory_bytes=10 * BLOCK))
    assert plan.advice == ("lower --max-model-len to 160", f"raise --kv-cache-memory-bytes to {64 * BLOCK}")
    needed = int(advised(plan, "--kv-cache-memory-bytes")[0])
    assert make_plan(replace(engine, kv_cache_memory_bytes=needed)).fits


def test_weights_alone_may_be_too_much(engine: ResolvedEngine) -> None:
    plan = make_plan(engine, budget(WEIGHTS // 4))
    assert (plan.fits, plan.num_blocks) == (False, 0)
    assert advised(plan, "--max-model-len") == []
    assert any(advice.startswith("take devices of at least") for advice in plan.advice)


def on_cpu(engine: ResolvedEngine, **settings: Any) -> ResolvedEngine:
    return replace(engine, device="cpu", **{"swap_space_bytes": 0, **settings})


def test_on_a_cpu_the_pool_is_a_share_of_what_the_weights_leave(engine: ResolvedEngine) -> None:
    host = 2 * WEIGHTS + 1_000_000
    plan = make_plan(on_cpu(engine), host_memory=host)
    assert (plan.budget, plan.num_blocks) == (host, int((host - WEIGHTS) * 0.4) // BLOCK)
    two = make_plan(on_cpu(engine, tensor_parallel_size=2), host_memory=host)
    assert two.num_blocks == int((host // 2 - two.weight_bytes) * 0.4) // (BLOCK // 2)
    assert make_plan(on_cpu(engine), host_memory=1 << 40).num_blocks == 8 * 64  # what eight rows can use


def test_on_a_cpu_a_model_larger_than_the_memory_does_not_fit(engine: ResolvedEngine) -> None:
    for settings in (
        {},
        {"kv_cache_memory_bytes": 64 * BLOCK},
        {"num_gpu_blocks_override": 64},
        {"swap_space_bytes": 5 * BLOCK},
        {"swap_space_bytes": 1 << 40},
        {"num_gpu_blocks_override": 64, "swap_space_bytes": 5 * BLOCK},
    ):
        plan = make_plan(on_cpu(engine, **settings), host_memory=WEIGHTS // 2)
        assert plan.fits is False
        (advice,) = plan.advice
        assert advice.startswith("make ") and advice.endswith(" of memory available")
        needed = _needed_on_cpu(plan)
        assert make_plan(on_cpu(engine, **settings), host_memory=needed).fits
        # Pools are whole blocks: where it is a share of what is left, some memory makes no difference.
        assert not make_plan(on_cpu(engine, **settings), host_memory=needed - 12 * BLOCK).fits
    assert make_plan(on_cpu(engine)).fits is None


def test_on_a_cpu_the_packed_copy_of_a_tied_head_counts(
    engine: ResolvedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = on_cpu(engine, spec=replace(engine.spec, tied_head=True), dtype="bfloat16")
    for packs, head in ((True, EMBEDDING), (False, 0)):
        monkeypatch.setattr("quire.cluster.plan.packs_bfloat16", lambda packs=packs: packs)
        assert dict(make_plan(tied).weights)["head"] == head
        assert dict(make_plan(replace(tied, device="cuda")).weights)["head"] == 0


def test_swap_space_is_the_hosts_and_no_larger_than_the_pool(engine: ResolvedEngine) -> None:
    plan = make_plan(engine, budget(FIXED + 130 * BLOCK))
    assert (engine.swap_space_bytes, plan.swap_bytes) == (4 << 30, 130 * BLOCK)
    few = make_plan(replace(engine, swap_space_bytes=10 * BLOCK), budget(FIXED + 130 * BLOCK))
    assert few.swap_bytes == 10 * BLOCK and few.num_blocks == 130
    assert "swap space (host)" in render(few)
    assert "swap space" not in render(make_plan(replace(engine, swap_space_bytes=0), budget(FIXED + 130 * BLOCK)))


def test_rendering(engine: ResolvedEngine) -> None:
    text = render(make_plan(engine, budget(FIXED + 130 * BLOCK)))
    assert "LlamaForCausalLM, float16, on each of 1 cuda rank(s)" in text
    assert "130 blocks of 16 = 2,080 tokens" in text
    assert "2 request(s) of max_model_len 1,024 fit at once" in text
    assert "Any one of these helps" in render(make_plan(engine, 1000))
    unknown = render(make_plan(engine))
    assert "least memory" in unknown and "--gpu-memory" in unknown
