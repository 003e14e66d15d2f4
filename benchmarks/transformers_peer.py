"""transformers, given the work of benchmarks/offline.py in the same way: a process of its own, lines of JSON.

    python -m benchmarks.transformers_peer --model m160 --workload chat --mode continuous

`--mode continuous` is its continuous batching, all requests handed over at once, attention as it chooses it (SDPA over
gathered blocks where no flash-attention is installed). `--mode static` is plain generate(): batches of `--batch` in
order, padded on the left, each until its longest answer is done; tokens beyond what was asked for are not counted.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import engines
from benchmarks.workloads import Job

STATIC_BATCH = 32
PAD = 0


def main() -> None:
    parser = engines.options(__doc__)
    parser.add_argument("--mode", choices=["continuous", "static"], default="continuous")
    parser.add_argument("--batch", type=int, default=STATIC_BATCH, help="sequences of a static batch")
    arguments = parser.parse_args()
    engines.quiet()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = load(arguments, Path(folder))
    made: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    if arguments.mode == "static":
        engines.measure("generate", arguments, lambda jobs: static(model, jobs, arguments.batch), began, **made)
        return
    engines.measure("transformers", arguments, lambda jobs: continuous(model, jobs), began, **made)


def load(arguments: argparse.Namespace, scratch: Path) -> Any:
    """Random-normal weights for a shape, as its own initialisation draws them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = engines.folder_of(arguments.model, scratch)
    config = AutoConfig.from_pretrained(folder)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else config.dtype
    torch.manual_seed(0)
    if engines.is_shape(arguments.model):
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return model.eval()


def settings(jobs: Sequence[Job], **more: Any) -> Any:
    """One temperature for all, as its batches have one configuration; no end but the length's."""
    from transformers import GenerationConfig

    temperatures = {job.temperature for job in jobs}
    if len(temperatures) > 1 or any(job.n > 1 for job in jobs):
        raise SystemExit("this peer takes workloads of one temperature and one sample for each request")
    (temperature,) = temperatures
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    longest = max(job.output_tokens for job in jobs)
    return GenerationConfig(**{"max_new_tokens": longest, "eos_token_id": -1, "pad_token_id": PAD, **sampling, **more})


def continuous(model: Any, jobs: Sequence[Job]) -> int:
    """The manager that generate_batch() makes, with a length for each request."""
    options: dict[str, Any] = {"generation_config": settings(jobs)}
    known = inspect.signature(model.continuous_batching_context_manager).parameters
    if "workload_hints" in known:
        from transformers.generation.continuous_batching.utils import WorkloadHints

        options["workload_hints"] = WorkloadHints(
            max_prompt_length=max(len(job.prompt) for job in jobs),
            max_generated_length=max(job.output_tokens for job in jobs),
            num_requests=len(jobs),
        )
    tokens = done = 0
    with model.continuous_batching_context_manager(**options) as manager:
        for job in jobs:
            manager.add_request(list(job.prompt), max_new_tokens=job.output_tokens)
        while done < len(jobs):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise SystemExit("transformers' continuous batching ended early; what it wrote says why")
            elif result.is_finished():
                if result.error is not None:
                    raise SystemExit(f"transformers' continuous batching failed: {result.error}")
                tokens += len(result.generated_tokens)
                done += 1
    return tokens


def static(model: Any, jobs: Sequence[Job], size: int) -> int:
    import torch

    tokens = 0
    for first in range(0, len(jobs), size):
        batch = jobs[first : first + size]
        width = max(len(job.prompt) for job in batch)
        ids = torch.tensor([[PAD] * (width - len(job.prompt)) + list(job.prompt) for job in batch])
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        longest = max(job.output_tokens for job in batch)
        config = settings(jobs, max_new_tokens=longest)
        with torch.inference_mode():
            out = model.generate(
                ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config, use_cache=True
            )
        assert out.shape == (len(batch), width + longest), out.shape
        tokens += sum(job.output_tokens for job in batch)
    return tokens


if __name__ == "__main__":
    main()
