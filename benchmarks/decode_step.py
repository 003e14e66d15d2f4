"""How long a step takes in which every sequence decodes one token, against the computed floor, by batch and context.

    python -m benchmarks.decode_step --model llama-3.1-8b [--batch 1,8,32] [--context 128,1k,8k] [--out DIR]
    python -m benchmarks.decode_step --model m160 --device cpu

The scheduler, the encoding of plans and the runner of the offline API, in one process: what is timed is what serves,
but for the sockets. Weights are random-normal, and so is what the KV pool holds: sequences start with their context
taken as computed. Steps are timed one by one from result to result, after a warm-up; the context given is that of the
step in the middle. Greedy, so that graphs cover all of the step where there are any.

On a GPU `device` is the time from the first to the last that a step issues, by the device's own clock. On a CPU it is
the call that computes the step. What a step takes beyond that is the host's exposed time.

Each model is measured in a process of its own, beside what the machine can read and multiply in the same run
(benchmarks/floors.py). Cases that do not fit the KV pool or the model's context are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, engines, floors, isolated, shapes
from benchmarks.report import describe_host, host, progress, save, table
from benchmarks.timing import quantile, settle

BATCHES = {"cuda": "1,8,32,64,128,256", "cpu": "1,8,32,64"}
CONTEXTS = {"cuda": "128,1k,8k", "cpu": "128,1k"}
STEPS = {"cuda": 40, "cpu": 12}
"""That are timed."""
WARM_UP = 6
CPU_POOL_BYTES = 3 << 30
CASE_SECONDS = 240
TARGETS_MS = {
    ("llama-3.1-8b", 1, 1024): 4.4,
    ("llama-3.1-8b", 64, 1024): 6.9,
    ("llama-3.2-1b", 1, 1024): 0.88,
    ("llama-3.2-1b", 64, 1024): 1.46,
}
"""Of an H200."""

Row = dict[str, Any]


def main() -> None:
    arguments = options().parse_args()
    if arguments.worker:
        reporter = isolated.Reporter(int(arguments.worker[0]))
        reporter.run(
            json.loads(arguments.worker[1]), lambda model: work(arguments, model, reporter), healthy=lambda: None
        )
        return
    found = run(arguments)
    print(describe(found))
    sys.exit(any(row.get("failure") for row in found["rows"]))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="folders and names of shapes  [default: m160]")
    parser.add_argument("--batch", default=None, help="sequences: 1,8,32")
    parser.add_argument("--context", default=None, help="tokens: 128,1k")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: a GPU if there is one")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--kv-cache-dtype", choices=["fp8"], default=None)
    parser.add_argument("--steps", type=int, default=None, help="timed for each case")
    parser.add_argument("--run-ahead", type=int, default=None, help="plans sent ahead of results")
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for all models")
    parser.add_argument("--ceilings", type=Path, default=None, metavar="FILE", help="JSON of benchmarks.ceilings")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="write Markdown and JSON here")
    # How a process of isolated.run_cases is told its work: the pipe, and the models' names.
    parser.add_argument("worker", nargs="*", help=argparse.SUPPRESS)
    return parser


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """{"machine", "limits": {model: …}, "rows"}: a row for every case that fits, and one for each model that failed.
    With `arguments.out`, written there after every one."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    command = [sys.executable, "-m", "benchmarks.decode_step", f"--device={device}"]
    for name in ("batch", "context", "dtype", "kv_cache_dtype", "steps", "run_ahead"):
        if (value := getattr(arguments, name)) is not None:
            command.append(f"--{name.replace('_', '-')}={value}")
    command += ["--enforce-eager"] * arguments.enforce_eager + ["--"]
    found: dict[str, Any] = {"machine": host(device), "rows": [], "limits": {}}
    measured = None
    if device == "cuda":
        at_best = torch.device(device)
        measured = ceilings.load(arguments.ceilings) if arguments.ceilings else ceilings.separately(at_best, short=True)
    for event in isolated.run_cases(command, arguments.model or ["m160"], CASE_SECONDS, arguments.limit):
        model = event["case"]
        if event["kind"] == "model":
            limits = floors.from_ceilings(measured, event["dtype"]) if measured else floors.Machine(**event["limits"])
            found["limits"][model] = asdict(limits)
        elif event["kind"] == "row":
            row = {"model": model, **event["row"]}
            finish(row, floors.Machine(**found["limits"][model]))
            found["rows"].append(row)
            progress(f"{model}, {row['batch']} x {row['context']}: {1e3 * row['seconds']:.2f} ms")
        elif event["kind"] == "error":
            found["rows"].append({"model": model, "failure": event["text"]})
        if arguments.out is not None:
            save(arguments.out, "decode_step", found, describe(found))
    return found


