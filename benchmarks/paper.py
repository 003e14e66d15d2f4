"""The PagedAttention paper's figures from the shipped scheduler, beside the paper's numbers.

    python -m benchmarks.paper [--only 12,13] [--traces DIR] [--out DIR] [--quick]

Needs no GPU: a cost model of the paper's machines moves the clock (quire.scheduler.simulation.costs). Prints every
figure as a table; with --out it writes tables.md, and each figure as SVG and PNG where matplotlib is installed. Traces
come from --traces or QUIRE_TRACES; without them lengths are drawn to the published means.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import paper_blocks, paper_memory, paper_rates, plots
from benchmarks.paper_draw import Figure, draw, markdown_of, text_of
from benchmarks.paper_lab import Lab, trace_folder

FIGURES: dict[str, Callable[[Lab], Figure]] = {
    "table1": paper_memory.table_1,
    "2": paper_memory.figure_2,
    "3": paper_memory.figure_3,
    "12": paper_rates.figure_12,
    "13": paper_memory.figure_13,
    "14": paper_rates.figure_14,
    "15": paper_memory.figure_15,
    "16": paper_rates.figure_16,
    "17": paper_rates.figure_17,
    "18b": paper_blocks.figure_18b,
    "19": paper_blocks.figure_19,
    "mooncake": paper_blocks.mooncake,
    "looking": paper_blocks.cost_of_looking,
    "speed": paper_blocks.speed,
}

QUICK = 0.05


def chosen(names: str | None) -> list[str]:
    """Raises SystemExit for a figure that there is not."""
    wanted = list(FIGURES) if names is None else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in FIGURES]
    if unknown:
        raise SystemExit(f"there is no figure {unknown[0]!r}: give some of {','.join(FIGURES)}")
    return wanted


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of {','.join(FIGURES)}")
    parser.add_argument("--traces", type=Path, help="folder with the traces")
    parser.add_argument("--out", type=Path, help="folder for tables and plots")
    parser.add_argument("--quick", action="store_true", help="much shorter simulations, to see that all of it runs")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    names = chosen(given.only)
    lab = Lab(trace_folder(given.traces), QUICK if given.quick else 1.0, given.seed)
    print(f"lengths: {lab.folder or 'drawn to published means'}\n")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        if not plots.available():
            print("no plots: they need matplotlib (pip install 'quire[bench]')\n")
    pages = []
    for name in names:
        start = time.process_time()
        figure = FIGURES[name](lab)
        print(text_of(figure))
        print(f"({time.process_time() - start:.1f} s of CPU)\n", flush=True)
        pages.append(markdown_of(figure))
        if given.out is not None and figure.plots and plots.available():
            draw(figure, given.out)
    if given.out is not None:
        title = "# The paper's figures, simulated\n\nWritten by `python -m benchmarks.paper`.\n"
        (given.out / "tables.md").write_text("\n".join([title, *pages]), encoding="utf-8")


if __name__ == "__main__":
    main()
