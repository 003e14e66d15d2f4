"""A case that crashes, hangs or raises costs itself only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import isolated

WORKER = """
import json, os, sys, time
from benchmarks.isolated import Reporter

def work(name):
    reporter.send(name, "row", row={"pid": os.getpid()})
    if name == "crashes":
        os.abort()
    if name == "hangs":
        time.sleep(60)
    if name.startswith("raises"):
        raise ValueError("no | good\\n" + name)

def healthy():
    if broken:
        raise RuntimeError("context is gone")

broken = "breaks" in sys.argv[1]
reporter = Reporter(int(sys.argv[-2]))
reporter.run(json.loads(sys.argv[-1]), work, healthy)
"""


def run(names: list[str], code: str = WORKER, total: float = 60, mode: str = "") -> list[dict[str, Any]]:
    return list(isolated.run_cases([sys.executable, "-c", code, mode], names, 5, total))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


def outcomes(events: list[dict[str, Any]]) -> dict[str, str]:
    return {event["case"]: event.get("text", "fine") for event in events if event["kind"] in ("end", "error")}


def pids(events: list[dict[str, Any]]) -> dict[str, int]:
    return {event["case"]: event["row"]["pid"] for event in events if event["kind"] == "row"}


def test_a_crash_and_a_hang_are_reported_and_the_rest_runs() -> None:
    events = run(["a", "crashes", "b", "raises", "hangs", "c"])
    found = outcomes(events)
    assert list(found) == ["a", "crashes", "b", "raises", "hangs", "c"]
    assert found["a"] == found["b"] == found["c"] == "fine"
    assert found["crashes"] == "the process ended with -6"
    assert found["raises"] == "ValueError: no / good raises"
    assert found["hangs"].startswith("killed: silent for 5 s")
    of = pids(events)
    assert of["a"] == of["crashes"] != of["b"] == of["raises"] == of["hangs"] != of["c"]


def test_a_process_that_cannot_go_on_is_left_after_an_error() -> None:
    events = run(["raises 1", "a", "raises 2", "b"], mode="breaks")
    assert [text == "fine" for text in outcomes(events).values()] == [False, True, False, True]
    of = pids(events)
    assert of["raises 1"] != of["a"] == of["raises 2"] != of["b"]


def test_a_process_that_does_not_start_is_not_tried_for_ever() -> None:
    assert set(outcomes(run(["a", "b"], code="raise SystemExit(1)")).values()) == {"the process did not start"}


def test_no_time_left() -> None:
    found = outcomes(run(["a", "b"], total=-1))
    assert found == dict.fromkeys("ab", "not run: -1 s are over")
