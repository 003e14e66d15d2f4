"""Output tokens per second of a whole engine in one process: fixed prompts, exact output lengths, no server.

    python -m benchmarks.offline --model DIR --workload chat
    python -m benchmarks.offline --model qwen3-0.6b --workload nano --max-num-seqs 256 --peer transformers --out DIR
    python -m benchmarks.offline --model m160 --workload path/to/workloads.py:chat --repeat 2

`--model` is a folder, or the name of a shape in benchmarks/shapes.py, which then gets random-normal weights. With
`--peer`, given once or several times, Quire and each peer run one after the other in processes of their own; a table
puts them beside each other and beside the computed floor:

    transformers    its continuous batching
    generate        its plain generate(), in static batches
    vllm            vLLM, where it can be imported; --python vllm=PATH for one that lives in another environment

`--floor` computes the floor without a peer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import engines, workloads

PEERS = {
    "transformers": ["benchmarks.transformers_peer", "--mode", "continuous"],
    "generate": ["benchmarks.transformers_peer", "--mode", "static"],
    "vllm": ["benchmarks.vllm_peer"],
}
PASSED_ON = ("model", "workload", "repeat", "device", "dtype", "max_model_len", "max_num_seqs")

Line = dict[str, Any]


def main() -> None:
    parser = options()
    arguments = parser.parse_args()
    if not arguments.peer and not arguments.floor:
        with tempfile.TemporaryDirectory() as folder:
            run(arguments, Path(folder))
        return
    pythons = dict(pair.partition("=")[::2] for pair in arguments.python)
    found = compare(arguments, pythons)
    print(describe(found))
    sys.exit(any("failure" in line for line in found["engines"].values()))


def options() -> argparse.ArgumentParser:
    parser = engines.options(__doc__)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--run-ahead", type=int, default=None, help="plans sent ahead of results")
    parser.add_argument("--peer", action="append", choices=list(PEERS), default=[])
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help="a peer's interpreter")
    parser.add_argument("--floor", action="store_true", help="measure the machine, and state the floor beside")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one engine")
    parser.add_argument("--ceilings", type=Path, default=None, metavar="FILE", help="JSON of benchmarks.ceilings")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="write Markdown and JSON here")
    return parser


# -- Quire, in this process


def run(arguments: argparse.Namespace, scratch: Path) -> None:
    from quire.cluster.llm import LLM, SamplingParams

    began = time.perf_counter()
    llm = LLM(
        engines.folder_of(arguments.model, scratch),
        load_format="dummy" if engines.is_shape(arguments.model) else "auto",
        device=arguments.device,
        dtype=arguments.dtype,
        tensor_parallel_size=arguments.tensor_parallel_size,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        block_size=arguments.block_size,
        enforce_eager=arguments.enforce_eager,
        run_ahead=arguments.run_ahead,
    )

    def generate(jobs: Sequence[workloads.Job]) -> int:
        llm.reset_prefix_cache()  # each run finds nothing of the one before
        counters = llm.scheduler.counters
        steps, preemptions = counters.num_steps, counters.num_preemptions
        params = [
            SamplingParams(max_tokens=job.output_tokens, n=job.n, ignore_eos=True, temperature=job.temperature)
            for job in jobs
        ]
        outputs = llm.generate([job.prompt for job in jobs], params, use_tqdm=False)
        engines.report(steps=counters.num_steps - steps, preemptions=counters.num_preemptions - preemptions)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    engines.measure("quire", arguments, generate, began, dtype=llm.config.dtype, device=llm.config.device)
    llm.scheduler.audit()
    llm.close()


# -- engines beside each other


def compare(arguments: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    """{"machine", "model", "workload", "work", "limits", "floor", "engines": {name: its last run, with "load_s", or
    "failure"}}; with `arguments.out`, written there after every engine."""
    import torch

    from benchmarks.report import host, progress, save

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    jobs = workloads.load(arguments.workload)
    work = {
        "requests": len(jobs),
        "prompt_tokens": sum(len(job.prompt) for job in jobs),
        "output_tokens": sum(job.output_tokens * job.n for job in jobs),
    }
    found: dict[str, Any] = {
        "machine": host(device), "model": arguments.model, "workload": workload_name(arguments), "work": work,
        **floor(arguments, device, jobs), "engines": {},
    }  # fmt: skip
    for name, command in commands(arguments, pythons).items():
        is_here = name in pythons or name == "quire" or importlib.util.find_spec(_package(name)) is not None
        found["engines"][name] = run_engine(command, arguments.limit) if is_here else {"failure": "not installed"}
        line = found["engines"][name]
        progress(f"{name}: {line.get('failure') or str(line['output_tokens_per_s']) + ' output tok/s'}")
        if arguments.out is not None:
            save(arguments.out, f"offline-{Path(arguments.model).name}-{found['workload']}", found, describe(found))
    return found


def floor(arguments: argparse.Namespace, device: str, jobs: Sequence[workloads.Job]) -> dict[str, Any]:
    """{"limits", "floor"}, measured before any engine runs; "floor failure" where it cannot be."""
    import torch

    from benchmarks import ceilings, floors, shapes

    config = shapes.config(arguments.model)
    dtype = arguments.dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    try:
        if arguments.ceilings:
            machine = floors.from_ceilings(ceilings.load(arguments.ceilings), dtype)
        else:
            machine = floors.measure(torch.device(device), dtype)
    except RuntimeError as error:
        return {"floor failure": str(error)}
    cost = floors.Cost.of(arguments.model, getattr(torch, dtype).itemsize)
    seconds = cost.workload(machine, jobs, arguments.max_num_seqs)
    tokens = sum(job.output_tokens * job.n for job in jobs)
    return {"limits": asdict(machine), "floor": {"seconds": seconds, "output_tokens_per_s": tokens / seconds}}


def commands(arguments: argparse.Namespace, pythons: dict[str, str]) -> dict[str, list[str]]:
    """Of every engine's process, ours first."""
    passed = [f"--{name.replace('_', '-')}={value}" for name in PASSED_ON if (value := getattr(arguments, name))]
    own = ["tensor_parallel_size", "max_num_batched_tokens", "block_size", "run_ahead"]
    mine = [f"--{name.replace('_', '-')}={value}" for name in own if (value := getattr(arguments, name)) is not None]
    mine += ["--enforce-eager"] * arguments.enforce_eager
    theirs = {peer: [pythons.get(peer, sys.executable), "-m", *PEERS[peer], *passed] for peer in arguments.peer}
    return {"quire": [sys.executable, "-m", "benchmarks.offline", *passed, *mine], **theirs}


