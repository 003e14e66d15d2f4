"""The arithmetic of measuring, on a clock and a GPU that are made up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks import ceilings, timing


class Clock:
    """Seconds that calls say they take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.issued = 0

    def call(self, seconds: float) -> None:
        self.now += seconds
        self.issued += 1


class Graph:
    """What is called while it is captured takes no time, and all of it on every replay."""

    capturing: Graph | None = None

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds, self.replays = clock, 0.0, 0

    def replay(self) -> None:
        self.replays += 1
        self.clock.now += self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    graphs = []

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1e3

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            assert isinstance(other, Stream)

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        before = clock.now
        yield
        graph.seconds, clock.now = clock.now - before, before

    def new_graph() -> Graph:
        graphs.append(Graph(clock))
        return graphs[-1]

    clock.graphs = graphs  # type: ignore[attr-defined]
    for name, value in {
        "is_available": lambda: True,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "current_stream": Stream,
        "synchronize": lambda: None,
        "CUDAGraph": new_graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_a_replayed_graph_gives_seconds_per_call(clock: Clock) -> None:
    calls = [lambda: clock.call(1e-5), lambda: clock.call(3e-5)]
    found = timing.replayed(calls)
    assert found.how == "graph" and found.median == pytest.approx(2e-5) == found.p10 == found.p90
    (graph,) = clock.graphs
    assert graph.seconds == pytest.approx(timing.ROUND_SECONDS, rel=0.1)
    assert found.samples == pytest.approx(timing.BUDGET_SECONDS / timing.ROUND_SECONDS, rel=0.1)


def test_tiny_calls_fill_a_graph_and_long_ones_are_sampled_a_few_times(clock: Clock) -> None:
    timing.replayed([lambda: clock.call(1e-9)] * 3)
    assert clock.graphs[0].seconds == pytest.approx(timing.MOST_CALLS // 3 * 3e-9)
    assert timing.replayed([lambda: clock.call(1.0)]).samples == timing.FEWEST
    assert clock.graphs[1].seconds == pytest.approx(1.0)


def test_calls_issued_from_the_host(clock: Clock) -> None:
    assert timing.streamed([lambda: clock.call(4e-5)] * 2).median == pytest.approx(4e-5)
    assert timing.hosted(lambda: clock.call(0.05)).median == pytest.approx(0.05)
    assert timing.issued(lambda: clock.call(0.05)).samples == timing.FEWEST


def test_the_first_sample_is_thrown_away(clock: Clock) -> None:
    waits = iter([0.5])

    class Slow:
        def replay(self) -> None:
            clock.now += 1e-3 + next(waits, 0)

    # The two issues that find out how long one takes are the first to wait.
    assert timing._samples(Slow().replay, 1, 0.1)[0] == pytest.approx(1e-3)


def test_both_ways_over_the_link_move_each_half_once(clock: Clock) -> None:
    here, there = torch.arange(8.0).view(4, 2), -torch.arange(8.0).view(4, 2)
    want_there, want_here = there.clone(), here.clone()
    want_there[:2], want_here[2:] = here[:2], there[2:]
    ceilings._duplex(here, there)()
    assert torch.equal(here, want_here) and torch.equal(there, want_there)


def test_quantiles_are_numpys() -> None:
    samples = np.random.default_rng(0).normal(size=37).tolist()
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert timing.quantile(sorted(samples), share) == pytest.approx(np.quantile(samples, share))
    found = timing.summarize(samples, "graph")
    assert (found.median, found.p10) == pytest.approx((np.median(samples), np.quantile(samples, 0.1)))
    assert timing.summarize([3.0], "graph").p90 == 3.0


def test_inputs_are_rotated_past_the_cache() -> None:
    for size in (1 << 20, 40 << 20, 300 << 20):
        sets = timing.num_sets(size)
        assert sets == timing.MOST_SETS or sets * size >= timing.ROTATED_BYTES > (sets - 1) * size
    assert timing.num_sets(0) == timing.MOST_SETS and timing.num_sets(10**12) == 1


def test_what_cannot_be_measured_takes_nothing_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Iterator[tuple[str, float]]:
        yield "read", 4e12
        raise RuntimeError("no memory")

    monkeypatch.setattr(ceilings, "bandwidth", fails)
    found = ceilings.measure(torch.device("cpu"), short=True)
    assert found["bandwidth"] == {"read": 4e12} and found["failure"] == "bandwidth: RuntimeError: no memory"
    assert found["products"] and found["launch"] and "Not measured: bandwidth" in ceilings.describe(found)
    assert "Not measured: killed." in ceilings.describe({"failure": "killed"})


def test_every_ceiling_is_measured_on_a_cpu_too() -> None:
    found = ceilings.measure(torch.device("cpu"))
    assert "failure" not in found
    assert set(found["bandwidth"]) == {"read", "copy", "write"} and len(found["launch"]) == 4
    assert {entry["form"] for entry in found["link"]} >= {"copies in a stream", "gather kernel and one copy"}
    assert ceilings.best_product(found, "float16") > 0 and ceilings.best_link(found, "to host") > 0
    assert "| read |" in ceilings.describe(found)
