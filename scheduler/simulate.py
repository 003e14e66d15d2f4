"""The shipped scheduler against simulated time: what a machine would serve, before there is one.

Requests come at their times, the scheduler plans, a cost model says how long the step takes, and the clock moves by
that. Nothing is computed: every request gets exactly as many tokens as its job says. The work of a simulation is
proportional to the steps and the tokens of the trace, and to nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import repeat
from typing import Protocol

from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import StepEvents, StepPlan, StepResult
from quire.scheduler.request import Request
from quire.scheduler.simulation.baselines import ContiguousTables
from quire.scheduler.simulation.gpu import SimulatedGpu
from quire.scheduler.simulation.traces import Job
from quire.scheduler.stats import Counters, MemoryUse
from quire.scheduler.tables import BlockTables

HASH_TOKENS = 512
"""Tokens of the block that one of a trace's prefix hashes stands for."""


class Simulated(Protocol):
    """What a simulation needs of the shipped scheduler, and of those that it is compared with."""

    counters: Counters
    tables: BlockTables

    def add(self, request: Request) -> None: ...

    def schedule(self) -> StepPlan | None: ...

    def apply(self, result: StepResult) -> StepEvents: ...

    def memory(self) -> MemoryUse: ...

    def slots_kept_for_preempted(self) -> int: ...


@dataclass(slots=True)
class Averages:
    """Means over the measured time: from the end of the warm-up to the last arrival."""

    seconds: float = 0.0
    """In which steps ran."""
    steps: float = 0.0
    rows: float = 0.0
    """Sequences in the batch."""
    slots: float = 1.0
    """Of the pool; the following are slots too."""
    filled: float = 0.0
    """Hold KV; what sequences share counts once."""
    returning: float = 0.0
    """Of those that count as free: hold KV that preempted requests will find."""
    reserved: float = 0.0
    """Will be filled by the requests for which they are kept."""
    internal: float = 0.0
    """Kept for requests that will never fill them."""
    other: float = 0.0
    """Free, or lost to rounding."""
    entries: float = 0.0
    """Blocks that the tables name."""
    used: float = 0.0
    """Blocks that are in use."""

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps if self.steps else math.nan

    @property
    def saved(self) -> float:
        """Share of the blocks that there would be without sharing."""
        return 1 - self.used / self.entries if self.entries > self.used else 0.0

    def share(self, slots: float) -> float:
        """Of the pool, in percent."""
        return 100 * slots / self.slots


@dataclass(slots=True)
class Report:
    """What a simulation showed. Times in seconds."""

    num_requests: int
    finished: bool = True
    """False: given up, because the limit could not be kept any more."""
    seconds: float = 0.0
    """From the first arrival to the end of the last request, simulated."""
    num_steps: int = 0
    output_tokens: int = 0
    normalized: list[float] = field(default_factory=list)
    """Of every request: from its arrival to its end, divided by its output tokens."""
    first_tokens: list[float] = field(default_factory=list)
    """Of every request: from its arrival to its first token; none for beam search."""
    averages: Averages = field(default_factory=Averages)
    counters: Counters = field(default_factory=Counters)

    @property
    def normalized_latency(self) -> float:
        """Mean over the requests, seconds per token (paper, section 6.1); infinite when given up."""
        return sum(self.normalized) / self.num_requests if self.finished else math.inf


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many percent lie; not a number where there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else math.nan


