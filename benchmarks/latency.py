"""What happened to each request, and what that makes in all: percentiles, throughput, goodput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

PERCENTILES = (50, 90, 99)
LIMITS = ("ttft", "itl", "tpot", "e2e")


@dataclass(slots=True)
class Record:
    """One request, as its client saw it. Times are seconds on the client's clock."""

    due: float
    """When it should have been sent."""
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    """When each message with tokens came."""
    tokens: int = 0
    end: float = 0.0
    error: str = ""

    @property
    def ttft(self) -> float:
        """From when it was due: a client that is late must not make a server look fast."""
        return self.times[0] - self.due

    @property
    def itls(self) -> list[float]:
        """Gaps between messages: what a reader of the stream waits. Several tokens in one message are one gap."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def e2e(self) -> float:
        return self.end - self.due

    def meets(self, limits: Mapping[str, float]) -> bool:
        """Whether every limit, in seconds, holds. `itl` is held by 99 % of the request's own gaps."""
        if self.error or not self.times:
            return False
        values = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "e2e": self.e2e}
        values["itl"] = percentile(self.itls, 99) if len(self.times) > 1 else 0.0
        return all(values[name] <= limit for name, limit in limits.items())


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between neighbours, as NumPy's default. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values have no percentile")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Milliseconds of values in seconds."""
    if not values:
        return None
    found = {"mean": sum(values) / len(values), **{f"p{p}": percentile(values, p) for p in PERCENTILES}}
    found["max"] = max(values)
    return {name: round(value * 1e3, 3) for name, value in found.items()}


def parse_limits(text: str) -> dict[str, float]:
    """`ttft=500,itl=100`, in milliseconds, as seconds by name."""
    limits = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            limits[name] = float(value) / 1e3
        except ValueError:
            limits[name] = -1.0
        if name not in LIMITS or not limits[name] > 0:
            raise ValueError(f"{part!r} is not a limit: write one of {', '.join(LIMITS)}, =, and milliseconds above 0")
    return limits


def summarize(records: Sequence[Record], limits: Mapping[str, float]) -> dict[str, object]:
    """Figures over all requests: rates per second of the time from the first request to the last answer."""
    done = [record for record in records if not record.error]
    errors: dict[str, int] = {}
    for record in records:
        if record.error:
            errors[record.error] = errors.get(record.error, 0) + 1
    seconds = max((record.end for record in records), default=0.0) - min((r.sent for r in records), default=0.0)
    tokens = sum(record.tokens for record in done)
    per_second = 1 / seconds if seconds > 0 else 0.0
    found: dict[str, object] = {
        "requests": len(records),
        "failed": len(records) - len(done),
        "errors": errors,
        "seconds": round(seconds, 3),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens * per_second, 2),
        "requests_per_s": round(len(done) * per_second, 4),
        "tokens_per_message": round(tokens / max(1, sum(len(record.times) for record in done)), 3),
        "ttft_ms": distribution([record.ttft for record in done]),
        "itl_ms": distribution([gap for record in done for gap in record.itls]),
        "tpot_ms": distribution([record.tpot for record in done if record.tpot is not None]),
        "e2e_ms": distribution([record.e2e for record in done]),
        "client_late_ms": distribution([record.sent - record.due for record in records]),
    }
    if limits:
        good = sum(record.meets(limits) for record in records)
        found["good_requests"] = good
        found["goodput_requests_per_s"] = round(good * per_second, 4)
    return found
