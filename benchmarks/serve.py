"""Online serving: requests over the network, from one client process, and what they waited for.

    python -m benchmarks.serve --model DIR --workload random:160:128 --concurrency 1,8,32
    python -m benchmarks.serve --model DIR --rate 0.5,1,2,4 --duration 60 --slo ttft=500,itl=100 --out DIR
    python -m benchmarks.serve --model DIR --trace lengths.csv.gz --time-scale 4 -- --max-num-seqs 128
    python -m benchmarks.serve --target openai --address http://127.0.0.1:8000 --model NAME --concurrency 1,8,32
    python -m benchmarks.serve --target offline --model DIR --concurrency 32

Closed loop (`--concurrency`): so many users, each of whom waits for an answer before asking again. Open loop (`--rate`,
`--trace`): requests come when they come. Output lengths are exact, prompts are token ids, no two runs share a prompt.
Without `--address` a server is started (`quire serve`, with what follows `--`) and ended. `--target offline` gives
the same requests to `LLM` in this process, so many at a time: the difference is what the wire and the processes cost.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import arrivals, latency, plots, workloads
from benchmarks.latency import Record
from benchmarks.served import ServedQuire, cpu_seconds
from benchmarks.workloads import HIGHEST_ID, LOWEST_ID

WARM_UP_TOKENS = 16
UNITS = {"closed": "concurrent requests", "rate": "requests per second", "trace": "speed of the trace"}


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come at one point of a curve."""

    kind: str
    """closed, rate or trace"""
    value: float

    def __str__(self) -> str:
        return f"{self.value:g}"


def main() -> None:
    arguments, server_arguments = parse(sys.argv[1:])
    try:
        limits = latency.parse_limits(arguments.slo)
        loads = parse_loads(arguments)
        points = [
            (load, run, make_requests(arguments, load, seed))
            for seed, (load, run) in enumerate(itertools.product(loads, range(arguments.repeat)), start=arguments.seed)
        ]
    except ValueError as error:
        raise SystemExit(str(error)) from error
    with ExitStack() as stack:
        run = _offline if arguments.target == "offline" else _online(arguments, server_arguments, stack)
        result = describe(arguments, server_arguments, loads)
        if arguments.target == "openai":
            result["versions"]["server"] = _peer_version(arguments.address)
        print(head(limits), flush=True)
        for load, number, requests in points:
            found = {"load": load.value, "run": number, **run(arguments, load, requests, limits)}
            result["points"].append(found)
            print(line(found), flush=True)
    if arguments.out is not None:
        save(arguments, result)


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those of the server behind `--`."""
    own, server = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a model's folder, or its name at the address; default: bundled")
    parser.add_argument("--target", choices=["quire", "openai", "offline"], default="quire")
    parser.add_argument("--address", default=None, help="HOST:PORT, or a URL for openai; default: a server is started")
    parser.add_argument("--server-pid", type=int, default=None, help="of a server at --address: its CPU time is stated")
    parser.add_argument(
        "--workload", default="random:160:128", help="random:PROMPT:OUTPUT, or as in benchmarks.offline"
    )
    loads = parser.add_mutually_exclusive_group()
    loads.add_argument("--concurrency", default=None, help="closed loop, such as 1,8,32 (which is the default)")
    loads.add_argument("--rate", default=None, help="open loop: Poisson arrivals per second, such as 0.5,1,2")
    loads.add_argument(
        "--trace", type=Path, default=None, help="open loop: CSV of arrival_s,prompt_tokens,output_tokens"
    )
    parser.add_argument("--time-scale", default="1", help="how much faster a trace runs than it did, such as 0.5,1,2")
    parser.add_argument("--settle", type=float, default=6.0, help="seconds left to a start's work in the background")
    parser.add_argument("--num-prompts", type=int, default=None, help="default: 4 per user, or as many as come in time")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals in an open loop")
    parser.add_argument("--max-tokens", type=int, default=None, help="leave out of a trace what is longer in all")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slo", default="", help="limits of a good request in ms: ttft=500,itl=100 (tpot, e2e)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="write JSON and plots here")
    parser.add_argument("--name", default=None, help="of the result: its files' name and its label in plots")
    parser.add_argument("--show-log", action="store_true", help="show what the server writes")
    arguments = parser.parse_args(own)
    if arguments.target == "openai" and not (arguments.address and arguments.model):
        parser.error(
            "--target openai needs --address http://HOST:PORT and --model NAME: the server is not started here"
        )
    if arguments.target == "offline" and (arguments.rate or arguments.trace or server):
        parser.error("--target offline has a closed loop only (--concurrency), and no server to give arguments to")
    if arguments.address and server:
        parser.error(
            f"{' '.join(server)!r} would go to a server that is started here; the one at --address runs already"
        )
    return arguments, server


def parse_loads(arguments: argparse.Namespace) -> list[Load]:
    """Raises ValueError."""
    if arguments.trace is not None:
        return [Load("trace", value) for value in _numbers("--time-scale", arguments.time_scale)]
    if arguments.rate is not None:
        return [Load("rate", value) for value in _numbers("--rate", arguments.rate)]
    values = _numbers("--concurrency", arguments.concurrency or "1,8,32")
    if any(value != int(value) for value in values):
        raise ValueError("--concurrency takes whole numbers of requests")
    return [Load("closed", int(value)) for value in values]


def _numbers(flag: str, text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [0.0]
    if not all(0 < value < float("inf") for value in values):
        raise ValueError(f"{flag} takes numbers above 0 with commas between them, not {text!r}")
    return values


# -- requests


def make_requests(arguments: argparse.Namespace, load: Load, seed: int) -> list[dict[str, Any]]:
    """Prompt, output_tokens and, in an open loop, due: seconds after the start. Raises ValueError."""
    if load.kind == "trace":
        return trace_requests(arguments, load.value, seed)
    if load.kind == "closed":
        count = arguments.num_prompts or max(8, 4 * int(load.value))
    else:
        count = arguments.num_prompts or max(1, round(load.value * arguments.duration))
    jobs = list(itertools.islice(_jobs(arguments.workload, seed), count))
    if load.kind == "closed":
        return [{"prompt": prompt, "output_tokens": output} for prompt, output in jobs]
    times = arrivals.poisson(load.value, len(jobs), seed)
    return [
        {"prompt": prompt, "output_tokens": output, "due": due}
        for (prompt, output), due in zip(jobs, times, strict=True)
    ]


def trace_requests(arguments: argparse.Namespace, scale: float, seed: int) -> list[dict[str, Any]]:
    """The trace's own times and lengths; ids are random."""
    rows = [row for row in arrivals.read_trace(arguments.trace) if row.output_tokens]
    if arguments.max_tokens is not None:
        rows = [row for row in rows if row.prompt_tokens + row.output_tokens <= arguments.max_tokens]
    if not rows or rows[0].arrival_s is None:
        raise ValueError(f"{arguments.trace} has no arrival times that can be used: only traces with them are replayed")
    first, rng = rows[0].arrival_s, random.Random(seed)
    timed = [(((row.arrival_s or 0.0) - first) / scale, row) for row in rows[: arguments.num_prompts]]
    return [
        {"prompt": _ids(rng, row.prompt_tokens), "output_tokens": row.output_tokens, "due": due}
        for due, row in timed
        if arguments.num_prompts or due <= arguments.duration
    ]


