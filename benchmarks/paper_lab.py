"""What the paper's figures are made with: its systems, workloads and machines, and simulations of them.

Every system runs under one cost model, that of the paper's own engine, so that what differs is how memory is managed
and how requests are scheduled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.simulate import Report, Simulated, Simulation, Sustained, sustained_rate
from quire.scheduler.simulation import traces
from quire.scheduler.simulation.baselines import FasterTransformer, Orca, Reserve
from quire.scheduler.simulation.costs import PAPER_SETUPS, PYTHON_2023, CostModel, PaperSetup
from quire.scheduler.simulation.gpu import SimulatedGpu
from quire.scheduler.simulation.traces import Job

BLOCK = 16
MAX_LEN = 2048
LIMIT = 0.25
"""Mean normalized latency up to which a rate counts as sustained, seconds per token."""

PAPER_MEANS = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}

ORCAS = ("Orca (Oracle)", "Orca (Pow2)", "Orca (Max)")
QUIRE, FASTER = "Quire", "FasterTransformer"


def config_of(slots: int, block_size: int = BLOCK, **changes: object) -> SchedulerConfig:
    """The paper's engine ran at most 256 sequences and 2560 tokens of prompts in a step."""
    values: dict[str, object] = {
        "num_blocks": slots // block_size,
        "block_size": block_size,
        "max_model_len": MAX_LEN,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2560,
        "preemption_mode": "recompute",
        **changes,
    }
    return SchedulerConfig(**values)  # type: ignore[arg-type]


SYSTEMS: dict[str, Callable[[SchedulerConfig], Simulated]] = {
    QUIRE: Scheduler,
    "Orca (Oracle)": partial(Orca, reserve=Reserve.ORACLE),
    "Orca (Pow2)": partial(Orca, reserve=Reserve.POW2),
    "Orca (Max)": partial(Orca, reserve=Reserve.MAX),
    FASTER: FasterTransformer,
}


@dataclass
class Lab:
    """Runs simulations. `scale` shortens them all, for a run-through."""

    folder: Path | None = None
    """Where the traces lie; None: lengths are drawn to the published means."""
    scale: float = 1.0
    seed: int = 0
    _lengths: dict[str, list[Job]] = field(default_factory=dict)

    # -- workloads

    def lengths(self, name: str) -> list[Job]:
        """All lengths of a data set, scaled to the paper's means."""
        if name not in self._lengths:
            file = None if self.folder is None else self.folder / f"{name}_lengths.csv.gz"
            if file is None or not file.is_file():
                self._lengths[name] = traces.SYNTHETIC[name].draw(20_000, self.seed)
            else:
                jobs = traces.read_trace(file)
                prompt, output = PAPER_MEANS[name]
                means = [
                    sum(getattr(job, key) for job in jobs) / len(jobs) for key in ("prompt_tokens", "output_tokens")
                ]
                self._lengths[name] = traces.scaled(jobs, prompt / means[0], output / means[1], MAX_LEN)
        return self._lengths[name]

    def arriving(self, jobs: Sequence[Job], rate: float, seconds: float) -> list[Job]:
        """Poisson arrivals over so many seconds, but never fewer requests than say something."""
        count = max(round(rate * seconds * self.scale), min(150, round(600 * self.scale)))
        return traces.poisson(traces.sample(jobs, count, self.seed), rate, self.seed + 1)

    def chosen(self, name: str, count: int, **changes: object) -> list[Job]:
        """So many jobs of a data set, without arrivals."""
        jobs = traces.sample(self.lengths(name), max(40, round(count * self.scale)), self.seed)
        return [replace(job, **changes) for job in jobs] if changes else jobs  # type: ignore[arg-type]

    # -- simulations

    def run(
        self,
        system: str,
        setup: PaperSetup,
        arriving: Sequence[Job],
        limit: float = math.inf,
        cost: CostModel | None = None,
        **changes: object,
    ) -> Report:
        """`changes`: of the scheduler's configuration. The first tenth is not measured."""
        cost = cost or cost_of(setup)
        config = config_of(setup.slots, cost.block_size, **changes)
        shares = system == QUIRE
        return Simulation(
            arriving,
            SYSTEMS[system](config),
            SimulatedGpu(cost),
            warm_up=arriving[-1].arrival / 10,
            limit=limit,
            divide=not shares,
        ).run()

    def curve(
        self,
        system: str,
        setup: PaperSetup,
        jobs: Sequence[Job],
        guess: float,
        seconds: float,
        cost: CostModel | None = None,
        **changes: object,
    ) -> Sustained:
        """Normalized latency against rate, up to the limit: the rates of the search, and two below."""

        def run(rate: float) -> Report:
            return self.run(system, setup, self.arriving(jobs, rate, seconds), LIMIT, cost, **changes)

        found = sustained_rate(run, LIMIT, guess, tolerance=0.04)
        for share in (0.3, 0.65):
            found.tried[share * found.rate] = run(share * found.rate)
        found.tried = dict(sorted(found.tried.items()))
        return found


def cost_of(setup: PaperSetup, block_size: int = BLOCK) -> CostModel:
    return CostModel(setup.gpu, setup.shape, setup.num_gpus, block_size, PYTHON_2023)


OPT_13B = PAPER_SETUPS["opt-13b"]


@cache
def trace_folder(given: Path | None) -> Path | None:
    """Given, or named by QUIRE_TRACES."""
    named = given or (Path(os.environ["QUIRE_TRACES"]) if os.environ.get("QUIRE_TRACES") else None)
    if named is not None and not named.is_dir():
        raise SystemExit(
            f"there is no folder {named} with traces; without --traces lengths are drawn to published means"
        )
    return named
