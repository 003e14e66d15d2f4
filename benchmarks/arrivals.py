"""When requests come: Poisson arrivals, and traces of real ones."""

from __future__ import annotations

import csv
import gzip
import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    arrival_s: float | None
    """Seconds since the trace began; None where the trace knows lengths only."""
    prompt_tokens: int
    output_tokens: int


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """`count` arrival times in seconds, `rate` of them per second on average; the gaps are exponential."""
    if not rate > 0:
        raise ValueError(f"a rate of arrivals must be above 0 per second, not {rate}")
    rng = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times


def read_trace(path: Path) -> list[TraceRow]:
    """A CSV file with a header, gzipped or not: `arrival_s` (may be empty), `prompt_tokens`, `output_tokens`; further
    columns are not read. Raises ValueError, with the line, for what is not so."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = {"arrival_s", "prompt_tokens", "output_tokens"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(sorted(missing))}: a trace needs all three in its header"
            )
        rows = []
        for row in reader:
            try:
                arrival = float(row["arrival_s"]) if row["arrival_s"] else None
                rows.append(TraceRow(arrival, int(row["prompt_tokens"]), int(row["output_tokens"])))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    if any(row.prompt_tokens < 1 or row.output_tokens < 0 for row in rows):
        raise ValueError(f"{path}: a prompt has at least 1 token, and an output not less than 0")
    known = [row.arrival_s is not None for row in rows]
    if any(known) and not all(known):
        raise ValueError(f"{path}: arrival_s must be given in every row, or in none")
    return sorted(rows, key=lambda row: row.arrival_s or 0.0)
