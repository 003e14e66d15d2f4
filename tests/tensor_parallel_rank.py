"""One rank of a tensor-parallel group, as a process: runs prompts through models and saves the logits.

Arguments: rank, size, rendezvous file, folder for results, then model folders; "dummy:" before one asks for dummy
weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from stepper import Stepper

from quire.worker.config import WorkerConfig
from quire.worker.models.spec import ModelSpec
from quire.worker.parallel import TensorParallel
from quire.worker.weights import load_model


def compute(model: str, tp: TensorParallel) -> torch.Tensor:
    """Logits of a long prompt in two chunks, mixed with a short one that decodes."""
    folder = model.removeprefix("dummy:")
    load_format = "dummy" if folder != model else "auto"
    spec = ModelSpec.from_pretrained(folder)
    config = WorkerConfig(folder, rank=tp.rank, tensor_parallel_size=tp.size, load_format=load_format)
    stepper = Stepper(load_model(config, spec, tp), block_size=8)
    long = [(7 * i * i + 3) % spec.vocab_size for i in range(31)]
    steps = [{0: long[:20], 1: [5]}, {0: long[20:], 1: [9]}, {1: [11], 0: [2]}]
    return torch.cat([stepper.step(step, sample="all") for step in steps])


def main(rank: str, size: str, rendezvous: str, results: str, *models: str) -> None:
    torch.set_num_threads(1)
    tp = TensorParallel.start(int(rank), int(size), f"file://{rendezvous}", "cpu")
    logits = [compute(model, tp) for model in models]
    torch.save(logits, Path(results) / f"{size}-{rank}.pt")
    tp.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
