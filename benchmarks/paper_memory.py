"""Where the paper's memory goes: Table 1, Figures 2, 3, 13 and 15."""

from __future__ import annotations

from benchmarks.paper_draw import Cell, Figure, Plot, Table
from benchmarks.paper_lab import BLOCK, MAX_LEN, OPT_13B, ORCAS, QUIRE, SYSTEMS, Lab, config_of, cost_of
from quire.scheduler.plan import StepResult
from quire.scheduler.simulate import Report, requests_of
from quire.scheduler.simulation.costs import PAPER_SETUPS, CostModel
from quire.scheduler.simulation.traces import Job

# Percent of the pool: token states, reserved, internal fragmentation, external and other (Fig. 2).
FIG_2 = {
    "Orca (Max)": (20.4, 13.3, 57.3, 8.9),
    "Orca (Pow2)": (26.8, 17.9, 13.6, 41.6),
    "Orca (Oracle)": (38.2, 25.2, 0.0, 36.6),
    QUIRE: (96.3, None, None, None),
}
FIG_13 = {
    "sharegpt": {"Orca (Max)": 7.00, "Orca (Pow2)": 9.81, "Orca (Oracle)": 13.62, QUIRE: 30.42},
    "alpaca": {"Orca (Max)": 7.00, "Orca (Pow2)": 43.24, "Orca (Oracle)": 72.75, QUIRE: 132.44},
}
RATES_13 = {"sharegpt": 2.0, "alpaca": 30.0}
PAST = {"sharegpt": 3.0, "alpaca": 45.0}
"""Requests per second past the saturation of every system."""

FIG_15 = {
    ("alpaca", "parallel"): {2: 6.09, 4: 8.53, 6: 9.79},
    ("alpaca", "beam"): {2: 37.56, 4: 53.13, 6: 55.16},
    ("sharegpt", "parallel"): {2: "16.2", 4: "to", 6: "30.5"},
    ("sharegpt", "beam"): {2: "44.3", 4: "to", 6: "66.3"},
}


def table_1(_lab: Lab) -> Figure:
    rows = []
    for name, setup in PAPER_SETUPS.items():
        cost = CostModel(setup.gpu, setup.shape, setup.num_gpus)
        rows.append((
            name, f"{setup.num_gpus} x {setup.gpu.name}", setup.shape.weight_bytes / 1e9, setup.kv_bytes / 2**30,
            setup.shape.kv_bytes / 1024, setup.kv_bytes // setup.shape.kv_bytes, setup.slots, cost.pool_tokens(),
        ))  # fmt: skip
    header = ("model", "GPUs", "weights, GB", "KV, GiB", "KiB per token", "slots", "paper's", "ours at 0.9")
    notes = ["`slots` are the paper's memory for KV divided by bytes per token; the last column is what the cost model"
             " leaves beside weights and 2 GiB of activations at --gpu-memory-utilization 0.9."]  # fmt: skip
    return Figure("Table 1", "model sizes and slots", [Table("", header, rows)], notes=notes)


def figure_2(lab: Lab) -> Figure:
    jobs = lab.lengths("sharegpt")
    rows: list[tuple[Cell, ...]] = []
    shares = {}
    arriving = lab.arriving(jobs, PAST["sharegpt"], 600)
    reports = {}
    for system in (*reversed(ORCAS), QUIRE):
        reports[system] = lab.run(system, OPT_13B, arriving)
        shares[system] = _shares(reports[system])
        rows += [(system, "simulated", *shares[system]), (system, "paper", *FIG_2[system])]
    mean = reports[QUIRE].averages
    states, reserved, internal, other = shares[QUIRE]
    returning = mean.share(mean.returning)
    found = f"{QUIRE}, cached for the preempted too"
    rows.append((found, "simulated", states + returning, reserved, internal, other - returning))
    rows.append((f"{QUIRE}, no watermark", "simulated", *_shares(lab.run(QUIRE, OPT_13B, arriving, watermark=0.0))))
    halves = lab.run(QUIRE, OPT_13B, arriving, cost=cost_of(OPT_13B, 8))
    rows.append((f"{QUIRE}, blocks of 8", "simulated", *_shares(halves)))
    names = ("token states", "reserved", "internal fragm.", "external, free")
    series = {name: (list(shares), [values[place] for values in shares.values()]) for place, name in enumerate(names)}
    return Figure(
        "Figure 2", "use of KV memory past saturation, OPT-13B, ShareGPT",
        [Table("percent of the pool's slots", ("system", "", *names), rows)],
        [Plot("", "", "% of KV memory", series, 100, stacked=True)],
    )  # fmt: skip


