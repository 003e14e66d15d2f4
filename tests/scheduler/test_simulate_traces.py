"""Traces, drawn workloads and the buddy allocator."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.scheduler.blocks import AuditError
from quire.scheduler.simulation import traces
from quire.scheduler.simulation.buddy import Buddy
from quire.scheduler.simulation.traces import SYNTHETIC, Job, TraceError

HEADER = "arrival_s,prompt_tokens,output_tokens,prefix_hashes\n"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_trace_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv.gz"
    with gzip.open(file, "wt") as out:
        out.write(HEADER + "2.5,10,3,1 2\n0.5,20,4,\n")
    jobs = traces.read_trace(file)
    assert jobs == [Job(0.5, 20, 4), Job(2.5, 10, 3, prefix_hashes=(1, 2))]
    assert traces.has_arrivals(jobs) and traces.rate_of(jobs) == 0.8
    doubled = traces.at_rate(jobs, 1.6)
    assert [job.arrival for job in doubled] == [0.25, 1.25]


@pytest.mark.parametrize(
    "text, message",
    [
        ("prompt_tokens\n1\n", "has no column arrival_s, output_tokens"),
        (HEADER, "has no rows"),
        (HEADER + "1,x,3,\n", "line 2: invalid literal"),
        (HEADER + "1,5\n", "line 2"),
        (HEADER + "1,0,3,\n", "line 2: prompt and output have at least 1 token"),
        (HEADER + "nan,1,3,\n", "line 2: prompt"),
        (HEADER + "1,5,3,\n,5,3,\n", "in every row, or in none"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        traces.read_trace(written(tmp_path / "trace.csv", text))


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        traces.read_trace(tmp_path / "missing.csv")
    with pytest.raises(TraceError, match="cannot read"):
        traces.read_trace(written(tmp_path / "plain.csv.gz", HEADER))


def test_a_short_sample_has_the_means_of_the_whole() -> None:
    jobs = SYNTHETIC["sharegpt"].draw(8000, seed=3)
    part = traces.sample(jobs, 200, seed=1)
    for name in ("prompt_tokens", "output_tokens"):
        whole, short = (sum(getattr(job, name) for job in those) / len(those) for those in (jobs, part))
        assert short == pytest.approx(whole, rel=0.1 if name == "prompt_tokens" else 0.01)
    assert part != sorted(part, key=lambda job: job.output_tokens) and part == traces.sample(jobs, 200, seed=1)


@pytest.mark.parametrize("name, prompt, output", [("sharegpt", 161.31, 337.99), ("alpaca", 19.31, 58.45)])
def test_drawn_lengths_have_the_published_means(name: str, prompt: float, output: float) -> None:
    jobs = SYNTHETIC[name].draw(30_000)
    assert sum(job.prompt_tokens for job in jobs) / len(jobs) == pytest.approx(prompt, rel=0.03)
    assert sum(job.output_tokens for job in jobs) / len(jobs) == pytest.approx(output, rel=0.03)
    assert max(job.prompt_tokens + job.output_tokens for job in jobs) <= 2048


def test_arrivals() -> None:
    timed = traces.poisson([Job(0.0, 1, 1)] * 20_000, 4.0)
    assert traces.rate_of(timed) == pytest.approx(4.0, rel=0.03)
    gaps = [b.arrival - a.arrival for a, b in pairwise(timed)]
    assert sum(gap * gap for gap in gaps) / len(gaps) == pytest.approx(2 / 16, rel=0.06)  # exponential
    stamped = [Job(0.0, 1, 1), Job(0.0, 2, 1), Job(3.0, 3, 1), Job(3.0, 3, 1), Job(3.0, 3, 1)]
    assert [job.arrival for job in traces.spread(stamped)] == [0.0, 1.5, 3.0, 4.0, 5.0]
    assert traces.spread(stamped[:2]) == stamped[:2] and traces.spread(timed[:9]) == timed[:9]
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(TraceError, match="above 0"):
            traces.poisson([Job(0.0, 1, 1)], wrong)


def test_scaled_lengths_keep_to_the_context() -> None:
    assert traces.scaled([Job(0.0, 100, 50), Job(0.0, 1, 1), Job(0.0, 1500, 1500)], 1.1, 0.5, 2048) == [
        Job(0.0, 110, 25), Job(0.0, 1, 1), Job(0.0, 1650, 398),
    ]  # fmt: skip


def test_conversations_grow_and_are_cut() -> None:
    turns = SYNTHETIC["sharegpt"].draw(2000)
    jobs = traces.conversations(turns, 500)
    prompts = [job.prompt_tokens for job in jobs]
    assert max(prompts) == 1024 and max(job.output_tokens for job in jobs) <= 1024
    assert sum(prompts) > 3 * sum(turn.prompt_tokens for turn in turns[:500])


# -- the buddy allocator


def test_the_papers_pool_has_seven_runs_for_the_longest_requests() -> None:
    buddy = Buddy(15_728)
    runs = []
    while buddy.fits(2048):
        runs.append(buddy.allocate(2048))
    assert len(runs) == 7 and buddy.num_free == 15_728 - 7 * 2048 and buddy.fits(1024)
    buddy.audit()


def test_runs_are_powers_of_two_and_join_again() -> None:
    buddy = Buddy(16)
    runs = [buddy.allocate(units) for units in (3, 1, 5)]
    assert [(run.start, len(run)) for run in runs] == [(0, 4), (4, 1), (8, 8)]
    assert buddy.num_free == 3 and buddy.fits(2) and not buddy.fits(3)
    for run in runs:
        buddy.free(run.start)
        buddy.audit()
    assert buddy.fits(16) and buddy.num_free == 16
    with pytest.raises(AuditError, match="no run in use"):
        buddy.free(0)
    with pytest.raises(AuditError, match="ask fits"):
        buddy.allocate(17)


@given(size=st.integers(1, 100), choices=st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_no_unit_is_in_two_runs(size: int, choices: list[tuple[bool, int]]) -> None:
    buddy = Buddy(size)
    held: dict[int, range] = {}
    for is_free, number in choices:
        if is_free and held:
            start = sorted(held)[number % len(held)]
            del held[start]
            buddy.free(start)
        elif buddy.fits(number):
            run = buddy.allocate(number)
            assert number <= len(run) < 2 * number
            held[run.start] = run
        buddy.audit()
        units = [unit for run in held.values() for unit in run]
        assert len(set(units)) == len(units) and buddy.num_free + len(units) == size
        assert not units or max(units) < size
    for start in held:
        buddy.free(start)
    assert buddy._free == Buddy(size)._free
