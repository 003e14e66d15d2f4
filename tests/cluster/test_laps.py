"""Stages of a start, and their sum."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from quire.cluster import laps
from quire.cluster.laps import Laps


def test_every_second_belongs_to_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0, 14.5, 15.0])
    monkeypatch.setattr(laps.time, "monotonic", lambda: next(clock))
    found = Laps(started=8.0)
    for stage in ("a", "b", "a", "c"):
        found.lap(stage)
    assert found.seconds == {"a": 3.5, "b": 3.0, "c": 0.5} and sum(found.seconds.values()) == 15.0 - 8.0


@pytest.mark.parametrize("part, want", [(1.0, [3.0, 1.0]), (9.0, [0.0, 4.0]), (-1.0, [4.0, 0.0])])
def test_a_part_is_taken_out_of_its_stage_and_the_sum_stays(part: float, want: list[float]) -> None:
    found = Laps()
    found.seconds = {"first": 1.0, "whole": 4.0, "last": 2.0}
    found.split("whole", "part", part)
    assert list(found.seconds) == ["first", "whole", "part", "last"]
    assert list(found.seconds.values()) == [1.0, *want, 2.0]


def test_a_process_knows_when_it_was_started() -> None:
    code = "import time; time.sleep(0.3); from quire.cluster.laps import process_started; print(process_started())"
    before = time.monotonic()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    # The kernel's ticks are hundredths of a second.
    assert before - 0.02 <= float(answer) <= time.monotonic() - 0.28


@pytest.mark.parametrize("text", ["", "1 (a b) c)", "7 (x) " + " ".join(["0"] * 30)])
def test_where_nothing_tells_a_process_starts_now(text: str, tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(text)
    before = time.monotonic()
    assert before <= laps.process_started(tmp_path / "stat") <= time.monotonic()


def test_what_takes_no_time_is_not_mentioned() -> None:
    assert laps.describe({"command": 0.511, "weights": 0.004, "Ray": 2.4}) == "command 0.51, Ray 2.40"