def _shares(report: Report) -> list[float]:
    mean = report.averages
    return [mean.share(part) for part in (mean.filled, mean.reserved, mean.internal, mean.other)]


def figure_3(_lab: Lab) -> Figure:
    """Two requests side by side in one contiguous pool: A may have 2048 tokens, B 512, and both end soon."""
    rows = []
    for name, longest, prompt, output, paper in (("A", MAX_LEN, 7, 4, (2, 2038)), ("B", 512, 3, 3, (1, 507))):
        # One slot per block, and a context of the request's own: what is kept for it is exactly its longest length.
        config = config_of(MAX_LEN, 1, max_model_len=longest, max_num_batched_tokens=2560)
        scheduler = SYSTEMS["Orca (Max)"](config)
        for request in requests_of(Job(0.0, prompt, output), 0):
            scheduler.add(request)
        for _ in range(2):  # the prompt, then the first token
            plan = scheduler.schedule()
            assert plan is not None
            scheduler.apply(StepResult(plan.step, (1,) * plan.num_sampled, {}))
        filled, tables = scheduler.memory().slots_filled, scheduler.tables
        rows.append((name, filled, tables.num_needed - filled, paper[0], tables.num_kept - tables.num_needed, paper[1]))
    header = ("request", "filled", "used in future", "paper", "never used", "paper")
    return Figure("Figure 3", "slots kept for two requests, after one decode step", [Table("slots", header, rows)])


def figure_13(lab: Lab) -> Figure:
    tables, drawn = [], []
    for name, rate in RATES_13.items():
        rows: list[tuple[object, ...]] = []
        jobs = lab.lengths(name)
        seconds = 900 if name == "sharegpt" else 150
        for system in (*reversed(ORCAS), QUIRE):
            report = lab.run(system, OPT_13B, lab.arriving(jobs, rate, seconds))
            past = lab.run(system, OPT_13B, lab.arriving(jobs, PAST[name], seconds))
            mean, paper = report.averages, FIG_13[name][system]
            served = mean.rows / mean.step_seconds / (sum(job.output_tokens for job in jobs) / len(jobs))
            rows.append((
                system, mean.rows, paper, f"{100 * (mean.rows / paper - 1):+.1f} %", 1e3 * mean.step_seconds, served,
                past.averages.rows,
            ))  # fmt: skip
        header = ("system", "batch", "paper", "difference", "step, ms", "served /s", f"batch at {PAST[name]:g}/s")
        tables.append(Table(f"{name} at {rate:g} requests per second, OPT-13B", header, rows))
        names = [row[0] for row in rows]
        drawn.append(
            Plot(f"{name}, {rate:g}/s", "", "batched requests", {
                "simulated": (names, [row[1] for row in rows]), "paper": (names, [row[2] for row in rows]),
            })
        )  # fmt: skip
    notes = ["Little's law: the batch is the rate that is served x output tokens x seconds per step. Where a system is"
             " saturated the batch is what its memory holds; where it is not, the step time decides."]  # fmt: skip
    return Figure("Figure 13", "requests in the batch, averaged over time", tables, drawn, notes)


def figure_15(lab: Lab) -> Figure:
    tables, drawn = [], []
    counts = {("alpaca", "parallel"): 4000, ("alpaca", "beam"): 500, ("sharegpt", "parallel"): 1000,
              ("sharegpt", "beam"): 150}  # fmt: skip
    for (name, mode), paper in FIG_15.items():
        rows = []
        rate = {"alpaca": 20.0, "sharegpt": 2.0}[name]
        for width in paper:
            changes = {"samples": width} if mode == "parallel" else {"beam_width": width}
            jobs = lab.chosen(name, counts[name, mode], **changes)
            report = lab.run(QUIRE, OPT_13B, lab.arriving(jobs, rate / width, len(jobs) * width / rate / lab.scale))
            rows.append((width, 100 * report.averages.saved, paper[width], report.averages.rows / width))
        header = ("samples" if mode == "parallel" else "beams", "saved, %", "paper", "requests in the batch")
        tables.append(Table(f"{name}, {mode}", header, rows))
        drawn.append(Plot(f"{name}, {mode}", "", "% of blocks saved", {
            "simulated": ([str(row[0]) for row in rows], [row[1] for row in rows]),
            **({"paper": ([str(row[0]) for row in rows], [row[2] for row in rows])} if name == "alpaca" else {}),
        }))  # fmt: skip
    notes = [
        f"Blocks of {BLOCK} tokens. The paper gives ShareGPT's as ranges. Beams: ancestries drawn from the seeded model"
        " of scheduler/likelihoods.py."
    ]
    return Figure("Figure 15", "memory saved by sharing, OPT-13B", tables, drawn, notes)
