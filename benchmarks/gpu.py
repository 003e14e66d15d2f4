"""Everything that is measured of a GPU, by one command and without Ray: what it can do at best, the steps of whole
models, whole engines beside each other, and single kernels.

    python -m benchmarks.gpu [--out DIR] [--limit 590] [--parts ceilings,decode_step,...] [--device cpu]

Under ten minutes. Each part is a process of its own with a limit of its own; what a part has measured when it fails or
runs out of time is kept. Parts run in this order, and the last ones take what time is left:

    ceilings      memory, products, host link, launches
    decode_step   Llama-3.1-8B's and Llama-3.2-1B's shapes, 1 to 256 sequences of 1k
    offline       the nano workload on Qwen3-0.6B's shape, beside transformers, and beside vLLM where it is installed
    kernels       every operation, a quarter of the samples
    offline-8b    the nano workload on Llama-3.1-8B's shape

Prints every part and, last, one table of what was to be reached; with `--out` writes DIR/<date>-<GPU>.md and .json. The
exit code is 1 where something failed. `--device cpu` runs all of it with tiny sizes, for no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import FLAGS, choose_device, progress, save, table
from benchmarks.timing import machine

TOTAL_SECONDS = 590
END_SECONDS = 5
"""Kept back for the report."""

ENGINE_SECONDS = 100
"""For one engine of the offline parts, its loading and its warm-up run included."""

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    module: str
    arguments: list[str]
    tiny: list[str]
    """In their place on a CPU."""
    file: str
    """Where it leaves what it found: NAME.json and NAME.md in its --out."""
    limit: float
    """Seconds, where so many are left."""
    least: float = 20.0
    """With fewer left it is not begun."""


def nano(model: str, *peers: str) -> list[str]:
    named = [f"--peer={peer}" for peer in peers]
    return [f"--model={model}", "--workload=nano", "--max-num-seqs=256", "--floor", f"--limit={ENGINE_SECONDS}", *named]


def parts(peers: list[str]) -> dict[str, Part]:
    tiny = ["--model=m30", "--workload=tiny", "--floor", "--repeat=1", "--peer=transformers", "--peer=generate"]
    return {
        "ceilings": Part("ceilings", [], [], "ceilings", 120),
        "decode_step": Part(
            "decode_step",
            ["--model=llama-3.1-8b", "--model=llama-3.2-1b", "--batch=1,16,64,256", "--context=1k"],
            ["--model=m30", "--batch=1,3", "--context=32", "--steps=2"],
            "decode_step",
            180,
        ),
        "offline": Part("offline", nano("qwen3-0.6b", *peers), tiny, "offline-*", 220),
        "kernels": Part("kernels", ["--quick"], ["--quick", "--only=rms_norm T=1"], "kernels", 150),
        "offline-8b": Part("offline", nano("llama-3.1-8b"), tiny[:-2], "offline-*", 120, least=60.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=None, help="some of them, in any order  [default: all]")
    parser.add_argument("--limit", type=float, default=TOTAL_SECONDS, help="seconds for everything")
    parser.add_argument("--model", action="append", default=[], help="of decode_step, in place of the shapes above")
    parser.add_argument(*FLAGS["out"][0], **FLAGS["out"][1])
    parser.add_argument(*FLAGS["device"][0], **FLAGS["device"][1])
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    peers = ["transformers"] + ["vllm"] * (importlib.util.find_spec("vllm") is not None)
    known = parts(peers)
    chosen = arguments.parts.split(",") if arguments.parts else list(known)
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"no part is called {', '.join(sorted(unknown))}: give some of {', '.join(known)}")
    found: Found = {"machine": machine(device), "parts": {}}
    deadline = time.monotonic() + arguments.limit - END_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in known if name in chosen):
            part = known[name]
            command = [sys.executable, "-m", f"benchmarks.{part.module}", f"--device={device.type}"]
            own = part.tiny if device.type == "cpu" else part.arguments
            if arguments.model and part.module == "decode_step":
                own = [*(word for word in own if "--model" not in word), *(f"--model={m}" for m in arguments.model)]
            out = Path(folder) / name
            # Measured once: what comes after ceilings reads it.
            known_limits = Path(folder) / "ceilings" / "ceilings.json"
            if part.module != "ceilings" and device.type == "cuda" and known_limits.exists():
                own = [*own, f"--ceilings={known_limits}"]
            if part.module in ("decode_step", "kernels"):
                own = [*own, f"--limit={part.limit - END_SECONDS}"]
            found["parts"][name] = run_part([*command, *own, f"--out={out}"], part, out, deadline)
            progress(f"{name}: {found['parts'][name].get('failure', 'done')}")
            found["summary"] = summary(found)
            if arguments.out is not None:
                save(arguments.out, file_name(found["machine"]), found, describe(found))
    print(describe(found))
    sys.exit(any("failure" in part for part in found["parts"].values()))


def run_part(command: list[str], part: Part, out: Path, deadline: float) -> Found:
    """{"found": its JSON, "text": its Markdown, "seconds"}, what there is of them, and "failure" where it did not end
    well."""
    began = time.monotonic()
    limit = min(part.limit, deadline - began)
    if limit < min(part.least, part.limit):
        return {"failure": "not run: no time was left"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    result: Found = {}
    try:
        if process.wait(timeout=limit):
            result["failure"] = f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        result["failure"] = f"not done after {limit:.0f} s"
    finally:
        end_group(process)
    result["seconds"] = round(time.monotonic() - began, 1)
    for file in sorted(out.glob(f"{part.file}.json")):
        result["found"], result["text"] = json.loads(file.read_text()), file.with_suffix(".md").read_text()
    if "found" not in result:
        result.setdefault("failure", "it left nothing")
    return result


def end_group(process: subprocess.Popen[bytes]) -> None:
    """The part's process, and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# -- telling