def run_engine(command: list[str], limit: float) -> Line:
    """What the engine's process said of its last run, and of loading."""
    found: Line = {}
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {limit:.0f} s"}
    except OSError as error:
        return {"failure": str(error)}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if done.returncode or "seconds" not in found:
        found["failure"] = f"ended with {done.returncode}; what it wrote is above"
    return found


def describe(found: dict[str, Any]) -> str:
    """Markdown."""
    from benchmarks import floors
    from benchmarks.report import describe_host, table

    floor = found.get("floor")
    rows = []
    quire = found["engines"]["quire"].get("output_tokens_per_s")
    for name, line in found["engines"].items():
        speed = line.get("output_tokens_per_s")
        if "failure" in line or not speed:
            rows.append([name, line.get("failure", "nothing came"), "", "", "", "", "", ""])
            continue
        gpu = line.get("peak_gpu_memory_mib")
        rows.append(
            [
                name, f"{speed:,.0f}", f"{line['seconds']:.2f}", f"{100 * speed / floor['output_tokens_per_s']:.0f} %"
                if floor else "", f"{quire / speed:.2f}" if quire else "", f"{line['load_s']:.1f}",
                f"{line['peak_memory_mib']:,}", f"{gpu:,}" if gpu else "",
            ]
        )  # fmt: skip
    if floor:
        rows.append(["floor", f"{floor['output_tokens_per_s']:,.0f}", f"{floor['seconds']:.2f}", "", "", "", "", ""])
    head = ["engine", "output tok/s", "seconds", "of the floor", "Quire is times it", "load s", "peak MiB", "GPU MiB"]
    lines = [f"## Offline: {Path(found['model']).name}, {found['workload']}", "", describe_host(found["machine"]), ""]
    work = found["work"]
    lines.append(
        f"{work['requests']} requests, {work['prompt_tokens']:,} prompt tokens,"
        f" {work['output_tokens']:,} output tokens."
    )
    if "limits" in found:
        lines.append(f"The machine, measured in the same run: {floors.describe(floors.Machine(**found['limits']))}.")
    if "floor failure" in found:
        lines.append(f"No floor: {found['floor failure']}.")
    lines.append("")
    return "\n".join([*lines, *table(head, rows), ""])


def workload_name(arguments: argparse.Namespace) -> str:
    return str(arguments.workload).rpartition("/")[2].replace(".py:", "-")


def _package(peer: str) -> str:
    return "transformers" if peer == "generate" else peer


if __name__ == "__main__":
    main()