class Simulation:
    """One trace through one scheduler. Jobs in order of arrival."""

    def __init__(
        self,
        jobs: Sequence[Job],
        scheduler: Simulated,
        gpu: SimulatedGpu,
        *,
        warm_up: float = 0.0,
        limit: float = math.inf,
        divide: bool = False,
    ) -> None:
        """`limit`: mean normalized latency above which nobody wants to know how much. `divide`: samples and beams are
        sequences that know nothing of each other, as in systems that share nothing."""
        self.jobs = jobs
        self.scheduler = scheduler
        self.gpu = gpu
        self.report = Report(len(jobs), counters=scheduler.counters)
        self._divide = divide
        self._most = limit * len(jobs)
        self._total = 0.0
        """Normalized latencies so far, summed."""
        self._jobs_of: dict[str, int] = {}
        """By request in progress."""
        self._missing = [job.num_sequences if divide or job.beam_width is None else 1 for job in jobs]
        """By job: ends that have not come."""
        self._is_first = [True] * len(jobs)
        self._num_added = 0
        self._tables = scheduler.tables if isinstance(scheduler.tables, ContiguousTables) else None
        memory = scheduler.memory()
        self._slots = memory.blocks_total * scheduler.tables.block_size
        self._from = warm_up
        self._until = jobs[-1].arrival if jobs[-1].arrival > warm_up else math.inf
        self._sums = Averages(slots=0.0)

    def run(self) -> Report:
        """Raises RuntimeError when the scheduler stops before all is done."""
        scheduler, gpu, report = self.scheduler, self.gpu, self.report
        clock = self.jobs[0].arrival
        upcoming = clock
        while True:
            if upcoming <= clock:
                upcoming = self._add_until(clock)
            plan = scheduler.schedule()
            if plan is None:
                if upcoming == math.inf:
                    break
                clock = upcoming
                continue
            result, seconds = gpu.run(plan)
            if self._from <= clock < self._until:
                self._measure(len(plan.rows), seconds)
            clock += seconds
            report.num_steps += 1
            events = scheduler.apply(result)
            if gpu.num_first:
                self._note_first(events, clock)
            if (events.ends or events.answers) and not self._note_ends(events, clock):
                report.finished = False
                break
        if report.finished and any(self._missing):
            raise RuntimeError("the scheduler stopped with requests in progress")
        report.seconds = clock - self.jobs[0].arrival
        report.averages = self._means()
        return report

    def _add_until(self, clock: float) -> float:
        """Add the jobs that have arrived; returns when the next one will."""
        jobs = self.jobs
        while self._num_added < len(jobs):
            number = self._num_added
            if jobs[number].arrival > clock:
                return jobs[number].arrival
            for request in requests_of(jobs[number], number, self._divide):
                self._jobs_of[request.request_id] = number
                self.scheduler.add(request)
            self._num_added += 1
        return math.inf

    def _measure(self, rows: int, seconds: float) -> None:
        sums, memory = self._sums, self.scheduler.memory()
        filled, slots = memory.slots_filled, self._slots
        if self._tables is not None:
            needed, kept = self._tables.num_needed, self._tables.num_kept
        else:
            needed, kept = filled, filled + memory.slots_reserved
        sums.seconds += seconds
        sums.steps += 1
        sums.rows += rows * seconds
        sums.filled += filled * seconds
        sums.returning += self.scheduler.slots_kept_for_preempted() * seconds
        sums.reserved += (needed - filled) * seconds
        sums.internal += (kept - needed) * seconds
        sums.other += (slots - kept) * seconds
        sums.entries += self.gpu.num_entries * seconds
        sums.used += memory.blocks_used * seconds

    def _means(self) -> Averages:
        sums = self._sums
        time = sums.seconds or math.nan
        totals = ("seconds", "steps", "slots")
        means = {name: getattr(sums, name) / time for name in Averages.__slots__ if name not in totals}
        return Averages(sums.seconds, sums.steps, slots=self._slots, **means)

    def _note_first(self, events: StepEvents, clock: float) -> None:
        for sequence in events.sequences[max(0, len(events) - self.gpu.num_first) :]:
            number = self._jobs_of[sequence.request.request_id]
            if self._is_first[number]:
                self._is_first[number] = False
                self.report.first_tokens.append(clock - self.jobs[number].arrival)

    def _note_ends(self, events: StepEvents, clock: float) -> bool:
        """False when the limit cannot be kept any more, whatever is still to come."""
        ended = [self._jobs_of[events.sequences[position].request.request_id] for position in events.ends]
        ended += [self._jobs_of[answer.request.request_id] for answer in events.answers if answer.index == 0]
        for number in ended:
            self._missing[number] -= 1
            if not self._missing[number]:
                job = self.jobs[number]
                self.report.normalized.append((clock - job.arrival) / job.output_tokens)
                self.report.output_tokens += job.output_tokens * job.num_sequences
                self._total += self.report.normalized[-1]
        return self._total <= self._most


@cache
def _params(samples: int, beam_width: int | None) -> SamplingParams:
    """Ends are those of the request's length."""
    if beam_width is not None:
        return SamplingParams(beam_width=beam_width, max_tokens=None, temperature=0.0, ignore_eos=True)
    return SamplingParams(n=samples, max_tokens=None, ignore_eos=True)


def requests_of(job: Job, number: int, divide: bool = False) -> Iterator[Request]:
    """The job as one request, or as one for each of its samples or beams."""
    prompt = prompt_of(job, number)
    params = _params(1, None) if divide else _params(job.samples, job.beam_width)
    for index in range(job.num_sequences if divide else 1):
        yield Request(
            request_id=f"{number}.{index}",
            prompt_token_ids=prompt,
            params=params,
            seed=number,
            stop_token_ids=frozenset(),
            max_len=job.prompt_tokens + job.output_tokens,
        )


def prompt_of(job: Job, number: int) -> tuple[int, ...]:
    """Token ids that are like another job's exactly as far as the jobs' prefixes are."""
    if job.prefix_hashes:
        tokens = [token for name in job.prefix_hashes for token in repeat(name, HASH_TOKENS)]
        return tuple(tokens[: job.prompt_tokens])
    start = (1 << 20) + number * 4099 % (1 << 30)
    return (*job.prefix, *range(start, start + job.prompt_tokens - len(job.prefix)))


@dataclass(slots=True)
class Sustained:
    """The largest rate at which the mean normalized latency keeps a limit."""

    rate: float
    report: Report | None
    """Of that rate; None where none keeps it."""
    tried: dict[float, Report]
    """By rate, in order."""


def sustained_rate(
    run: Callable[[float], Report], limit: float, guess: float, tolerance: float = 0.03, tries: int = 24
) -> Sustained:
    """Bisect between a rate that keeps the limit and one that does not, until they are `tolerance` apart.

    `run` simulates at a rate, and may give up where the limit is passed."""
    low, high, rate = 0.0, math.inf, guess
    tried: dict[float, Report] = {}
    for _ in range(tries):
        report = tried[rate] = run(rate)
        if report.normalized_latency <= limit:
            low = rate
        else:
            high = rate
        if high <= low * (1 + tolerance):
            break
        rate = rate * 2 if high == math.inf else rate / 2 if low == 0.0 else math.sqrt(low * high)
    return Sustained(low, tried.get(low), dict(sorted(tried.items())))
