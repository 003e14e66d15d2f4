"""The engine on a GPU against the engine on a CPU and against transformers, on small random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, Qwen3Config

from quire.cluster.llm import LLM, SamplingParams

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "opt": lambda: OPTConfig(
        vocab_size=512, hidden_size=128, ffn_dim=256, num_hidden_layers=3, num_attention_heads=8,
        max_position_embeddings=512, word_embed_proj_dim=128,
    ),
}  # fmt: skip
PROMPTS = [[(7 * i + j * j) % 500 + 4 for j in range(length)] for i, length in enumerate([1, 2, 15, 16, 17, 63, 200])]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config: PretrainedConfig = CONFIGS[request.param]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def generate(folder: Path, **settings: Any) -> list[list[int]]:
    with LLM(str(folder), max_model_len=256, max_num_seqs=8, **settings) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        llm.scheduler.audit()
    return [output.outputs[0].token_ids for output in outputs]


def test_float32_tokens_equal_those_of_the_cpu(folder):
    expected = generate(folder, device="cpu")
    assert generate(folder, device="cuda", dtype="float32", kv_cache_memory_bytes=64 << 20) == expected


def test_preemption_and_bad_chunks_change_nothing(folder):
    whole = generate(folder, device="cuda", dtype="float32", kv_cache_memory_bytes=64 << 20)
    assert (
        generate(folder, device="cuda", dtype="float32", num_gpu_blocks_override=34, max_num_batched_tokens=13) == whole
    )


def test_bfloat16_log_probabilities_are_close_to_float32(folder):
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    values = []
    for dtype in ("float32", "bfloat16"):
        with LLM(str(folder), device="cuda", dtype=dtype, max_model_len=256, kv_cache_memory_bytes=64 << 20) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            values.append([output.outputs[0].cumulative_logprob for output in outputs])
    torch.testing.assert_close(torch.tensor(values[1]), torch.tensor(values[0]), atol=0.1, rtol=0.05)


def test_the_pool_is_sized_by_a_worst_case_step(folder):
    with LLM(str(folder), device="cuda", gpu_memory_utilization=0.2, max_model_len=256) as llm:
        memory = llm.scheduler.memory()
        total = torch.cuda.get_device_properties(0).total_memory
        assert torch.cuda.memory_reserved() < 0.2 * total and memory.blocks_total > 1000


MIXED = [
    GREEDY,
    SamplingParams(temperature=0.8, seed=1, top_p=0.9, max_tokens=25, ignore_eos=True),
    SamplingParams(temperature=0, repetition_penalty=1.2, logprobs=2, max_tokens=31, stop_token_ids=list(range(40))),
]


def serve(folder: Path, **settings: Any) -> list[Any]:
    """Tokens and reasons of requests of every kind, in a pool that is too small for all of them."""
    params = [MIXED[i % 3] for i in range(len(PROMPTS))]
    limits = dict(max_model_len=256, max_num_seqs=5, num_gpu_blocks_override=34, device="cuda", dtype="float32")
    with LLM(str(folder), **limits | settings) as llm:
        said = []
        for requests in (params, GREEDY):
            outputs = llm.generate(PROMPTS, requests, use_tqdm=False)
            said += [(output.outputs[0].token_ids, output.outputs[0].finish_reason) for output in outputs]
        llm.scheduler.audit()
    return said


@pytest.mark.parametrize("deterministic", [False, True])
def test_graphs_and_depth_change_no_token(folder, deterministic):
    want = serve(folder, enforce_eager=True, run_ahead=0, deterministic=deterministic)
    for depth in (0, 1, 2, 4):
        assert serve(folder, run_ahead=depth, deterministic=deterministic) == want, f"run_ahead {depth}"
    assert serve(folder, enforce_eager=True, run_ahead=2, deterministic=deterministic) == want


def test_decode_steps_are_replayed_and_nothing_waits_for_the_device(folder):
    """A launch that synchronized would raise."""
    limits = dict(max_model_len=256, max_num_seqs=8, kv_cache_memory_bytes=64 << 20, device="cuda", dtype="float32")
    with LLM(str(folder), **limits, run_ahead=2) as llm:
        runner = llm._executor._runner
        graphs, launch, replayed = runner._stepper._graphs, runner.launch, []
        forward = graphs.forward
        graphs.forward = lambda size: (replayed.append(size), forward(size))[1]

        def watched(plan):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return launch(plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        llm.generate(PROMPTS, [MIXED[i % 3] for i in range(len(PROMPTS))], use_tqdm=False)  # compiles
        runner.launch = watched
        llm.generate(PROMPTS, [MIXED[i % 3] for i in range(len(PROMPTS))], use_tqdm=False)
    assert len(replayed) > 50 and set(replayed) <= {1, 2, 4, 8}


def kernels_of_a_step(folder: Path, layers: int) -> list[str]:
    config = LlamaConfig(**SMALL | {"num_hidden_layers": layers})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    limits = dict(max_model_len=256, max_num_seqs=8, kv_cache_memory_bytes=64 << 20, device="cuda", dtype="bfloat16")
    with LLM(str(folder), **limits) as llm:
        graphs = llm._executor._runner._stepper._graphs
        graphs.forward(8)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graphs.forward(8)
            torch.cuda.synchronize()
    # Copies and fills between buffers would count as well.
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_a_decode_layer_is_at_most_ten_kernels(tmp_path):
    few, more = kernels_of_a_step(tmp_path / "2", 2), kernels_of_a_step(tmp_path / "3", 3)
    assert 0 < len(more) - len(few) <= 10, more


def test_a_report_tells_the_device_s_time(folder):
    with LLM(str(folder), max_model_len=256, kv_cache_memory_bytes=64 << 20, device="cuda") as llm:
        runner, busy = llm._executor._runner, []
        launch = runner.launch

        def noted(plan):
            pending = launch(plan)
            busy.append(pending.wait().busy_us)
            return pending

        runner.launch = noted
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert all(0 < each < 10_000_000 for each in busy) and len(busy) > 30
