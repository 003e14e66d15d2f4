"""What one layer of a decode step launches, as it is recorded: counted as the difference of one layer more."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_gpu import emulate
from random_models import build_model
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import LlamaConfig, OPTConfig, PretrainedConfig, Qwen3Config
from triton.runtime.interpreter import GridExecutor

from quire.cluster.llm import LLM
from quire.kernels.gpu import attention
from quire.kernels.gpu.attention import paged_attention

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu counts what a GPU has run"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
GATED = [
    "norm_kernel", "linear", "norm_rotate_write_kernel", "attend", "merge", "linear", "norm_kernel", "linear",
    "silu_and_mul_kernel", "linear",
]  # fmt: skip
CONFIGS = {
    "llama": (lambda n: LlamaConfig(**SMALL, num_hidden_layers=n), GATED),
    "qwen3": (lambda n: Qwen3Config(**SMALL, num_hidden_layers=n, head_dim=16), GATED),
    "opt": (
        lambda n: OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=n, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32,
        ),
        [name.replace("silu_and_mul", "activation") for name in GATED],
    ),
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Names of what is launched inside, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        launch = GridExecutor.__call__

        def counted(executor: GridExecutor, *arguments: Any, **options: Any) -> Any:
            self.names.append(executor.fn.__name__)
            with _disable_current_modes():
                return launch(executor, *arguments, **options)

        patch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = function.__name__.split(".")[0], function(*args, **(kwargs or {}))
        if not name.startswith("empty") and (name.endswith("_") or not is_view(result, args[0])):
            self.names.append(name)
        return result


def is_view(result: Any, base: Any) -> bool:
    """Whether the first result is its operand's own memory."""
    first = result if isinstance(result, torch.Tensor) else result[0]
    return bool(first.untyped_storage().data_ptr() == base.untyped_storage().data_ptr())


def launched(config: PretrainedConfig, folder: Path) -> list[str]:
    """By a recorded step of four rows."""
    build_model(config, folder)
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch, graphs=False)
        patch.setattr(attention, "paged_attention", paged_attention)  # which poisons nothing
        with LLM(
            str(folder), device="cpu", dtype="float32", max_model_len=32, max_num_seqs=4, max_num_batched_tokens=8,
            num_gpu_blocks_override=9,
        ) as llm:  # fmt: skip
            stepper = llm._executor._runner._stepper
            with Launches(patch) as launches, torch.inference_mode():
                stepper._model.forward(stepper._inputs.static_batch(4, False), stepper.pool.tensor)
    return launches.names


@pytest.mark.parametrize("family", CONFIGS)
def test_a_decode_layer_is_ten_kernels(family: str, tmp_path: Path) -> None:
    make, layer = CONFIGS[family]
    few, more = (launched(make(count), tmp_path / str(count)) for count in (2, 3))
    assert Counter(more) - Counter(few) == Counter(layer), more
    assert not Counter(few) - Counter(more) and len(layer) == 10
