"""From the start of `quire serve` to its first answer, every second accounted for; and how fast weights are read.

    python -m benchmarks.startup [--model DIR]... [--cache cold,warm] [--repeat 3] [--out DIR]
    python -m benchmarks.startup --weights DIR

Stages are those that `quire serve` prints when it is ready: they follow each other, and their sum is the time from the
process's start. "cold" is a start with nothing in the caches of compiled kernels; files are in the page cache, as a
first start of the same minute leaves them. CPU seconds are those of every process of the server when it is ready.

`--weights` compares loading a checkpoint with reading its files, and with drawing as many random numbers.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import FLAGS, describe_host, host, progress, save, table

BUNDLED = "bundled"
LIMITS = {BUNDLED: 10.0}
OTHER_LIMIT = 15.0
"""Seconds until a small model answers on two cores, however cold the caches."""

Run = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="DIR", help="default: the bundled model")
    parser.add_argument("--cache", default="cold,warm", help="cold, warm or both")
    parser.add_argument("--repeat", type=int, default=3, help="starts of each kind")
    parser.add_argument("--weights", metavar="DIR", help="measure loading alone")
    parser.add_argument(*FLAGS["out"][0], **FLAGS["out"][1])
    arguments = parser.parse_args()
    if arguments.weights:
        found: dict[str, Any] = {"machine": host(), "model": arguments.weights, "weights": weights(arguments.weights)}
        name, text = "startup-weights", describe_weights(found)
    else:
        found = {"machine": host(), "runs": list(starts(arguments))}
        name, text = "startup", describe(found)
    print(text)
    if arguments.out is not None:
        save(arguments.out, name, found, text)


# -- starting


def starts(arguments: argparse.Namespace) -> Iterator[Run]:
    for model in arguments.model or [BUNDLED]:
        for cache in arguments.cache.split(","):
            with tempfile.TemporaryDirectory() as folder:
                if cache == "warm":
                    start(model, folder)
                for _ in range(arguments.repeat):
                    if cache == "cold":
                        shutil.rmtree(folder)
                    run = start(model, folder)
                    progress(f"{model}, {cache}: ready after {run['ready']:.1f} s")
                    yield {"model": model, "cache": cache, **run}


def start(model: str, cache: str) -> Run:
    """One server from its start to its end: {"ready", "stages", "cpu": {process: seconds}, "first token", "answer"}, in
    seconds; "first token" and "answer" count from the ready line."""
    from quire.cluster.client import Client

    environ = {**os.environ, "QUIRE_CACHE_DIR": cache, "GRPC_VERBOSITY": "NONE"}
    for name in ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "RAY_ADDRESS"):
        environ.pop(name, None)
    command = [sys.executable, "-m", "quire.cluster.cli", "serve", "--grpc-port", "0"]
    command += [] if model == BUNDLED else [model]
    began = time.monotonic()
    with server(command, environ) as (process, lines):
        log = ""
        for line in lines:
            log += line
            if address := re.search(r"gRPC on (\S+);", line):
                break
        else:
            raise SystemExit(f"quire serve ended with {process.wait()}:\n{log}")
        ready = time.monotonic() - began
        spent = cpu_seconds(process.pid)
        with Client(address[1]) as client:
            asked = time.monotonic()
            first = None
            for response in client.generate([1, 5, 6], max_tokens=16, ignore_eos=True):
                if first is None and response.HasField("output"):
                    first = time.monotonic() - asked
            answered = time.monotonic() - asked
    assert first is not None
    return {"ready": ready, "stages": read_stages(log), "cpu": spent, "first token": first, "answer": answered}


@contextmanager
def server(command: list[str], environ: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    """A process and its lines on stderr; ended in order, or at once where it does not."""
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environ, start_new_session=True
    )
    assert process.stderr is not None
    try:
        yield process, iter(process.stderr)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def read_stages(log: str) -> dict[str, float]:
    """From the line that `quire serve` prints."""
    line = re.search(r"seconds by stage: (.*)", log)
    if line is None:
        raise SystemExit(f"quire serve did not say where its time went:\n{log}")
    pairs = (part.rpartition(" ") for part in line[1].split(", "))
    return {stage: float(seconds) for stage, _, seconds in pairs}


def cpu_seconds(root: int) -> dict[str, float]:
    """Of the process and all below it, by a name that a person knows it by."""
    parents, names, spent = {}, {}, {}
    ticks = os.sysconf("SC_CLK_TCK")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        spent[int(folder.name)] = (int(fields[11]) + int(fields[12])) / ticks
    found: dict[str, float] = {}
    for pid in spent:
        above = pid
        while above not in (root, 0):
            above = parents.get(above, 0)
        if above == root:
            name = process_name(names[pid])
            found[name] = found.get(name, 0.0) + spent[pid]
    return found


def process_name(command: str) -> str:
    for mark, name in (
        ("ray::WorkerActor", "worker"), ("ray::ControllerActor", "controller"), ("ray::GatewayActor", "gateway"),
        ("quire.cluster.cli", "command"), ("gcs_server", "Ray: GCS"), ("raylet/raylet", "Ray: raylet"),
        ("monitor.py", "Ray: monitors"), ("dashboard.py", "Ray: API server"), ("Agent", "Ray: agents"),
    ):  # fmt: skip
        if mark in command:
            return name
    return "Ray: other"


# -- weights


def weights(folder: str) -> dict[str, float]:
    """Seconds, medians of five, and the checkpoint's bytes."""
    import torch

    from quire.worker import weights as loading
    from quire.worker.config import WorkerConfig
    from quire.worker.host import usable_cores
    from quire.worker.models.spec import ModelSpec
    from quire.worker.parallel import TensorParallel

    torch.set_num_threads(usable_cores())
    files = sorted(Path(folder).glob("*.safetensors"))
    spec = ModelSpec.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(load_format: str) -> None:
        config = WorkerConfig(folder, device=device, dtype=spec.dtype, load_format=load_format)
        loading.load_model(config, spec, TensorParallel.single())
        if device == "cuda":
            torch.cuda.synchronize()

    buffer = bytearray(max(file.stat().st_size for file in files))

    def read() -> None:
        for file in files:
            with file.open("rb", buffering=0) as opened:
                view, done = memoryview(buffer), 0
                while count := opened.readinto(view[done:]):
                    done += count

    return {
        "bytes": float(sum(file.stat().st_size for file in files)),
        "reading the files": _median(read),
        "loading": _median(lambda: load("auto")),
        "drawing random numbers": _median(lambda: load("dummy")),
    }


