"""What this machine can do at best: memory bandwidth, matrix products, the link to the host, launches.

    python -m benchmarks.ceilings [--out DIR] [--short] [--device cpu]

Every other figure of a GPU is stated as a share of these, measured in the same session. Under 90 seconds; `--short`
takes the few that benchmarks/kernels.py needs, in ten. On a CPU it runs through with tiny sizes, for testing.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import shapes
from benchmarks.isolated import describe as describe_error
from benchmarks.report import FLAGS, choose_device, describe_machine, progress, save, table
from benchmarks.timing import Timing, machine, num_sets, replayed, settle, streamed

STREAM_BYTES = 4 << 30
"""Read by one call of the bandwidth measurements: seventy times an H200's L2."""

LINK_BYTES = 256 << 20
"""Moved by one round of the measurements of the host link."""

BLOCKS = [1 << n for n in (14, 16, 18, 19, 20, 21, 23, 26)]
"""Sizes of single copies: 16 KiB to 64 MiB."""

POOL_BLOCKS = [512 << 10, 2 << 20]
"""Bytes of a block of 16 tokens over all layers, of Llama-3.2-1B and of Llama-3.1-8B."""

ROWS = [1 << n for n in range(14)]
"""1 to 8192."""

LIMIT_SECONDS = 150
"""For all of it, when somebody waits for it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only what the kernels' figures are divided by")
    parser.add_argument(*FLAGS["out"][0], **FLAGS["out"][1])
    parser.add_argument(*FLAGS["device"][0], **FLAGS["device"][1])
    arguments = parser.parse_args()
    found = measure(choose_device(arguments.device), arguments.short)
    text = describe(found)
    print(text)
    if arguments.out is not None:
        save(arguments.out, "ceilings", found, text)


def measure(device: torch.device, short: bool = False) -> dict[str, Any]:
    """{"machine", "bandwidth": {name: bytes/s}, "products": [...], "link": [...], "launch": {name: s}}, and "failure"
    where something could not be measured."""
    settle()
    torch.manual_seed(0)
    dry = device.type == "cpu"
    stream_bytes, link_bytes = (1 << 20, 1 << 16) if dry else (STREAM_BYTES, LINK_BYTES)
    rows, sizes = [8192] if short else ROWS, [2 << 20] if short else BLOCKS
    if dry:
        rows, sizes = [2, 4], [1 << 12]
    found: dict[str, Any] = {"machine": machine(device), "bandwidth": {}, "products": [], "link": [], "launch": {}}
    failures = []
    parts: dict[str, Callable[[], Iterable[Any]]] = {
        "bandwidth": lambda: bandwidth(device, stream_bytes),
        "products": lambda: products(device, rows, dry, short),
        "link": lambda: link(device, sizes, link_bytes),
        "launch": lambda: launches(device),
    }
    if not short:
        parts["link "] = lambda: pool_link(device, [1 << 12] if dry else POOL_BLOCKS, link_bytes)
    for name, part in parts.items():
        progress(f"ceilings: {name}")
        try:
            for entry in part():
                keep(found[name.strip()], entry)
        except Exception as error:
            failures.append(f"{name.strip()}: {describe_error(error)}")
    return found | ({"failure": "; ".join(failures)} if failures else {})


def keep(kept: Any, entry: Any) -> None:
    """One by one, so that what fails later takes nothing along."""
    if isinstance(kept, dict):
        kept.update([entry])
    else:
        kept.append(entry)


def bandwidth(device: torch.device, num_bytes: int) -> Iterator[tuple[str, float]]:
    """Bytes per second: read alone, both counted of a copy, and written alone."""
    x = torch.randn(num_bytes // 4, device=device)
    best = num_bytes / replayed([partial(torch.sum, x)]).median
    yield "read", best
    for call in _own_reads(x):
        best = max(best, num_bytes / replayed([call]).median)
        yield "read", best
    half = len(x) // 2
    yield "copy", num_bytes / replayed([partial(x[:half].copy_, x[half:])]).median
    yield "write", num_bytes / replayed([partial(x.fill_, 1.5)]).median


def _own_reads(x: torch.Tensor) -> Iterator[Callable[[], Any]]:
    """Several cuts of the same sum: which is fastest differs between chips."""
    from benchmarks.ceiling_kernels import sum_parts

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    for block in (4096, 8192) if x.is_cuda else (1024,):
        for programs in (4 * processors, 16 * processors, 64 * processors):
            part = len(x) // programs // block * block
            if not part:
                continue
            sums = torch.full((programs,), torch.nan, device=x.device)
            # The tail that does not fill a program is added by torch, so that all of x is read.
            rest = x[part * programs :]

            def call(part: int = part, block: int = block, sums: torch.Tensor = sums, rest: torch.Tensor = rest) -> Any:
                sum_parts[(len(sums),)](x, sums, part, BLOCK=block, num_warps=8)
                return rest.sum() if len(rest) else None

            call()
            wide = float(x[: part * programs].view(programs, part).sum(1, dtype=torch.float64).sum())
            assert abs(float(sums.double().sum()) - wide) < 1e-3 * len(x) ** 0.5 + 1e-5 * abs(wide), "a wrong sum"
            yield call


def products(device: torch.device, rows: list[int], dry: bool, short: bool) -> Iterator[dict[str, Any]]:
    """x [M, in] times the weights [out, in] of a layer of Llama-3.1-8B, both random-normal: zeros run faster."""
    weights = {"tiny": (32, 16)} if dry else shapes.linears("llama-3.1-8b")
    if short and not dry:
        weights = {"gate_up": weights["gate_up"]}
    for dtype in (torch.bfloat16, torch.float16):
        for name, (out_size, in_size) in weights.items():
            size = out_size * in_size * dtype.itemsize
            count = 2 if dry else num_sets(size)
            stock = [torch.randn(out_size, in_size, device=device).to(dtype) for _ in range(count)]
            for m in rows:
                x = torch.randn(m, in_size, device=device).to(dtype)
                moved = size + (x.numel() + m * out_size) * dtype.itemsize
                timing = replayed([partial(F.linear, x, w) for w in stock], budget=0.06)
                yield {
                    "weight": name, "shape": [out_size, in_size], "dtype": str(dtype).removeprefix("torch."), "m": m,
                    "seconds": timing.median, "p10": timing.p10, "p90": timing.p90,
                    "flops_per_s": 2 * m * out_size * in_size / timing.median, "bytes_per_s": moved / timing.median,
                }  # fmt: skip


def link(device: torch.device, sizes: list[int], num_bytes: int) -> Iterator[dict[str, Any]]:
    """One copy for each block, several in a stream, blocks in shuffled order, from and to pinned memory."""
    host, pool = _pinned(device, num_bytes), torch.empty(num_bytes, dtype=torch.uint8, device=device)
    for size in sizes:
        count = min(num_bytes // size, 1024)
        here, there = host[: count * size].view(count, size), pool[: count * size].view(count, size)
        order = torch.randperm(count).tolist()
        ways = {
            "to device": [partial(there[j].copy_, here[i], non_blocking=True) for i, j in enumerate(order)],
            "to host": [partial(here[i].copy_, there[j], non_blocking=True) for i, j in enumerate(order)],
        }
        for way, calls in ways.items():
            yield _moved("copies in a stream", way, size, streamed(calls), size)
            if size <= 1 << 18:
                # Small copies cost the host more than the link: in a graph they do not.
                yield _moved("copies in a graph", way, size, replayed(calls), size)
        if size == 2 << 20 and device.type == "cuda":
            yield _moved("both ways at once", "both", size, streamed([_duplex(here, there)]), 2 * (count // 2) * size)


def _duplex(here: torch.Tensor, there: torch.Tensor) -> Callable[[], None]:
    """The first half of the blocks goes to the device while the second goes to the host, each on a stream."""
    up, down, half = torch.cuda.Stream(), torch.cuda.Stream(), len(here) // 2

    def call() -> None:
        now = torch.cuda.current_stream()
        for stream in (up, down):
            stream.wait_stream(now)
        for i in range(half):
            with torch.cuda.stream(up):
                there[i].copy_(here[i], non_blocking=True)
            with torch.cuda.stream(down):
                here[half + i].copy_(there[half + i], non_blocking=True)
        for stream in (up, down):
            now.wait_stream(stream)

    return call


def pool_link(device: torch.device, sizes: list[int], num_bytes: int) -> Iterator[dict[str, Any]]:
    """Blocks scattered over a pool, gathered by a kernel and moved by one copy: the other way to swap."""
    for size in sizes:
        count = num_bytes // size
        host = _pinned(device, num_bytes).view(count, size)
        pool = torch.empty(2 * count, size, dtype=torch.uint8, device=device).random_()
        blocks = torch.randperm(2 * count, device=device)[:count]
        staging = torch.empty(count, size, dtype=torch.uint8, device=device)

        def out(
            pool: torch.Tensor = pool, blocks: torch.Tensor = blocks, staging: torch.Tensor = staging,
            host: torch.Tensor = host,
        ) -> None:  # fmt: skip
            torch.index_select(pool, 0, blocks, out=staging)
            host.copy_(staging, non_blocking=True)

        def back(
            pool: torch.Tensor = pool, blocks: torch.Tensor = blocks, staging: torch.Tensor = staging,
            host: torch.Tensor = host,
        ) -> None:  # fmt: skip
            staging.copy_(host, non_blocking=True)
            pool.index_copy_(0, blocks, staging)

        for way, call in (("to host", out), ("to device", back)):
            yield _moved("gather kernel and one copy", way, size, streamed([call]), count * size)


def _pinned(device: torch.device, num_bytes: int) -> torch.Tensor:
    """Random bytes, made on the device, which is faster at it."""
    made = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda").copy_(made)


def _moved(form: str, way: str, size: int, timing: Timing, num_bytes: int) -> dict[str, Any]:
    """`num_bytes`: moved by one call that `timing` timed."""
    speed = num_bytes / timing.median
    return {"form": form, "way": way, "block_bytes": size, "seconds": timing.median, "bytes_per_s": speed}


def launches(device: torch.device) -> Iterator[tuple[str, float]]:
    """Seconds from one kernel to the next that needs its result, where neither does anything."""
    from benchmarks.ceiling_kernels import nothing

    x = torch.zeros(1, device=device)
    calls: dict[str, Callable[[], Any]] = {"triton": partial(nothing[(1,)], x), "torch": partial(x.add_, 1)}
    many = 1000 if device.type == "cuda" else 2
    for name, call in calls.items():
        yield f"{name} in a graph", replayed([call] * many).median
        yield f"{name} from Python", streamed([call] * many).median


def describe(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["## Ceilings", ""]
    lines += [f"Not measured: {found['failure']}.", ""] if "failure" in found else []
    if "machine" not in found:
        return "\n".join(lines)
    lines += [*describe_machine(found["machine"]), ""]
    read = found["bandwidth"].get("read", math.nan)
    lines += table(["memory", "TB/s"], [[name, f"{value / 1e12:.2f}"] for name, value in found["bandwidth"].items()])
    cells = [
        [p["weight"], p["dtype"], str(p["m"]), f"{p['seconds'] * 1e6:.1f}", f"{p['flops_per_s'] / 1e12:.1f}",
         f"{p['bytes_per_s'] / 1e9:.0f}", f"{100 * p['bytes_per_s'] / read:.0f} %"]
        for p in found["products"]
    ]  # fmt: skip
    lines += ["", *table(["weight", "type", "rows", "us", "TFLOP/s", "GB/s", "of read bandwidth"], cells)]
    cells = [[e["form"], e["way"], f"{e['block_bytes'] >> 10}", f"{e['bytes_per_s'] / 1e9:.1f}"] for e in found["link"]]
    lines += ["", *table(["host link", "way", "KiB each", "GB/s"], cells)]
    cells = [[name, f"{seconds * 1e6:.2f}"] for name, seconds in found["launch"].items()]
    return "\n".join([*lines, "", *table(["empty kernels", "us each"], cells), ""])


def best_product(found: dict[str, Any], dtype: str) -> float:
    """The most operations per second seen in any product of that element type."""
    return max((p["flops_per_s"] for p in found["products"] if p["dtype"] == dtype), default=float("nan"))


def best_link(found: dict[str, Any], way: str) -> float:
    """Bytes per second that the host link reaches with large copies: "to host" or "to device"."""
    return max((e["bytes_per_s"] for e in found["link"] if e["way"] == way), default=float("nan"))


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def separately(device: torch.device, short: bool) -> dict[str, Any]:
    """Measured by a process of its own, which keeps no memory and breaks nothing; empty where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.ceilings", "--device", device.type, "--out", folder]
        try:
            subprocess.run(
                [*command, *["--short"] * short], check=True, timeout=LIMIT_SECONDS, stdout=subprocess.DEVNULL
            )
            return load(Path(folder) / "ceilings.json")
        except (OSError, subprocess.SubprocessError) as error:
            return {"bandwidth": {}, "products": [], "link": [], "launch": {}, "failure": str(error)}


if __name__ == "__main__":
    main()
