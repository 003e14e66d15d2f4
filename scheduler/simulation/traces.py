"""Workloads: lengths and arrival times of requests, read from traces or drawn to published means.

A trace is a CSV file, gzipped or not, with a header: `arrival_s` (seconds, or empty in every row), `prompt_tokens`,
`output_tokens`, and perhaps `prefix_hashes`: one number for each block of the prompt, in order; an equal number means
that the whole prompt up to the end of that block is equal.
"""

from __future__ import annotations

import csv
import gzip
import math
import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path


class TraceError(ValueError):
    """A trace that cannot be used; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request."""

    arrival: float
    """Seconds."""
    prompt_tokens: int
    output_tokens: int
    """Exactly so many are made."""
    samples: int = 1
    beam_width: int | None = None
    prefix: tuple[int, ...] = ()
    """Tokens with which the prompt begins, and other prompts too; counted in `prompt_tokens`."""
    prefix_hashes: tuple[int, ...] = ()

    @property
    def num_sequences(self) -> int:
        return self.beam_width or self.samples


def read_trace(path: Path) -> list[Job]:
    """In order of arrival; arrivals are 0 where the trace has none (see `has_arrivals`). Raises TraceError."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            return _read_rows(path, csv.DictReader(file))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise TraceError(f"cannot read the trace {path}: {reason}") from error


def _read_rows(path: Path, reader: csv.DictReader[str]) -> list[Job]:
    missing = {"arrival_s", "prompt_tokens", "output_tokens"} - set(reader.fieldnames or ())
    if missing:
        raise TraceError(f"{path} has no column {', '.join(sorted(missing))}: a trace needs all three in its header")
    jobs, timed = [], 0
    for row in reader:
        try:
            timed += bool(row["arrival_s"])
            hashes = tuple(map(int, (row.get("prefix_hashes") or "").split()))
            job = Job(
                float(row["arrival_s"] or 0), int(row["prompt_tokens"]), int(row["output_tokens"]), prefix_hashes=hashes
            )
        except (TypeError, ValueError) as error:
            raise TraceError(f"{path}, line {reader.line_num}: {error}") from error
        if job.prompt_tokens < 1 or job.output_tokens < 1 or not 0 <= job.arrival < math.inf:
            raise TraceError(
                f"{path}, line {reader.line_num}: prompt and output have at least 1 token, and arrival_s is at least 0"
            )
        jobs.append(job)
    if not jobs:
        raise TraceError(f"{path} has no rows: a trace needs at least one request")
    if timed not in (0, len(jobs)):
        raise TraceError(f"{path}: arrival_s must be given in every row, or in none")
    return sorted(jobs, key=lambda job: job.arrival)


def has_arrivals(jobs: Sequence[Job]) -> bool:
    return jobs[-1].arrival > 0


def rate_of(jobs: Sequence[Job]) -> float:
    """Arrivals per second."""
    return len(jobs) / jobs[-1].arrival


def poisson(jobs: Iterable[Job], rate: float, seed: int = 0) -> list[Job]:
    """The same jobs in the same order, arriving independently of each other, `rate` per second on average."""
    if not 0 < rate < math.inf:
        raise TraceError(f"a rate of arrivals must be above 0 per second, not {rate:g}")
    rng = random.Random(seed)
    timed, now = [], 0.0
    for job in jobs:
        now += rng.expovariate(rate)
        timed.append(replace(job, arrival=now))
    return timed


def at_rate(jobs: Sequence[Job], rate: float) -> list[Job]:
    """A trace with arrival times of its own, faster or slower: its bursts stay as they are."""
    if not 0 < rate < math.inf:
        raise TraceError(f"a rate of arrivals must be above 0 per second, not {rate:g}")
    factor = rate_of(jobs) / rate
    return [replace(job, arrival=job.arrival * factor) for job in jobs]


def spread(jobs: Sequence[Job]) -> list[Job]:
    """Where several arrive at the same time, because the trace's clock was coarse: evenly until the next ones come."""
    groups: dict[float, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.arrival, []).append(job)
    starts = list(groups)
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    return [
        replace(job, arrival=start + gap * position / len(groups[start]))
        for start, gap in zip(starts, [*gaps, *gaps[-1:]] or [0.0], strict=True)
        for position, job in enumerate(groups[start])
    ]


def sample(jobs: Sequence[Job], count: int, seed: int = 0) -> list[Job]:
    """`count` of the jobs in random order, spread evenly over the lengths: a short sample has the trace's means too."""
    ordered = sorted(jobs, key=lambda job: (job.output_tokens, job.prompt_tokens))
    chosen = [ordered[int((place + 0.5) * len(ordered) / count)] for place in range(count)]
    random.Random(seed).shuffle(chosen)
    return chosen


def scaled(jobs: Iterable[Job], prompt: float, output: float, longest: int) -> list[Job]:
    """Lengths times so much, prompt and output together not above `longest`."""
    made = []
    for job in jobs:
        prompt_tokens = min(max(1, round(job.prompt_tokens * prompt)), longest - 1)
        output_tokens = min(max(1, round(job.output_tokens * output)), longest - prompt_tokens)
        made.append(replace(job, prompt_tokens=prompt_tokens, output_tokens=output_tokens))
    return made


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths. Where no trace is at hand, drawn to the means that are published for it."""

    prompt_mean: float
    prompt_median: float
    output_mean: float
    output_median: float
    longest: int
    """Prompt and output together; longer draws are drawn again, so means come out a little lower."""

    def draw(self, count: int, seed: int = 0) -> list[Job]:
        rng = random.Random(seed)
        jobs: list[Job] = []
        while len(jobs) < count:
            prompt = _log_normal(rng, self.prompt_mean, self.prompt_median)
            output = _log_normal(rng, self.output_mean, self.output_median)
            if prompt + output <= self.longest:
                jobs.append(Job(0.0, prompt, output))
        return jobs


def _log_normal(rng: random.Random, mean: float, median: float) -> int:
    sigma = math.sqrt(2 * math.log(mean / median)) if mean > median else 0.0
    return max(1, round(rng.lognormvariate(math.log(median), sigma)))


SYNTHETIC = {
    # Such that what is left below 2048 tokens has the paper's means, 161 and 338.
    "sharegpt": Lengths(290.0, 62.0, 341.0, 285.0, 2048),
    "alpaca": Lengths(19.31, 16.0, 58.45, 43.0, 2048),
    # English to German news: an example of the paper's shared prefixes takes (341 - 80) / 4, some 65 tokens, for both
    # sides and the words around them.
    "wmt16": Lengths(28.0, 26.0, 35.0, 32.0, 2048),
    "azure": Lengths(1155.0, 1020.0, 211.0, 129.0, 16384),
}
"""By name: what `quire simulate` and the paper's figures take where there is no file."""


def conversations(
    turns: Sequence[Job], count: int, seed: int = 0, history: int = 1024, answer: int = 1024
) -> list[Job]:
    """Chat: each prompt is a conversation of several turns, drawn from `turns`, of which the last `history` tokens are
    kept; the answer has at most `answer` tokens. No KV is kept between turns (paper, section 6.5)."""
    rng = random.Random(seed)
    jobs = []
    for _ in range(count):
        last = rng.choice(turns)
        length = last.prompt_tokens
        while rng.random() < 0.9 and length < history:  # most are long enough to be cut
            turn = rng.choice(turns)
            length += turn.prompt_tokens + turn.output_tokens
        jobs.append(Job(0.0, min(length, history), min(last.output_tokens, answer)))
    return jobs
