"""`quire simulate`: what it prints, and what it says to mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.cluster import cli

FAST = ["--duration", "20", "--gpu", "h100"]


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert cli.run(["simulate", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_rate_on_every_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    headline, header, *rows = lines(capsys, "alpaca", "--model", "llama-3.1-70b", "--rate", "10", *FAST)
    assert "10 requests per second" in headline and header.split()[0] == "GPUs"
    assert rows[0].split(None, 2)[2] == "the model does not fit"
    cells = [row.split() for row in rows[1:]]
    assert [row[0] for row in cells] == ["2", "4", "8"] and {row[2] for row in cells} == {"10.00"}
    slots, steps = [int(row[1]) for row in cells], [float(row[-1]) for row in cells]
    assert slots == sorted(slots) and steps == sorted(steps, reverse=True)


def test_the_largest_rate_within_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sharegpt", "--model", "opt-13b", "--gpus", "1", "--duration", "30", "--gpu", "a100-40gb"]
    found = {}
    for limit in ("0.05", "0.2"):
        (row,) = lines(capsys, *arguments, "--limit", limit)[2:]
        found[limit] = [float(cell) for cell in row.split()]
        assert found[limit][3] <= float(limit)
    assert found["0.05"][2] < found["0.2"][2]
    (row,) = lines(capsys, *arguments, "--limit", "0.001")[2:]
    assert row.endswith("keeps the limit at no rate")


def test_a_trace_keeps_its_bursts_at_any_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bursts.csv"
    rows = [f"{10 * (number // 50)},100,20" for number in range(400)] + ["200,500000,20"]
    file.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows))
    command = [str(file), "--model", "llama-3.1-8b", "--gpus", "1", "--rate", "10"]
    headline, _, row = lines(capsys, *command, *FAST)
    assert "2.00 per second in the trace" in headline and row.endswith("(1 of 401 requests are too long)")
    assert cli.run(["simulate", *command, "--duration", "100", "--gpu", "h100"]) == 1
    assert "lower --duration" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing.csv", "--model", "opt-13b", "--gpu", "h100"], "there is no trace nothing.csv"),
        (["alpaca", "--model", "gpt", "--gpu", "h100"], "the cost model has no model 'gpt': give one of opt-13b"),
        (["alpaca", "--model", "opt-13b", "--gpu", "tpu"], "the cost model has no GPU 'tpu'"),
        (["alpaca", "--model", "opt-13b", "--gpu", "h100", "--limit", "0"], "--limit must be above 0, not 0"),
        (["alpaca", "--model", "opt-13b", "--gpu", "h100", "--gpus", "-1"], "--gpus must be above 0"),
        (["alpaca", "--model", "opt-13b", "--gpu", "h100", "--gpu-memory-utilization", "2"], "at most 1"),
        (["alpaca", "--model", "opt-13b", "--gpu", "h100", "--rate", "nan"], "--rate must be above 0"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["simulate", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_trace_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.csv"
    file.write_text("a,b\n1,2\n")
    assert cli.run(["simulate", str(file), "--model", "opt-13b", "--gpu", "h100"]) == 1
    assert "has no column arrival_s" in capsys.readouterr().err
