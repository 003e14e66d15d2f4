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
