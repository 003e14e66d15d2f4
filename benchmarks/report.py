"""What the benchmarks have in common around their measurements: options, progress, Markdown tables, JSON files."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine

FLAGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "out": (("--out",), {"type": Path, "default": None, "metavar": "DIR", "help": "write Markdown and JSON here"}),
    "device": (
        ("--device",),
        {"choices": ["cuda", "cpu"], "default": "cuda", "help": "cpu: tiny sizes, interpreted kernels, no meaning"},
    ),
}

_started = time.monotonic()


def choose_device(name: str) -> torch.device:
    """Before anything imports triton, which then interprets where there is no GPU."""
    if name == "cpu":
        assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "triton came too early"
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: --device cpu runs everything through with tiny sizes, and measures nothing")
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", 0)


def progress(text: str) -> None:
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", file=sys.stderr, flush=True)


def describe_machine(machine: dict[str, Any]) -> list[str]:
    """Markdown lines."""
    lines = ["; ".join(f"{name} {value}" for name, value in machine.items()) + "."]
    if machine["device"] == "cpu":
        lines += ["", "**A run-through on a CPU, of tiny sizes: errors mean something, and no time does.**"]
    return lines


def host(device: str = "cpu") -> dict[str, object]:
    """As `timing.machine`, with the processor: for what is measured in earnest on one."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cores = len(os.sched_getaffinity(0))
    return {**machine(torch.device(device)), "cpu": name[1] if name else "unknown", "cores": cores}


def describe_host(found: dict[str, Any]) -> str:
    return "; ".join(f"{name} {value}" for name, value in found.items() if (name, value) != ("device", "cpu")) + "."


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def save(folder: Path, name: str, found: dict[str, Any], text: str) -> None:
    """`name`.json and `name`.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(_plain(found), indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def micro(seconds: float | None) -> str:
    """Microseconds, three digits or more."""
    if seconds is None:
        return ""
    us = seconds * 1e6
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"
