"""Every operation of kernels/ on a GPU: checked in higher precision, then timed, beside what the machine can do, what
torch does and what FlashInfer's and vLLM's kernels do where they are installed.

    python -m benchmarks.kernels [--only NAME]... [--out DIR] [--quick] [--peers LIST] [--device cpu] [--list]

`--only` takes any part of a case's name. Each case is checked on fresh random inputs, in a pool that is NaN wherever
nothing may be read, and is timed as replays of a CUDA graph over inputs that no cache holds. A case that fails says so
in its row and stops no other; the exit code is then 1. On a CPU everything but the timing runs through, with tiny sizes
and interpreted kernels.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, isolated
from benchmarks.report import FLAGS, choose_device, describe_machine, micro, progress, save, table
from benchmarks.timing import BUDGET_SECONDS, Timing, machine, settle
from benchmarks.work import Case, Peer, Setting, Target, Work

CASE_SECONDS = 90
"""For one case or one peer, compilation included; FlashInfer builds its kernels at first use."""

TOTAL_SECONDS = 300

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--list", action="store_true", help="names of the cases, and nothing else")
    parser.add_argument("--ceilings", type=Path, default=None, metavar="FILE", help="JSON of benchmarks.ceilings")
    # How a process of isolated.run_cases is told its work: the pipe, and the cases' names.
    parser.add_argument("worker", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work_through(arguments, int(arguments.worker[0]), json.loads(arguments.worker[1]))
        return
    device = choose_device(arguments.device)
    names = chosen(arguments.only)
    if arguments.list or not names:
        print("\n".join(names or ["no case has such a name; these exist:", *cases()]))
        sys.exit(not names)
    limits = ceilings.load(arguments.ceilings) if arguments.ceilings else ceilings.separately(device, short=True)
    found = run(arguments, device, names, limits)
    print(describe(found))
    sys.exit(any(row.get("failure") for row in found["rows"]))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="cases with this in their name")
    parser.add_argument("--quick", action="store_true", help="a quarter of the samples, and nothing beside the calls")
    parser.add_argument("--peers", default="all", metavar="LIST", help="all, none, or some: sdpa,torch,flashinfer,vllm")
    parser.add_argument("--limit", type=float, default=TOTAL_SECONDS, help="seconds for all cases together")
    parser.add_argument("--case-limit", type=float, default=CASE_SECONDS, help="seconds for one")
    parser.add_argument(*FLAGS["out"][0], **FLAGS["out"][1])
    parser.add_argument(*FLAGS["device"][0], **FLAGS["device"][1])


def chosen(parts: list[str]) -> list[str]:
    """Names of the cases with any of these in them; all, where none is given."""
    return [name for name in cases() if not parts or any(part in name for part in parts)]


def cases() -> dict[str, Case]:
    """By name, in the order in which they run."""
    from benchmarks import attention_cases, block_cases, layer_cases, sampling_cases

    return {**attention_cases.CASES, **layer_cases.CASES, **block_cases.CASES, **sampling_cases.CASES}


def run(
    arguments: argparse.Namespace, device: torch.device, names: list[str], limits: dict[str, Any]
) -> dict[str, Any]:
    """{"machine", "ceilings", "seconds", "rows"}; with `arguments.out`, written there after every case."""
    started = time.monotonic()
    rows: dict[str, Row] = {name: {"case": name} for name in names}
    found: dict[str, Any] = {"machine": machine(device), "ceilings": limits, "rows": list(rows.values())}
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", device.type, "--peers", arguments.peers]
    command += ["--quick"] if arguments.quick else []
    for event in isolated.run_cases([*command, "--"], names, arguments.case_limit, arguments.limit):
        row = rows[event["case"]]
        if event["kind"] == "row":
            row |= event["row"]
        elif event["kind"] == "peer":
            row.setdefault("peers", {})[event["peer"]] = event["found"]
        elif event["kind"] == "error":
            row["failure"] = event["text"]
        if event["kind"] in ("end", "error"):
            finish(row, limits)
            progress(f"{row['case']}: {row.get('failure') or outcome(row)}")
            found["seconds"] = round(time.monotonic() - started, 1)
            if arguments.out is not None:
                save(arguments.out, "kernels", found, describe(found))
    return found


def outcome(row: Row) -> str:
    share = row.get("share")
    return f"{micro(row['seconds'])} us" + ("" if share is None else f", {100 * share:.0f} % of the ceiling")


def finish(row: Row, limits: dict[str, Any]) -> None:
    """What follows from a time: rates, the share of what the machine could do, and whether the target is met."""
    seconds = row.get("seconds")
    if not seconds:
        return
    row["bytes_per_s"], row["flops_per_s"] = row["num_bytes"] / seconds, row["flops"] / seconds
    row["floor"] = floor(row, limits)
    row["share"] = row["floor"] / seconds if row["floor"] else None
    if "goal" in row and row["how"] != "cpu":
        row["met"] = Target(**row["goal"]).met(row)


def floor(row: Row, limits: dict[str, Any]) -> float | None:
    """Seconds that this machine needs at least: for the bytes or for the products, whichever takes longer."""
    bandwidths = {way: ceilings.best_link(limits, way) for way in ("to host", "to device")} | limits["bandwidth"]
    times = [row["num_bytes"] / bandwidths.get(row["against"], math.nan)] if row["num_bytes"] else []
    if row["flops"]:
        times.append(row["flops"] / ceilings.best_product(limits, row["dtype"]))
    times = [seconds for seconds in times if math.isfinite(seconds)]
    return max(times, default=None)


def work_through(arguments: argparse.Namespace, pipe: int, names: list[str]) -> None:
    """The process with the GPU."""
    device = choose_device(arguments.device)
    if device.type == "cpu":
        from quire.kernels import dispatch

        def interpreted(x: torch.Tensor) -> bool:  # noqa: ARG001
            """The launchers for a GPU run, interpreted."""
            return True

        dispatch.on_gpu = interpreted
    settle()
    setting = Setting(device, device.type == "cpu", arguments.quick)
    reporter, known = isolated.Reporter(pipe), cases()

    def work(name: str) -> None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for kind, values in measure(known[name], setting, arguments.peers):
            reporter.send(name, kind, **values)

    def healthy() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.zeros(1, device=device).add_(1).item()

    reporter.run(names, work, healthy)


def measure(case: Case, setting: Setting, peers: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """One case: "row" with its own figures, then "peer" for each other way."""
    budget = BUDGET_SECONDS / (4 if setting.quick else 1)
    torch.manual_seed(time.time_ns() & 0xFFFFFFFF)
    work = case(setting)
    error = work.check()
    row: Row = {
        "error": error, "tolerance": work.tolerance, "num_bytes": work.num_bytes, "flops": work.flops,
        "dtype": work.dtype, "against": work.against,
    }  # fmt: skip
    if work.target is not None:
        row |= {"target": str(work.target), "goal": asdict(work.target)}
    if not error <= work.tolerance:
        yield "row", {"row": row}
        raise ArithmeticError(f"relative error {error:.2g}, allowed {work.tolerance:.2g}: not timed")
    timing = work.how(work.calls, budget)
    row |= asdict_timing(timing) | {"calls": len(work.calls)}
    yield "row", {"row": row}
    if not setting.quick:
        yield "row", {"row": {"extras": {name: measure_extra(how) for name, how in work.extras.items()}}}
    yield from measure_peers(work, peers, budget, setting)


def measure_extra(how: Callable[[], Timing]) -> float | str:
    """Seconds, or why there are none."""
    try:
        return how().median
    except Exception as error:
        return isolated.describe(error)


def measure_peers(work: Work, names: str, budget: float, setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    wanted = {
        name: build
        for name, build in work.peers.items()
        if names == "all" or any(part in name.lower() for part in names.split(","))
    }
    if wanted and work.prepare_peers is not None:
        work.prepare_peers()
    for name, build in wanted.items():
        try:
            found = measure_peer(build(), budget)
        except Exception as error:
            found = {"failure": isolated.describe(error)}
            if setting.device.type == "cuda":
                torch.cuda.synchronize()
        yield "peer", {"peer": name, "found": found}


def measure_peer(peer: Peer, budget: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if peer.error is not None:
        found["error"] = peer.error()
    timing = peer.how(peer.calls, budget)
    return found | asdict_timing(timing)


def asdict_timing(timing: Timing) -> dict[str, Any]:
    found = asdict(timing)
    return {"seconds": found.pop("median"), **found}


def describe(found: dict[str, Any]) -> str:
    """Markdown: one row per case."""
    limits, rows = found["ceilings"], found["rows"]
    lines = ["## Kernels", "", *describe_machine(found["machine"]), ""]
    rates = [f"{name} {value / 1e12:.2f} TB/s" for name, value in limits["bandwidth"].items()]
    for dtype in ("bfloat16", "float16"):
        rates.append(f"{dtype} {ceilings.best_product(limits, dtype) / 1e12:.0f} TFLOP/s")
    rates += [f"{way} {ceilings.best_link(limits, way) / 1e9:.1f} GB/s" for way in ("to host", "to device")]
    lines += ["Ceilings: " + ", ".join(rates) + ".", ""]
    head = [
        "case",
        "error",
        "us",
        "p10-p90",
        "GB/s",
        "TFLOP/s",
        "of ceiling",
        "target",
        "met",
        "beside (its us: ratio)",
    ]
    lines += table(head, [cells(row) for row in rows])
    more = [
        [row["case"], name, value if isinstance(value, str) else micro(value)]
        for row in rows
        for name, value in row.get("extras", {}).items()
    ]
    lines += ["", *table(["case", "beside the call itself", "us"], more)] if more else []
    failed = [row["case"] for row in rows if row.get("failure")]
    missed = [row["case"] for row in rows if row.get("met") is False]
    done = sum("seconds" in row and not row.get("failure") for row in rows)
    lines += ["", f"{done} of {len(rows)} cases ran without a failure, in {found.get('seconds', 0):.0f} s."]
    lines += [f"Failed: {', '.join(failed)}."] if failed else []
    lines += [f"Targets missed: {', '.join(missed)}."] if missed else []
    return "\n".join([*lines, LEGEND, ""])


LEGEND = """
us: median of one call. A ratio above 1: ours is faster by so much. `of ceiling`: the time that the call's bytes or
products take at the measured ceilings, whichever is longer, as a share of the measured time. Times marked * are of
calls issued from Python, the others of a replayed graph."""


def cells(row: Row) -> list[str]:
    name, error = row["case"], row.get("error")
    shown = "" if error is None else f"{error:.1e}"
    seconds = row.get("seconds")
    if seconds is None:
        return [name, shown, row.get("failure", "not run"), *[""] * 7]
    mark = "*" if row["how"] == "stream" else ""
    met = {True: "yes", False: "no", None: ""}[row.get("met")]
    rate = f"{row['bytes_per_s'] / 1e9:.0f}" if row["num_bytes"] else ""
    products = f"{row['flops_per_s'] / 1e12:.1f}" if row["flops"] else ""
    share = "" if row.get("share") is None else f"{100 * row['share']:.0f} %"
    beside = [beside_cell(peer, found, seconds) for peer, found in row.get("peers", {}).items()]
    beside += [f"then: {row['failure']}"] if row.get("failure") else []
    spread = f"{micro(row['p10'])}-{micro(row['p90'])}"
    target = row.get("target", "")
    return [name, shown, micro(seconds) + mark, spread, rate, products, share, target, met, "; ".join(beside)]


def beside_cell(name: str, found: dict[str, Any], seconds: float) -> str:
    if "failure" in found:
        return f"{name}: {found['failure'][:60]}"
    error = found.get("error")
    doubt = "" if error is None or error < 2e-2 else f" (its error {error:.1e})"
    return f"{name} {micro(found['seconds'])}: {found['seconds'] / seconds:.2f}x{doubt}"


if __name__ == "__main__":
    main()
