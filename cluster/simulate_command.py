"""`quire simulate`: what a model on so many GPUs would serve of a trace, told by the scheduler that would serve it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.cluster.config import ConfigError
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.simulate import Report, Simulation, percentile, sustained_rate
from quire.scheduler.simulation import traces
from quire.scheduler.simulation.costs import GPUS, SHAPES, CostModel, Gpu, Shape, Work
from quire.scheduler.simulation.gpu import SimulatedGpu
from quire.scheduler.simulation.traces import Job, TraceError

COUNTS = (1, 2, 4, 8)
"""Numbers of GPUs that are tried where none is given."""

_FEWEST = 200
"""Requests of a simulation, at least: fewer say nothing about an average."""

_COLUMNS = (
    ("GPUs", 4), ("KV slots", 9), ("rate /s", 8), ("s/token", 8), ("TTFT p50", 9), ("p99, s", 7), ("batch", 7),
    ("filled %", 8), ("cache hit %", 11), ("preempted", 9), ("tokens/s", 9), ("step ms", 7),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be found out."""

    trace: str
    """A file, or the name of a workload that is drawn to published means."""
    model: str
    gpu: str
    gpus: int | None
    """None: all of COUNTS on which the model fits."""
    rate: float | None
    """Requests per second; None: the largest that keeps the limit."""
    limit: float
    """Mean normalized latency, seconds per output token."""
    duration: float
    """Seconds of arrivals."""
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    seed: int = 0


def simulate(question: Question) -> Iterator[str]:
    """Lines to print, as they become known. Raises ConfigError, one sentence."""
    shape, gpu = _named(question)
    _check(question)
    try:
        jobs = _jobs(question)
        yield _headline(question, jobs)
        yield " ".join(name.rjust(width) for name, width in _COLUMNS)
        counts = COUNTS if question.gpus is None else (question.gpus,)
        for count in counts:
            yield _row(question, jobs, shape, gpu, count)
    except TraceError as error:
        raise ConfigError(str(error)) from error


def _named(question: Question) -> tuple[Shape, Gpu]:
    for kind, name, known in (("model", question.model, SHAPES), ("GPU", question.gpu, GPUS)):
        if name not in known:
            raise ConfigError(f"the cost model has no {kind} {name!r}: give one of {', '.join(known)}")
    return SHAPES[question.model], GPUS[question.gpu]


def _check(question: Question) -> None:
    for name in ("limit", "duration", "rate", "gpus", "block_size", "max_num_seqs"):
        value = getattr(question, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
    if not 0 < question.gpu_memory_utilization <= 1:
        raise ConfigError(
            f"--gpu-memory-utilization must be above 0 and at most 1, not {question.gpu_memory_utilization:g}"
        )


def _jobs(question: Question) -> list[Job]:
    synthetic = traces.SYNTHETIC.get(question.trace)
    if synthetic is not None:
        return synthetic.draw(5000, question.seed)
    path = Path(question.trace)
    if not path.is_file():
        names = ", ".join(traces.SYNTHETIC)
        raise ConfigError(f"there is no trace {question.trace}: give a CSV file with lengths, or one of {names}")
    return traces.spread(traces.read_trace(path))


def _headline(question: Question, jobs: Sequence[Job]) -> str:
    prompt = sum(job.prompt_tokens for job in jobs) / len(jobs)
    output = sum(job.output_tokens for job in jobs) / len(jobs)
    own = f", {traces.rate_of(jobs):.2f} per second in the trace" if traces.has_arrivals(jobs) else ""
    asked = "the largest rate" if question.rate is None else f"{question.rate:g} requests per second"
    return (
        f"{question.model} on {question.gpu}; {question.trace}: {prompt:.0f} tokens in, {output:.0f} out on average"
        f"{own}; {asked} within {question.limit:g} s per token over {question.duration:g} s"
    )


def _row(question: Question, jobs: Sequence[Job], shape: Shape, gpu: Gpu, count: int) -> str:
    cost = CostModel(gpu, shape, count, question.block_size)
    slots = cost.pool_tokens(question.gpu_memory_utilization)
    label = f"{count:>4} {max(0, slots):>9}"
    max_model_len = min(shape.max_model_len, slots)
    fitting = [job for job in jobs if job.prompt_tokens + job.output_tokens <= max_model_len]
    if slots < question.block_size or not fitting:
        return f"{label} the model does not fit" if slots <= 0 else f"{label} no request of the trace fits"
    config = SchedulerConfig(
        num_blocks=slots // question.block_size,
        block_size=question.block_size,
        max_model_len=min(max_model_len, slots // question.block_size * question.block_size),
        max_num_seqs=question.max_num_seqs,
        max_num_batched_tokens=max(question.max_num_batched_tokens, question.max_num_seqs),
    )

    def run(rate: float) -> Report:
        arriving = _arriving(fitting, rate, question)
        limit = question.limit if question.rate is None else float("inf")
        return Simulation(
            arriving, Scheduler(config), SimulatedGpu(cost), warm_up=arriving[-1].arrival / 10, limit=limit
        ).run()

    if question.rate is not None:
        rate, report = question.rate, run(question.rate)
    else:
        found = sustained_rate(run, question.limit, _guess(fitting, cost, config), tolerance=0.05)
        if found.report is None:
            return f"{label} keeps the limit at no rate"
        rate, report = found.rate, found.report
    too_long = len(jobs) - len(fitting)
    left_out = f"  ({too_long} of {len(jobs)} requests are too long)" if too_long else ""
    return f"{label} {_figures(rate, report, question.limit)}{left_out}"


def _arriving(jobs: Sequence[Job], rate: float, question: Question) -> list[Job]:
    count = max(_FEWEST, round(rate * question.duration))
    if traces.has_arrivals(jobs):
        if count > len(jobs):
            raise ConfigError(
                f"the trace has {len(jobs)} requests, too few for {question.duration:g} s at {rate:.3g} per second;"
                " lower --duration"
            )
        return traces.at_rate(jobs[:count], rate)
    return traces.poisson(traces.sample(jobs, count, question.seed), rate, question.seed)


def _guess(jobs: Sequence[Job], cost: CostModel, config: SchedulerConfig) -> float:
    """By Little's law, from the batch that the pool has room for."""
    prompt = sum(job.prompt_tokens for job in jobs) / len(jobs)
    output = sum(job.output_tokens for job in jobs) / len(jobs)
    context = prompt + output / 2
    rows = max(1, min(config.max_num_seqs, int(config.num_blocks * config.block_size / context)))
    tokens = rows + rows * prompt / output
    return rows / (output * cost.seconds(Work(rows, round(tokens), round(rows * context))))


def _figures(rate: float, report: Report, limit: float) -> str:
    averages, counters, first = report.averages, report.counters, report.first_tokens
    cells = (
        f"{rate:.2f}",
        f"{report.normalized_latency:.3f}" + ("!" if report.normalized_latency > limit else ""),
        f"{percentile(first, 50):.2f}",
        f"{percentile(first, 99):.2f}",
        f"{averages.rows:.1f}",
        f"{averages.share(averages.filled):.1f}",
        f"{100 * counters.prefix_hit_tokens / max(1, counters.prefix_query_tokens):.1f}",
        f"{counters.num_preemptions / report.num_requests:.2f}",
        f"{report.output_tokens / report.seconds:.0f}",
        f"{1e3 * averages.step_seconds:.1f}",
    )
    return " ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS[2:], strict=True))
