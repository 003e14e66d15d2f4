"""Figures as values, and what becomes of them: tables in text and Markdown, plots as SVG and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import plots

Cell = str | float | int | None


@dataclass
class Table:
    title: str
    header: Sequence[str]
    rows: list[Sequence[Cell]]


@dataclass
class Plot:
    """Lines, or bars where `xs` are names."""

    title: str
    xlabel: str
    ylabel: str
    series: dict[str, tuple[Sequence[float | str], Sequence[float]]]
    top: float | None = None
    """Of the y axis."""
    log_x: bool = False
    stacked: bool = False
    dashed: tuple[str, ...] = ()
    """Series that are the paper's."""


@dataclass
class Figure:
    name: str
    """As the paper numbers it; file name of the plots."""
    title: str
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def text_of(figure: Figure) -> str:
    """Tables in columns, for a terminal."""
    lines = [f"== {figure.name}: {figure.title}"]
    for table in figure.tables:
        cells = [[shown(cell) for cell in row] for row in ([*table.header], *table.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(table.header))]
        lines.append(table.title)
        for row in cells:
            first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join([row[0].ljust(widths[0]), *rest] if rest else [first]))
    return "\n".join([*lines, *figure.notes, ""])


def markdown_of(figure: Figure) -> str:
    lines = [f"## {figure.name}: {figure.title}", ""]
    for table in figure.tables:
        lines += [
            table.title,
            "",
            "| " + " | ".join(table.header) + " |",
            "| --- |" + " --: |" * (len(table.header) - 1),
        ]
        lines += ["| " + " | ".join(shown(cell) for cell in row) + " |" for row in table.rows]
        lines.append("")
    for note in figure.notes:
        lines += [note, ""]
    if figure.plots:
        lines += [f"![{figure.name}]({file_name(figure)}.svg)", ""]
    return "\n".join(lines)


def shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.3g}" if abs(cell) < 1 else f"{cell:.2f}"
    return str(cell)


def file_name(figure: Figure) -> str:
    return figure.name.lower().replace(" ", "_")


def draw(figure: Figure, folder: Path) -> list[Path]:
    """Writes the figure's plots beside each other in one file of each format. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "quire"  # the same figures, the same file
    columns = min(3, len(figure.plots))
    lines = -(-len(figure.plots) // columns)
    canvas, axes = pyplot.subplots(
        lines, columns, figsize=(max(6.4, 4.6 * columns), 3.6 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(figure.plots) :]:
        axis.set_axis_off()
    for axis, plot in zip(axes.flat, figure.plots, strict=False):
        _draw_plot(axis, plot)
    canvas.suptitle(f"{figure.name}: {figure.title}", fontsize="medium")
    written = []
    for suffix in plots.FORMATS:
        file = folder / f"{file_name(figure)}.{suffix}"
        canvas.savefig(file, dpi=110, metadata={"Date": None} if suffix == "svg" else None)
        written.append(file)
    pyplot.close(canvas)
    return written


def _draw_plot(axis, plot: Plot) -> None:  # type: ignore[no-untyped-def]
    are_bars = any(isinstance(x, str) for xs, _ in plot.series.values() for x in xs)
    bottom: dict[object, float] = {}
    for number, (name, (xs, ys)) in enumerate(plot.series.items()):
        if are_bars and plot.stacked:
            axis.bar(xs, ys, bottom=[bottom.get(x, 0.0) for x in xs], label=name, width=0.6)
            bottom.update({x: bottom.get(x, 0.0) + y for x, y in zip(xs, ys, strict=True)})
        elif are_bars:
            width = 0.8 / len(plot.series)
            places = [place + (number - (len(plot.series) - 1) / 2) * width for place in range(len(xs))]
            axis.bar(places, ys, width=width, label=name)
            axis.set_xticks(range(len(xs)), xs)
        else:
            axis.plot(xs, ys, "s--" if name in plot.dashed else "o-", label=name, markersize=3)
    if plot.log_x:
        axis.set_xscale("log", base=2)
    if are_bars:
        axis.tick_params(axis="x", labelrotation=20, labelsize="small")
    axis.set(title=plot.title, xlabel=plot.xlabel, ylabel=plot.ylabel, ylim=(0, plot.top))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small", framealpha=0.9)
