"""Everything that is measured of a GPU, by one command: its ceilings, then the kernels against them.

    python -m benchmarks.gpu [--out DIR] [the options of benchmarks.kernels]

Under ten minutes. Prints one table; with `--out` writes DIR/<date>-<GPU>.md and .json, and what there is so far after
every case, so that a run that is cut short leaves something. The exit code is 1 where a case failed.
"""

from __future__ import annotations

import argparse
import re
import sys

from benchmarks import ceilings, kernels
from benchmarks.report import choose_device, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kernels.add_options(parser)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    limits = ceilings.separately(device, short=False)
    if arguments.out is not None:
        save(arguments.out, "ceilings", limits, ceilings.describe(limits))
    found = kernels.run(arguments, device, kernels.chosen(arguments.only), limits)
    name = file_name(found["machine"])
    text = f"# {name}\n\n{ceilings.describe(limits)}\n{kernels.describe(found)}"
    if arguments.out is not None:
        save(arguments.out, name, found, text)
        for part in ("ceilings", "kernels"):
            for suffix in (".md", ".json"):
                (arguments.out / (part + suffix)).unlink(missing_ok=True)
    print(text)
    sys.exit(any(row.get("failure") for row in found["rows"]))


def file_name(machine: dict[str, object]) -> str:
    """As in benchmarks/results: 2026-11-21-nvidia-h200."""
    gpu = re.sub(r"[^a-z0-9]+", "-", str(machine["device"]).lower()).strip("-")
    return f"{str(machine['date'])[:10]}-{gpu}"


if __name__ == "__main__":
    main()
