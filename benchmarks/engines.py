"""What every engine's process of benchmarks/offline.py has in common: the same options, the same work, the same lines
of JSON on its standard output. Imports no engine, so that a peer runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import shapes, workloads

Generate = Callable[[Sequence[workloads.Job]], int]
"""Runs all of the work and returns how many tokens came."""


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="m160", help="a folder, or the name of a shape, for random-normal weights")
    parser.add_argument("--workload", default="chat")
    parser.add_argument("--repeat", type=int, default=2, help="runs; the first one warms up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: a GPU if there is one")
    parser.add_argument("--dtype", default=None, help="default: the model's")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    return parser


def is_shape(model: str) -> bool:
    return model in shapes.SHAPES


def folder_of(model: str, scratch: Path) -> str:
    """A folder with config.json: the model itself, or, for a shape, one that has no weights."""
    return str(shapes.write(model, scratch)) if is_shape(model) else model


def measure(engine: str, arguments: argparse.Namespace, generate: Generate, began: float, **about: Any) -> None:
    """Reports loading, which `began` then and is over, and every run. Raises where tokens are missing."""
    report(engine=engine, model=arguments.model, load_s=round(time.perf_counter() - began, 1), **about)
    jobs = workloads.load(arguments.workload)
    wanted = sum(job.output_tokens * job.n for job in jobs)
    for run in range(arguments.repeat):
        start = time.perf_counter()
        tokens = generate(jobs)
        seconds = time.perf_counter() - start
        if tokens != wanted:
            raise SystemExit(f"{engine} gave {tokens} tokens where {wanted} were asked for")
        report(
            engine=engine,
            workload=arguments.workload.rpartition("/")[2],
            run=run,
            seconds=round(seconds, 2),
            output_tokens=tokens,
            output_tokens_per_s=round(tokens / seconds, 1),
            **memory(),
        )


def memory() -> dict[str, int]:
    """Peaks in MiB: of this process and of the largest of its children that has ended; of what torch holds on a GPU."""
    used = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found = {"peak_memory_mib": used // 1024}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() >> 20
    return found


def report(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def quiet() -> None:
    """Before an engine is imported: nothing is fetched, and nothing is asked of a hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
