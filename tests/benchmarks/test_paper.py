"""The paper's figures: that each runs, and those that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import paper, paper_blocks, paper_memory, paper_rates, plots
from benchmarks.paper_draw import Figure, Plot, Table, draw, markdown_of, text_of
from benchmarks.paper_lab import OPT_13B, QUIRE, SYSTEMS, Lab
from quire.scheduler.simulation.traces import Job

LAB = Lab(scale=0.01)


def test_figure_3_is_the_papers_to_the_slot() -> None:
    (table,) = paper_memory.figure_3(LAB).tables
    assert table.rows == [("A", 8, 2, 2, 2038, 2038), ("B", 4, 1, 1, 507, 507)]


def test_table_1() -> None:
    (table,) = paper_memory.table_1(LAB).tables
    assert [(row[0], row[5], row[6]) for row in table.rows] == [
        ("opt-13b", 15728, 15700), ("opt-66b", 9557, 9700), ("opt-175b", 60074, 60100),
    ]  # fmt: skip


def test_shares_of_the_pool_sum_to_it() -> None:
    (table,) = paper_memory.figure_2(Lab(scale=0.1)).tables
    simulated = [row for row in table.rows if row[1] == "simulated"]
    assert len(simulated) >= 4
    for row in simulated:
        assert sum(row[2:]) == pytest.approx(100, abs=0.01)  # type: ignore[arg-type]
    filled = {row[0]: row[2] for row in simulated}
    assert filled["Orca (Max)"] < filled["Orca (Pow2)"] < filled["Orca (Oracle)"] < filled[QUIRE]


def test_every_system_finds_its_rate() -> None:
    jobs = LAB.lengths("alpaca")
    found = {system: LAB.curve(system, OPT_13B, jobs, 10.0, 100.0) for system in SYSTEMS}
    rates = [found[system].rate for system in (QUIRE, "Orca (Oracle)", "Orca (Max)", "FasterTransformer")]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0
    for curve in found.values():
        assert len(curve.tried) >= 4 and list(curve.tried) == sorted(curve.tried)
    row = paper_rates._ratios("x", found)
    assert len(row) == len(paper_rates._HEADER)


def test_the_cache_finds_what_an_unbounded_one_would() -> None:
    jobs = [
        Job(0.0, 1024 + 10, 2, prefix_hashes=(1, 2, 3)),
        Job(1.0, 1536 + 1, 2, prefix_hashes=(1, 2, 4, 5)),
        Job(2.0, 600, 2, prefix_hashes=(9, 8)),
        Job(3.0, 1500, 2, prefix_hashes=(30, 31, 32)),
        Job(4.0, 1536 + 1, 2, prefix_hashes=(1, 2, 4, 6)),
    ]
    total = sum(job.prompt_tokens for job in jobs)
    assert paper_blocks._unbounded(jobs) == pytest.approx((1024 + 1536) / total)
    assert paper_blocks.hit_rate(jobs, 64) == pytest.approx((1024 + 1536) / total)
    assert paper_blocks.hit_rate(jobs, 6) < paper_blocks.hit_rate(jobs, 64)


@pytest.mark.parametrize("name", ["table1", "3", "15"])
def test_the_command_writes_tables_and_plots(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUIRE_TRACES", raising=False)
    monkeypatch.setattr(paper, "QUICK", 0.005)
    paper.main(["--only", name, "--quick", "--out", str(tmp_path)])
    title = "Table 1" if name == "table1" else f"Figure {name}"
    assert f"== {title}:" in capsys.readouterr().out
    assert f"## {title}:" in (tmp_path / "tables.md").read_text()
    drawn = name == "15" and plots.available()
    assert (tmp_path / "figure_15.svg").is_file() == (tmp_path / "figure_15.png").is_file() == drawn


def test_wrong_arguments_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no figure '99'"):
        paper.main(["--only", "2,99"])
    with pytest.raises(SystemExit, match="no folder"):
        paper.main(["--only", "3", "--traces", str(tmp_path / "missing")])


def test_tables_and_plots(tmp_path: Path) -> None:
    bars = Plot("a", "x", "y", {"one": (["p", "q"], [1.0, 2.0]), "two": (["p", "q"], [2.0, 1.0])}, stacked=True)
    lines = Plot("b", "x", "y", {"one": ([1, 2], [1.0, 2.0])}, 3.0, log_x=True)
    figure = Figure(
        "Figure 0", "title", [Table("what", ("name", "n"), [("x", 1.5), ("y", None)])], [bars, lines], ["so"]
    )
    assert text_of(figure).splitlines() == [
        "== Figure 0: title", "what", "  name     n", "  x     1.50", "  y        –", "so",
    ]  # fmt: skip
    assert "| x | 1.50 |\n| y | – |" in markdown_of(figure) and "figure_0.svg" in markdown_of(figure)
    pytest.importorskip("matplotlib")
    written = draw(figure, tmp_path)
    assert [file.name for file in written] == ["figure_0.svg", "figure_0.png"]
    first = written[0].read_bytes()
    assert draw(figure, tmp_path)[0].read_bytes() == first