def _median(call: Callable[[], None], repeats: int = 5) -> float:
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)


# -- telling


def describe(found: dict[str, Any]) -> str:
    """Markdown: a column for each kind of start, medians of its runs."""
    kinds = list(dict.fromkeys((run["model"], run["cache"]) for run in found["runs"]))
    columns = [[run for run in found["runs"] if (run["model"], run["cache"]) == kind] for kind in kinds]
    stages = list(dict.fromkeys(stage for run in found["runs"] for stage in run["stages"]))
    processes = list(dict.fromkeys(name for run in found["runs"] for name in run["cpu"]))

    def row(name: str, value: Callable[[Run], float]) -> list[str]:
        return [name, *(f"{statistics.median(map(value, runs)):.2f}" for runs in columns)]

    def spread(name: str, value: Callable[[Run], float]) -> list[str]:
        return [name, *(f"{min(map(value, runs)):.2f} to {max(map(value, runs)):.2f}" for runs in columns)]

    rows = [row(stage, lambda run, stage=stage: run["stages"].get(stage, 0.0)) for stage in stages]  # type: ignore[misc]
    rows += [
        row("**ready, from the process's start**", lambda run: run["ready"]),
        spread("least and most", lambda run: run["ready"]),
        ["limit", *(f"{LIMITS.get(model, OTHER_LIMIT):.0f}" for model, _ in kinds)],
        row("then: first token of the first request", lambda run: run["first token"]),
        row("its whole answer, 16 tokens", lambda run: run["answer"]),
    ]
    cpu = [row(name, lambda run, name=name: run["cpu"].get(name, 0.0)) for name in processes]  # type: ignore[misc]
    cpu.append(row("**in all**", lambda run: sum(run["cpu"].values())))
    heads = [f"{Path(model).name}, {cache}" for model, cache in kinds]
    return "\n".join(
        [
            "## Start-up", "", describe_host(found["machine"]), "",
            *table(["seconds", *heads], rows), "", *table(["CPU seconds until ready", *heads], cpu), "",
        ]
    )  # fmt: skip


def describe_weights(found: dict[str, Any]) -> str:
    size = found["weights"]["bytes"]
    rows = [
        [name, f"{seconds:.3f}", f"{size / seconds / 1e9:.2f}"]
        for name, seconds in found["weights"].items()
        if name != "bytes"
    ]
    head = [f"{Path(found['model']).name}, {size / 1e6:.0f} MB", "seconds", "GB/s"]
    return "\n".join(["## Loading weights", "", describe_host(found["machine"]), "", *table(head, rows), ""])


if __name__ == "__main__":
    main()