def summary(found: Found) -> list[list[str]]:
    """Rows of: what, measured, floor, of the floor, target, met."""
    rows = []
    tellers: dict[str, Callable[[Found], list[list[str]]]] = {
        "ceilings": _ceilings, "decode_step": _decode_steps, "offline": _offline, "kernels": _kernels,
    }  # fmt: skip
    for name, part in found["parts"].items():
        if "found" in part:
            rows += tellers[name.partition("-8b")[0]](part["found"])
        if "failure" in part:
            rows.append([name, part["failure"], "", "", "", ""])
    return rows


def _ceilings(found: Found) -> list[list[str]]:
    rows = [[f"memory, {name}", f"{rate / 1e12:.2f} TB/s", "", "", "", ""] for name, rate in found["bandwidth"].items()]
    best = max((entry["flops_per_s"] for entry in found["products"] if entry["dtype"] == "bfloat16"), default=None)
    return rows + ([["products, bfloat16", f"{best / 1e12:.0f} TFLOP/s", "", "", "", ""]] if best else [])


def _decode_steps(found: Found) -> list[list[str]]:
    rows = []
    for row in found["rows"]:
        if "failure" in row:
            rows.append([f"decode step, {row['model']}", row["failure"], "", "", "", ""])
            continue
        target = row.get("target")
        rows.append(
            [
                f"decode step, {Path(row['model']).name}, {row['batch']} x {row['context']:,}",
                f"{1e3 * row['seconds']:.2f} ms", f"{1e3 * row['floor']:.2f} ms", f"{100 / row['ratio']:.0f} %",
                f"<= {1e3 * target:.2f} ms" if target else "", _met(row["seconds"] <= target) if target else "",
            ]
        )  # fmt: skip
        if row["batch"] == 64 and row["context"] == 1024 and "8b" in row["model"]:
            exposed = row["exposed"]
            rows.append(["its exposed host time", f"{100 * exposed:.1f} %", "", "", "<= 2 %", _met(exposed <= 0.02)])
    return rows


TARGET_TOKENS = {"qwen3-0.6b": 27_800, "llama-3.1-8b": 10_100}
"""Output tokens per second of the nano workload on an H200."""
TARGET_RATIO = {"transformers": 4.0, "vllm": 1.0}


def _offline(found: Found) -> list[list[str]]:
    rows = []
    floor = found.get("floor", {}).get("output_tokens_per_s")
    quire = found["engines"]["quire"].get("output_tokens_per_s")
    is_target = found["workload"] == "nano" and "cuda" in found["machine"]
    for name, line in found["engines"].items():
        speed = line.get("output_tokens_per_s")
        what = f"{found['workload']}, {Path(found['model']).name}, {name}"
        if not speed or "failure" in line:
            rows.append([what, line.get("failure", "nothing came"), "", "", "", ""])
            continue
        shares = [f"{floor:,.0f} tok/s", f"{100 * speed / floor:.0f} %"] if floor else ["", ""]
        target = TARGET_TOKENS.get(found["model"]) if is_target and name == "quire" else None
        told = [f">= {target:,} tok/s", _met(speed >= target)] if target else ["", ""]
        rows.append([what, f"{speed:,.0f} tok/s", *shares, *told])
        if name != "quire" and quire:
            least = TARGET_RATIO.get(name) if is_target else None
            told = [f">= {least:.1f}", _met(quire / speed >= least)] if least else ["", ""]
            rows.append([f"Quire / {name}", f"{quire / speed:.2f}", "", "", *told])
    return rows


def _kernels(found: Found) -> list[list[str]]:
    rows = found["rows"]
    failed = [row["case"] for row in rows if row.get("failure")]
    aimed = [row for row in rows if row.get("met") is not None]
    met = sum(bool(row["met"]) for row in aimed)
    told = f"{len(rows) - len(failed)} of {len(rows)} right" + (f"; failed: {', '.join(failed)}" if failed else "")
    return [["kernels", told, "", "", f"{len(aimed)} have targets", f"{met} of {len(aimed)}"]]


def _met(yes: bool) -> str:
    return "yes" if yes else "**no**"


def describe(found: Found) -> str:
    """Markdown: every part, then the table."""
    texts = [part["text"] for part in found["parts"].values() if "text" in part]
    head = ["what", "measured", "floor", "of the floor", "target", "met"]
    took = ", ".join(f"{name} {part.get('seconds', 0):.0f} s" for name, part in found["parts"].items())
    lines = [f"# {file_name(found['machine'])}", "", *texts, "## In one table", "", f"Took: {took}.", ""]
    if found["machine"]["device"] == "cpu":
        lines += ["**A run-through on a CPU, of tiny sizes: no figure means anything.**", ""]
    return "\n".join([*lines, *table(head, summary(found)), ""])


def file_name(machine: dict[str, object]) -> str:
    """As in benchmarks/results: 2026-11-21-nvidia-h200."""
    gpu = re.sub(r"[^a-z0-9]+", "-", str(machine["device"]).lower()).strip("-")
    return f"{str(machine['date'])[:10]}-{gpu}"


if __name__ == "__main__":
    main()
