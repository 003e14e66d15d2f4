"""The whole engine on the Triton kernels, interpreted where there is no GPU: the tokens are transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import build_model
from transformers import LlamaConfig, MistralConfig, OPTConfig, PretrainedConfig, Qwen3Config

from quire.cluster.llm import LLM, SamplingParams
from quire.kernels import dispatch
from quire.kernels.gpu import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
    "mistral, window": lambda: MistralConfig(**SMALL, head_dim=8, sliding_window=9),
    "opt": lambda: OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32,
    ),
}  # fmt: skip
PROMPTS = [[(7 * i + j * j) % 90 + 4 for j in range(length)] for i, length in enumerate([1, 5, 23])]
NUM_TOKENS = 6


def expected(config: PretrainedConfig, folder: Path) -> list[list[int]]:
    model = build_model(config, folder)
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(NUM_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1)[None]], 1)
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_are_those_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = expected(CONFIGS[family](), tmp_path)
    calls = []

    def count(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return original(*arguments)

    original = attention.paged_attention
    monkeypatch.setattr(attention, "paged_attention", count)
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(
        str(tmp_path), device=DEVICE, dtype="float32", max_model_len=48, max_num_seqs=4, max_num_batched_tokens=16,
        num_gpu_blocks_override=12,
    ) as llm:  # fmt: skip
        outputs = llm.generate(PROMPTS, greedy, use_tqdm=False)
        llm.scheduler.audit()
    assert calls
    assert [output.outputs[0].token_ids for output in outputs] == want