def _jobs(workload: str, seed: int) -> Iterator[tuple[list[int], int]]:
    if workload.startswith("random:"):
        if not (match := re.fullmatch(r"random:([1-9]\d*):([1-9]\d*)", workload)):
            raise ValueError(f"{workload!r} is not random:PROMPT:OUTPUT, two numbers of tokens, such as random:160:128")
        rng, prompt, output = random.Random(seed), int(match[1]), int(match[2])
        return ((_ids(rng, prompt), output) for _ in itertools.count())
    jobs = workloads.load(workload)
    if any(job.n != 1 for job in jobs):
        raise ValueError(f"workload {workload!r} asks for several samples of a prompt, which is not measured here")
    return ((job.prompt, job.output_tokens) for job in itertools.cycle(jobs))


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randint(LOWEST_ID, HIGHEST_ID) for _ in range(count)]


def warm_up(requests: Sequence[dict[str, Any]], load: Load) -> list[dict[str, Any]]:
    """Short requests of other tokens: as many at once as there will be, and no more than a few in an open loop."""
    rng, count = random.Random("warm-up"), int(load.value) if load.kind == "closed" else 4
    return [
        {"prompt": _ids(rng, len(request["prompt"])), "output_tokens": min(WARM_UP_TOKENS, request["output_tokens"])}
        for request in requests[:count]
    ]


# -- runs


def _online(arguments: argparse.Namespace, server_arguments: list[str], stack: ExitStack) -> Any:
    pid = arguments.server_pid
    if arguments.address is None:
        model = [arguments.model] if arguments.model else []
        server = ServedQuire([*model, *server_arguments], arguments.show_log)
        stack.callback(server.stop)
        time.sleep(arguments.settle)
        arguments.address, pid = server.address, server.pid

    def run(arguments: argparse.Namespace, load: Load, requests: list[dict[str, Any]], limits: Any) -> dict[str, Any]:
        job = {
            "target": arguments.target,
            "address": arguments.address,
            "model": arguments.model or "",
            "concurrency": int(load.value) if load.kind == "closed" else None,
            "timeout": arguments.timeout,
            "warm_up": warm_up(requests, load),
            "requests": requests,
        }
        before, answer, after = asyncio.run(_drive(job, pid))
        if "error" in answer:
            raise SystemExit(answer["error"])
        found = latency.summarize([Record(**record) for record in answer["records"]], limits)
        cpu = {name: round(after[name] - before.get(name, 0.0), 2) for name in after}
        found["cpu_s"] = {"client": answer["cpu_s"], **{name: used for name, used in sorted(cpu.items()) if used}}
        return found

    return run