def finish(row: Row, limits: floors.Machine) -> None:
    """The floor of a row, and what follows from it."""
    cost = floors.Cost.of(row["model"], row["element_bytes"], row["kv_element_bytes"])
    row["floor"] = cost.decode(limits, row["batch"], row["batch"] * row["context"])
    row["ratio"] = row["seconds"] / row["floor"]
    row["tokens_per_s"] = row["batch"] / row["seconds"]
    row["exposed"] = max(0.0, 1 - row["device_seconds"] / row["seconds"])
    target = TARGETS_MS.get((row["model"], row["batch"], row["context"]))
    if target is not None and row["device"] == "cuda":
        row["target"] = target / 1e3


# -- one model, in this process


@dataclass(frozen=True, slots=True)
class Case:
    batch: int
    context: int
    """Tokens of each sequence in the middle of what is timed."""


def cases(batches: str, contexts: str) -> list[Case]:
    def numbers(text: str) -> list[int]:
        return [int(part[:-1]) * 1024 if part.endswith("k") else int(part) for part in text.split(",")]

    return [Case(batch, context) for context in numbers(contexts) for batch in numbers(batches)]


def blocks_needed(case: Case, steps: int, block_size: int) -> int:
    """Of all sequences until the last timed step, and one for each that may be reserved ahead."""
    return case.batch * (-(-(case.context + steps + WARM_UP) // block_size) + 1)


def work(arguments: argparse.Namespace, model: str, reporter: isolated.Reporter) -> None:
    from quire.cluster.config import EngineConfig, resolve
    from quire.cluster.local import LocalExecutor

    device = arguments.device
    steps = arguments.steps or STEPS[device]
    wanted = cases(arguments.batch or BATCHES[device], arguments.context or CONTEXTS[device])
    longest = context_limit(model)
    wanted = [case for case in wanted if case.context + steps + WARM_UP <= longest]
    if not wanted:
        raise ValueError(f"the model's context of {longest} tokens has no room for any of the cases")
    given: dict[str, Any] = {"device": device, "enforce_eager": arguments.enforce_eager}
    given |= {"dtype": arguments.dtype} if arguments.dtype else {}
    given |= {"kv_cache_dtype": arguments.kv_cache_dtype} if arguments.kv_cache_dtype else {}
    given["max_model_len"] = min(longest, max(case.context for case in wanted) + 2 * (steps + WARM_UP))
    given["max_num_seqs"] = max(case.batch for case in wanted)
    given["max_num_batched_tokens"] = max(2048, given["max_num_seqs"])
    with tempfile.TemporaryDirectory() as folder:
        given["model"] = engines.folder_of(model, Path(folder))
        given["load_format"] = "dummy" if engines.is_shape(model) else "auto"
        config = resolve(EngineConfig(**given))
        element_bytes = getattr(torch, config.dtype).itemsize
        kv_element_bytes = 1 if arguments.kv_cache_dtype == "fp8" else element_bytes
        if device == "cpu":
            block_bytes = floors.Cost.of(model, element_bytes, kv_element_bytes).kv_bytes * config.block_size
            room = CPU_POOL_BYTES // block_bytes
            wanted = [case for case in wanted if blocks_needed(case, steps, config.block_size) <= room]
            most = max(blocks_needed(case, steps, config.block_size) for case in wanted)
            most = max(most, -(-given["max_model_len"] // config.block_size))
            config = resolve(EngineConfig(**given, num_gpu_blocks_override=most))
        # A CPU's limits are measured here, before the model takes its memory; a GPU's have been.
        limits = asdict(floors.measure(torch.device(device), config.dtype)) if device == "cpu" else None
        executor = LocalExecutor(config.worker_config(0))
    reporter.send(model, "model", dtype=config.dtype, limits=limits)
    fill(executor._runner.pool.tensor)
    settle()
    run_ahead = config.run_ahead if arguments.run_ahead is None else arguments.run_ahead
    wanted = [case for case in wanted if blocks_needed(case, steps, config.block_size) <= executor.num_blocks]
    for case in wanted[:1]:  # once for nothing: threads are started and memory is touched
        list(decode(executor, config, case, steps, run_ahead))
    for case in wanted:
        timed = list(decode(executor, config, case, steps, run_ahead))
        row = summarize(timed) | {
            "batch": case.batch, "context": case.context, "device": device, "dtype": config.dtype,
            "element_bytes": element_bytes, "kv_element_bytes": kv_element_bytes, "run_ahead": run_ahead,
        }  # fmt: skip
        reporter.send(model, "row", row=row)
    executor.close()


def context_limit(model: str) -> int:
    config = shapes.config(model)
    return int(config["max_position_embeddings"])


def fill(pool: torch.Tensor) -> None:
    """Random-normal values, drawn once and repeated: what is no number would spread, and zeros are read faster."""
    raw = pool.flatten()
    size = min(len(raw), 1 << 24)
    drawn = torch.randn(size, device=pool.device).to(pool.dtype)
    for start in range(0, len(raw), size):
        part = raw[start : start + size]
        part.copy_(drawn[: len(part)])


class ContextGiven:
    """An executor before the one that computes: the step that would compute all prompts is answered here, and the next
    one admits their sequences with contexts that count as computed. Keeps the device's time of every step."""

    def __init__(self, executor: Any, device: str) -> None:
        self._executor = executor
        self._device = device
        self._admitted: tuple[Any, ...] = ()
        self._answers: deque[Any] = deque()
        self._events: list[Any] = []
        self.device_seconds: list[float] = []

    def submit(self, plan: Any) -> None:
        from quire.scheduler.plan import StepResult

        if plan.admitted:
            assert not self._admitted and plan.num_sampled == len(plan.admitted), "prompts in more than one step"
            self._admitted = plan.admitted
            self._answers.append(StepResult(plan.step, (1,) * len(plan.admitted), {}))
            return
        if self._admitted:
            known = [(entry, len(entry.token_ids)) for entry in self._admitted]
            plan = replace(
                plan,
                admitted=tuple(
                    replace(entry, token_ids=(*entry.token_ids, 1), num_computed=length) for entry, length in known
                ),
            )
            self._admitted = ()
        if self._device == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            self._executor.submit(plan)
            events[1].record()
            self._events.append(events)
            return
        began = time.perf_counter()
        self._executor.submit(plan)
        self.device_seconds.append(time.perf_counter() - began)

    def collect(self) -> Any:
        if self._answers:
            return self._answers.popleft()
        return self._executor.collect()

    def finish(self) -> None:
        """After the last step: reads the device's clock."""
        if self._device == "cuda":
            torch.cuda.synchronize()
            self.device_seconds = [start.elapsed_time(end) / 1e3 for start, end in self._events]


def decode(executor: Any, config: Any, case: Case, steps: int, run_ahead: int) -> Iterator[tuple[float, float]]:
    """(seconds from result to result, seconds of the device) of every timed step."""
    from quire.scheduler.config import SchedulerConfig
    from quire.scheduler.engine import Engine
    from quire.scheduler.params import SamplingParams
    from quire.scheduler.request import Request
    from quire.scheduler.scheduler import Scheduler

    executor.reset()
    length = max(1, case.context - WARM_UP - steps // 2)
    limits = SchedulerConfig(
        num_blocks=executor.num_blocks,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=case.batch * length + config.max_num_seqs,
        watermark=0.0,
    )
    scheduler = Scheduler(limits)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=min(config.max_model_len - length, 1 << 20))
    for index in range(case.batch):
        prompt = [(index + position) % config.limits.vocab_size for position in range(length)]
        scheduler.add(Request.checked(str(index), prompt, params, index, config.limits))
    given = ContextGiven(executor, config.device)
    engine = Engine(scheduler, given, run_ahead)
    engine.step()
    for _ in range(WARM_UP):
        engine.step()
    walls = []
    last = time.perf_counter()
    for _ in range(steps):
        tokens = engine.step()
        now = time.perf_counter()
        assert len(tokens) == case.batch
        walls.append(now - last)
        last = now
    given.finish()
    yield from zip(walls, given.device_seconds[WARM_UP : WARM_UP + steps], strict=True)
    for index in range(case.batch):
        scheduler.cancel(str(index))
    while scheduler.has_work and len(engine.step()):
        pass


def summarize(timed: list[tuple[float, float]]) -> Row:
    walls, device = (sorted(values) for values in zip(*timed, strict=True))
    return {
        "seconds": quantile(walls, 0.5), "p10": quantile(walls, 0.1), "p90": quantile(walls, 0.9),
        "device_seconds": quantile(device, 0.5), "samples": len(walls),
    }  # fmt: skip


# -- telling


def describe(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["## Decode steps", "", describe_host(found["machine"]), ""]
    for model, limits in found["limits"].items():
        lines.append(f"{Path(model).name}: the machine {floors.describe(floors.Machine(**limits))}, in the same run.")
    cells = []
    for row in found["rows"]:
        name = Path(row["model"]).name
        if "failure" in row:
            cells.append([name, "", "", row["failure"], "", "", "", "", "", "", ""])
            continue
        ms = {key: 1e3 * row[key] for key in ("seconds", "p10", "p90", "floor", "device_seconds")}
        cells.append(
            [
                name, str(row["batch"]), f"{row['context']:,}", f"{ms['seconds']:.2f}",
                f"{ms['p10']:.2f} to {ms['p90']:.2f}",
                f"{ms['floor']:.2f}", f"{row['ratio']:.2f}", f"{1e3 * row['target']:.2f}" if "target" in row else "",
                f"{row['tokens_per_s']:,.0f}", f"{ms['device_seconds']:.2f}", f"{100 * row['exposed']:.1f} %",
            ]
        )  # fmt: skip
    head = [
        "model", "batch", "context", "step, ms", "10th to 90th", "floor, ms", "step / floor", "target, ms", "tok/s",
        "device, ms", "host exposed",
    ]  # fmt: skip
    return "\n".join([*lines, "", *table(head, cells), ""])


if __name__ == "__main__":
    main()
