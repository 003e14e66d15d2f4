"""What a step of the scheduler costs, alone: no torch, no worker, no sockets.

    python -m benchmarks.scheduler [--running 256] [--steps 1000]

Every running sequence decodes one token per step; when one is full another takes its place, so that admissions,
block allocation and ends are all part of the measure. Prints microseconds per step for the given number of running
sequences and as that number grows.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import StepPlan, StepResult
from quire.scheduler.request import ModelLimits, Request
from quire.scheduler.scheduler import Scheduler

PROMPT, OUTPUT, BLOCK = 128, 512, 16
LIMITS = ModelLimits(vocab_size=32000, max_model_len=PROMPT + OUTPUT)


def measure(running: int, steps: int) -> tuple[list[float], list[float]]:
    """Microseconds of schedule() and of apply(), for each of `steps` steps with `running` sequences."""
    scheduler = _filled(running)
    plans, results = [], []
    added = running
    gc.disable()
    for _ in range(steps):
        start = time.perf_counter_ns()
        plan = scheduler.schedule()
        middle = time.perf_counter_ns()
        assert plan is not None and len(plan.rows) == running
        result = _answer(plan)
        before = time.perf_counter_ns()
        events = scheduler.apply(result)
        end = time.perf_counter_ns()
        plans.append((middle - start) / 1e3)
        results.append((end - before) / 1e3)
        for _ in events.ends:
            scheduler.add(request(added, 0))
            added += 1
    gc.enable()
    scheduler.audit()
    return plans, results


def _filled(running: int) -> Scheduler:
    """A scheduler whose sequences are spread evenly over their lives, as in a server that has run for a while."""
    scheduler = Scheduler(limits_for(running))
    for number in range(running):
        scheduler.add(request(number, number * (OUTPUT - 2) // running))
    plan = scheduler.schedule()
    while plan is not None and not len(plan.rows) == running == plan.num_sampled:
        scheduler.apply(_answer(plan))
        plan = scheduler.schedule()
    assert plan is not None
    scheduler.apply(_answer(plan))
    return scheduler


def limits_for(running: int) -> SchedulerConfig:
    """Room for exactly so many sequences at once."""
    return SchedulerConfig(
        num_blocks=running * (PROMPT + OUTPUT) // BLOCK + running,
        block_size=BLOCK,
        max_model_len=PROMPT + OUTPUT,
        max_num_seqs=running,
        max_num_batched_tokens=max(running * PROMPT, 2048),
        watermark=0.0,
    )


def request(number: int, served: int) -> Request:
    """`served`: how many of its output tokens count as produced already."""
    params = SamplingParams(max_tokens=OUTPUT - served, temperature=0)
    return Request.checked(str(number), range(3, 3 + PROMPT), params, number, LIMITS)


def _answer(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, (7,) * plan.num_sampled, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    print(
        f"{arguments.steps} steps each; microseconds, median (99th percentile); torch loaded: {'torch' in sys.modules}"
    )
    print(f"{'running':>8} {'schedule':>18} {'apply':>18} {'step':>18} {'per sequence':>13}")
    for running in sorted({16, 64, 256, 1024, arguments.running}):
        plans, results = measure(running, arguments.steps)
        steps = [a + b for a, b in zip(plans, results, strict=True)]
        cells = [f"{statistics.median(x):8.1f} ({_p99(x):7.1f})" for x in (plans, results, steps)]
        print(f"{running:8d} {cells[0]:>18} {cells[1]:>18} {cells[2]:>18} {statistics.median(steps) / running:13.2f}")


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


if __name__ == "__main__":
    main()
