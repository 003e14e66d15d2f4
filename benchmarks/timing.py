"""How long work on a GPU takes: graph replays between events, inputs rotated past the cache, medians and spreads.

On a CPU the same functions time a handful of calls by the wall clock, so that every benchmark can be run through
without a GPU; such figures mean nothing and are marked "cpu".
"""

from __future__ import annotations

import gc
import math
import platform
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

Call = Callable[[], Any]

ROTATED_BYTES = 512 << 20
"""What the inputs of one round of calls take together, so that no call finds its own in the cache: several times the
largest L2 (60 MB on an H200, 126 MB on a B200)."""

MOST_SETS = 64
"""Input sets of one round. What is smaller than ROTATED_BYTES / MOST_SETS is timed warm, as it runs in a model, where
the kernel before has just written it."""

ROUND_SECONDS = 1e-3
"""A graph is given rounds until it takes about this long: the clock of an event steps by half a microsecond."""

MOST_CALLS = 2048
"""Calls in one graph."""

BUDGET_SECONDS = 0.12
"""Time on the device for one measurement, warm-up and capture not counted."""

FEWEST, MOST = 12, 200
"""Samples of one measurement."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call."""

    median: float
    p10: float
    p90: float
    samples: int
    how: str
    """"graph": replayed; "stream": issued call by call, so that the host may be the slower part; "host": by the host's
    clock; "cpu": no GPU, no meaning."""


def summarize(samples: Sequence[float], how: str) -> Timing:
    ordered = sorted(samples)
    return Timing(statistics.median(ordered), quantile(ordered, 0.1), quantile(ordered, 0.9), len(ordered), how)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two samples beside it."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def num_sets(set_bytes: float) -> int:
    """Input sets that a call reading `set_bytes` takes turns with."""
    return max(1, min(MOST_SETS, math.ceil(ROTATED_BYTES / max(set_bytes, 1))))


def replayed(calls: Sequence[Call], budget: float = BUDGET_SECONDS) -> Timing:
    """Seconds per call of `calls`, taken in turn inside a CUDA graph; whatever they build at first use is built before.

    The outputs of one round live side by side, as the inputs do. Raises what capturing raises where a call cannot be
    captured.
    """
    if not torch.cuda.is_available():
        return _wall(calls)
    _warm_up(calls)
    rounds = _rounds(calls)
    graph = torch.cuda.CUDAGraph()
    outputs: deque[Any] = deque(maxlen=len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                outputs.append(call())
    return summarize(_samples(graph.replay, rounds * len(calls), budget), "graph")


def streamed(calls: Sequence[Call], budget: float = BUDGET_SECONDS) -> Timing:
    """As `replayed`, issued from Python: for what cannot be captured, or is not in a server."""
    if not torch.cuda.is_available():
        return _wall(calls)
    _warm_up(calls)
    rounds = _rounds(calls)

    def issue() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    return summarize(_samples(issue, rounds * len(calls), budget), "stream")


def hosted(call: Call, budget: float = BUDGET_SECONDS) -> Timing:
    """Seconds from an idle device through the call to an idle device: what a step waits for."""
    return _on_the_host(call, budget)[1]


def issued(call: Call, budget: float = BUDGET_SECONDS) -> Timing:
    """Seconds until the call returns, its work under way: what it costs the host."""
    return _on_the_host(call, budget)[0]


def _on_the_host(call: Call, budget: float) -> tuple[Timing, Timing]:
    if not torch.cuda.is_available():
        return _wall([call]), _wall([call])
    call()
    torch.cuda.synchronize()
    returned: list[float] = []
    done: list[float] = []
    end = time.perf_counter() + budget
    while len(done) < FEWEST or (time.perf_counter() < end and len(done) < MOST):
        start = time.perf_counter()
        call()
        returned.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        done.append(time.perf_counter() - start)
    return summarize(returned, "host"), summarize(done, "host")


def _warm_up(calls: Sequence[Call]) -> None:
    """On a stream of its own, as capturing wants it: compiles, loads and creates handles. Every call once: each may
    build something at its first use."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls, calls[0]):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def _rounds(calls: Sequence[Call]) -> int:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    seconds = start.elapsed_time(end) / 1e3
    return max(1, min(math.ceil(ROUND_SECONDS / max(seconds, 1e-6)), MOST_CALLS // len(calls)))


def _samples(issue: Call, count: int, budget: float) -> list[float]:
    """Seconds per call, one sample for each issue of `count` calls. The first is thrown away: the device waited for
    the host. The others are issued while their predecessors run."""
    once = _between(issue, 2)[-1]
    repeats = max(FEWEST, min(MOST, round(budget / max(once, 1e-6))))
    return [seconds / count for seconds in _between(issue, repeats + 1)[1:]]


def _between(issue: Call, repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        issue()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _wall(calls: Sequence[Call]) -> Timing:
    samples = []
    for call in calls[:2]:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return summarize(samples, "cpu")


def settle() -> None:
    """Before measuring: what exists now is never collected again, as capturing a graph collects every time."""
    gc.collect()
    gc.freeze()


def machine(device: torch.device) -> dict[str, object]:
    """What a figure is worth nothing without."""
    found: dict[str, object] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": "cpu",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": getattr(properties, "L2_cache_size", 0) >> 20,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return found


def _driver() -> str:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.split()[0] if answer.stdout.split() else "unknown"


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
