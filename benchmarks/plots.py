"""Latency and throughput against load, from the JSON files of benchmarks/serve.py, as SVG and PNG.

    python -m benchmarks.plots RESULT.json [RESULT.json ...] --out NAME

Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

FORMATS = ("svg", "png")


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def median_points(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the runs at each load the one of median throughput, in order of load."""
    loads: dict[float, list[dict[str, Any]]] = {}
    for point in result["points"]:
        loads.setdefault(point["load"], []).append(point)
    chosen = []
    for load in sorted(loads):
        runs = sorted(loads[load], key=lambda point: point["output_tokens_per_s"])
        chosen.append(runs[(len(runs) - 1) // 2])
    return chosen


def draw(results: list[dict[str, Any]], path: Path) -> list[Path]:
    """Writes `path` with each format's suffix; several results are drawn over each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "quire"  # the same figures, the same file
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for number, result in enumerate(results):
        points, color = median_points(result), f"C{number}"
        loads = [point["load"] for point in points]
        for axis, name in zip(axes, ("ttft_ms", "itl_ms"), strict=False):
            for key, style in (("p50", "o-"), ("p99", "s--")):
                values = [(point[name] or {}).get(key) for point in points]
                axis.plot(loads, values, style, color=color, label=f"{result['name']} {key}", markersize=4)
        axes[2].plot(loads, [point["output_tokens_per_s"] for point in points], "o-", color=color, label=result["name"])
        if any("goodput_requests_per_s" in point for point in points):
            per_request = [point["output_tokens"] / point["requests"] for point in points]
            good = [
                point.get("goodput_requests_per_s", 0) * each for point, each in zip(points, per_request, strict=True)
            ]
            axes[2].plot(loads, good, "^:", color=color, label=f"{result['name']} within limits", markersize=4)
    unit = results[0]["load_unit"]
    for axis, title in zip(
        axes, ("time to first token, ms", "inter-token latency, ms", "output tokens per second"), strict=True
    ):
        axis.set(title=title, xlabel=unit, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(", ".join(sorted({f"{result['model']}, {result['workload']}" for result in results})))
    written = []
    for suffix in FORMATS:
        file = path.with_name(f"{path.name}.{suffix}")
        figure.savefig(file, dpi=120, metadata={"Date": None} if suffix == "svg" else None)
        written.append(file)
    pyplot.close(figure)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    arguments = parser.parse_args()
    if not available():
        raise SystemExit("plots need matplotlib: pip install 'quire[bench]'")
    results = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.results]
    if len({result["load_unit"] for result in results}) > 1:
        raise SystemExit("these results are of different kinds of load and have no common axis")
    for file in draw(results, arguments.out):
        print(file)


if __name__ == "__main__":
    main()