async def _drive(job: dict[str, Any], pid: int | None) -> tuple[dict[str, float], dict[str, Any], dict[str, float]]:
    """The client's answer, and the server's CPU seconds before and after."""
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.load_client",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=1 << 30,
    )  # fmt: skip
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write(json.dumps(job).encode())
    client.stdin.close()
    first = await client.stdout.readline()
    before = cpu_seconds(pid) if pid else {}
    answer = await client.stdout.readline() if b"started" in first else first
    after = cpu_seconds(pid) if pid else {}
    if await client.wait():
        raise SystemExit("the client failed; what it wrote is above")
    return before, json.loads(answer), after


def _offline(
    arguments: argparse.Namespace, load: Load, requests: list[dict[str, Any]], limits: dict[str, float]
) -> dict[str, Any]:
    """The same requests through LLM, as many at a time."""
    from quire.cluster.llm import LLM, SamplingParams

    del limits
    with LLM(arguments.model, max_num_seqs=int(load.value)) as llm:

        def generate(requests: Sequence[dict[str, Any]]) -> None:
            params = [
                SamplingParams(max_tokens=request["output_tokens"], ignore_eos=True, temperature=0)
                for request in requests
            ]
            llm.generate([request["prompt"] for request in requests], params, use_tqdm=False)

        time.sleep(arguments.settle)
        generate(warm_up(requests, load))
        start = time.perf_counter()
        generate(requests)
        seconds = time.perf_counter() - start
    tokens = sum(request["output_tokens"] for request in requests)
    return {
        "requests": len(requests),
        "failed": 0,
        "seconds": round(seconds, 3),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / seconds, 2),
        "requests_per_s": round(len(requests) / seconds, 4),
    }


# -- what is shown


def describe(arguments: argparse.Namespace, server_arguments: list[str], loads: list[Load]) -> dict[str, Any]:
    packages = ("quire", "torch", "grpcio", "protobuf", "ray")
    return {
        "name": arguments.name or arguments.target,
        "target": arguments.target,
        "model": Path(arguments.model or "bundled").name,
        "workload": arguments.workload if arguments.trace is None else arguments.trace.name,
        "load_unit": UNITS[loads[0].kind],
        "command": sys.argv[1:],
        "server_arguments": server_arguments,
        "limits_ms": arguments.slo,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "points": [],
    }


def head(limits: dict[str, float]) -> str:
    columns = ["load", "run", "req", "failed", "out tok/s", "req/s"]
    columns += ["TTFT p50", "p99", "ITL p50", "p99", "TPOT p50", "E2E p50", "late p99"]
    columns += ["good req/s"] if limits else []
    return "\n".join(("milliseconds where no unit is named", "".join(f"{name:>10}" for name in columns)))


def line(found: dict[str, Any]) -> str:
    cells = [found["load"], found["run"], found["requests"], found["failed"]]
    cells += [f"{found['output_tokens_per_s']:.1f}", f"{found['requests_per_s']:.2f}"]
    if "ttft_ms" in found:
        wanted = (("ttft", "p50"), ("ttft", "p99"), ("itl", "p50"), ("itl", "p99"), ("tpot", "p50"), ("e2e", "p50"))
        values = [(found[f"{name}_ms"] or {}).get(key) for name, key in wanted]
        values.append(found["client_late_ms"]["p99"])
        cells += ["-" if value is None else f"{value:.1f}" for value in values]
    if "goodput_requests_per_s" in found:
        cells.append(f"{found['goodput_requests_per_s']:.2f}")
    text = "".join(f"{cell:>10}" for cell in cells)
    per_token = 1e3 / max(1, found["output_tokens"])
    if used := found.get("cpu_s"):
        shown = ", ".join(f"{name} {seconds * per_token:.3f}" for name, seconds in used.items() if seconds >= 0.05)
        text += f"\n{'':10}CPU ms per output token: {shown}"
    for error, count in found.get("errors", {}).items():
        text += f"\n{'':10}{count} failed: {error}"
    return text


def save(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / (arguments.name or f"serve-{arguments.target}")
    path.with_name(f"{path.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if not plots.available():
        print("plots were left out: they need matplotlib (pip install 'quire[bench]')", file=sys.stderr)
    elif arguments.target != "offline":
        plots.draw([result], path)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return match[1] if match else platform.processor()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _peer_version(address: str) -> str | None:
    """As vLLM tells it."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/version", timeout=10) as answer:
            return str(json.load(answer)["version"])
    except (OSError, ValueError, KeyError):
        return None


if __name__ == "__main__":
    main()
