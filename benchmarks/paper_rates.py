"""Latency against rate, and the rates that are sustained: the paper's Figures 12, 14, 16 and 17."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.paper_draw import Figure, Plot, Table
from benchmarks.paper_lab import FASTER, LIMIT, OPT_13B, ORCAS, QUIRE, Lab, cost_of
from quire.scheduler.simulate import Sustained
from quire.scheduler.simulation.costs import GRAPHS, PAPER_SETUPS, SHAPES
from quire.scheduler.simulation.traces import SYNTHETIC, Job, conversations

SECONDS = {"sharegpt": 900.0, "alpaca": 240.0, "wmt16": 240.0, "chat": 900.0}
"""Of arrivals: an overload shows when its backlog has grown to the limit."""

GUESSES = {
    ("opt-13b", "sharegpt"): 1.6, ("opt-66b", "sharegpt"): 0.8, ("opt-175b", "sharegpt"): 2.6,
    ("opt-13b", "alpaca"): 30.0, ("opt-66b", "alpaca"): 20.0, ("opt-175b", "alpaca"): 30.0,
}  # fmt: skip
"""Where the search for a rate begins."""


def figure_12(lab: Lab) -> Figure:
    rows, drawn = [], []
    for name in ("sharegpt", "alpaca"):
        for model, setup in PAPER_SETUPS.items():
            jobs, guess = lab.lengths(name), GUESSES[model, name]
            found = {
                system: lab.curve(system, setup, jobs, guess * share, SECONDS[name])
                for system, share in ((QUIRE, 1.0), *zip(ORCAS, (0.6, 0.45, 0.25), strict=True), (FASTER, 0.1))
            }
            rows.append(_ratios(f"{model}, {name}", found))
            drawn.append(_plot(f"{model}, {name}", found))
    paper = ("paper", None, "ShareGPT 1.7-2.7", None, None, None, "2.7-8", None, "up to 22")
    table = Table(_explained("requests per second"), _HEADER, [*rows, paper])
    return Figure("Figure 12", "one sample per request", [table, _without_host(lab)], drawn)


def _without_host(lab: Lab) -> Table:
    """The same with an engine that hides its host's work, as plans made ahead and graphs do."""
    rows = []
    for model, setup in PAPER_SETUPS.items():
        cost = replace(cost_of(setup), overhead=GRAPHS)
        guess = 1.5 * GUESSES[model, "sharegpt"]
        rates = [
            lab.curve(system, setup, lab.lengths("sharegpt"), guess * share, SECONDS["sharegpt"], cost=cost).rate
            for system, share in ((QUIRE, 1.0), ("Orca (Oracle)", 0.6), ("Orca (Max)", 0.25))
        ]
        quire, oracle, largest = rates
        ratios = f"{quire / oracle:.2f} x", f"{quire / largest:.2f} x"
        rows.append((f"{model}, sharegpt", quire, oracle, ratios[0], largest, ratios[1]))
    title = f"the same where the host costs {1e3 * GRAPHS.per_step:g} ms per step and nothing per sequence"
    return Table(title, ("", QUIRE, "Oracle", "times", "Max", "times"), rows)


_HEADER = ("", QUIRE, "Oracle", "times", "Pow2", "Max", "times", FASTER, "times")


def _ratios(label: str, found: dict[str, Sustained]) -> tuple[object, ...]:
    quire = found[QUIRE].rate
    oracle, pow2, largest = (found[name].rate for name in ORCAS)
    faster = found[FASTER].rate if FASTER in found else None
    return (
        label, quire, oracle, f"{quire / oracle:.2f} x", pow2, largest, f"{quire / largest:.2f} x", faster,
        f"{quire / faster:.1f} x" if faster else None,
    )  # fmt: skip


def _explained(what: str) -> str:
    return f"{what} sustained: mean normalized latency at most {LIMIT:g} s per token"


def _plot(title: str, found: dict[str, Sustained]) -> Plot:
    series: dict[str, tuple[Sequence[float | str], Sequence[float]]] = {}
    for system, curve in found.items():
        points = [(rate, report.normalized_latency) for rate, report in curve.tried.items() if report.finished]
        series[system] = [rate for rate, _ in points], [latency for _, latency in points]
    return Plot(title, "requests per second", "s per token", series, LIMIT * 1.1)


def figure_14(lab: Lab) -> Figure:
    rows, drawn = [], []
    paper = {("basic", 1): "1.3", ("beam", 6): "2.3"}
    basic = {QUIRE: 32.0, "Orca (Oracle)": 24.0, "Orca (Pow2)": 17.0, "Orca (Max)": 4.0}
    for mode, width in (("basic", 1), *((mode, width) for mode in ("parallel", "beam") for width in (2, 4, 6))):
        changes = {"samples": width} if mode == "parallel" else {"beam_width": width} if mode == "beam" else {}
        jobs = lab.chosen("alpaca", 3000, **changes)
        found = {
            system: lab.curve(system, OPT_13B, jobs, guess / width * (1.3 if mode == "beam" and system == QUIRE else 1),
                              SECONDS["alpaca"] * (0.5 if mode == "beam" else 1.0))
            for system, guess in basic.items()
        }  # fmt: skip
        label = f"{mode} {width}" if width > 1 else mode
        row = _ratios(label, found)
        rows.append((*row[:4], paper.get((mode, width)), *row[4:7]))
        drawn.append(_plot(label, found))
    table = Table(_explained("requests per second"), (*_HEADER[:4], "paper", *_HEADER[4:7]), rows)
    notes = [
        "Orca's samples and beams are sequences of their own that are admitted one by one, and beams that change their"
        " parents cost it nothing here, although it would have to copy whole contexts: this favours Orca."
    ]
    tables = [table, _many_rows(lab)]
    return Figure("Figure 14", "parallel sampling and beam search, OPT-13B, Alpaca", tables, drawn[1:], notes)


def _many_rows(lab: Lab) -> Table:
    """The same with an engine that hides its host's work and runs twice as many sequences: what memory alone gives."""
    rows = []
    cost = replace(cost_of(OPT_13B), overhead=GRAPHS)
    paper = {"basic": "1.3", "beam 6": "2.3"}
    for label, changes in (("basic", {}), ("parallel 6", {"samples": 6}), ("beam 6", {"beam_width": 6})):
        jobs = lab.chosen("alpaca", 3000, **changes)
        guess = 60.0 / jobs[0].num_sequences
        quire, oracle = (
            lab.curve(system, OPT_13B, jobs, share * guess, SECONDS["alpaca"] / 2, cost, max_num_seqs=512).rate
            for system, share in ((QUIRE, 1.0), ("Orca (Oracle)", 0.7))
        )
        rows.append((label, quire, oracle, f"{quire / oracle:.2f} x", paper.get(label)))
    title = (
        f"the same where the host costs {1e3 * GRAPHS.per_step:g} ms per step and nothing per sequence, and up to 512"
        " sequences run"
    )
    return Table(title, ("", QUIRE, "Oracle", "times", "paper"), rows)


def figure_16(lab: Lab) -> Figure:
    """Translation: every prompt begins with the same instruction and examples."""
    setup = OPT_13B._replace(shape=SHAPES["llama-13b"])
    texts = SYNTHETIC["wmt16"].draw(3000, lab.seed)
    rows, drawn = [], []
    for shots, prefix, paper in (("one example", 80, 1.67), ("five examples", 341, 3.58)):
        shared = tuple(range(100, 100 + prefix))
        jobs = [Job(0.0, prefix + job.prompt_tokens, job.output_tokens, prefix=shared) for job in texts]
        found = {
            system: lab.curve(system, setup, jobs, guess, SECONDS["wmt16"])
            for system, guess in ((QUIRE, 40.0), ("Orca (Oracle)", 20.0 if prefix == 80 else 10.0))
        }
        quire, orca = found[QUIRE].rate, found["Orca (Oracle)"].rate
        rows.append((f"{shots}, {prefix} tokens", quire, orca, f"{quire / orca:.2f} x", f"{paper} x"))
        drawn.append(_plot(f"{shots}, {prefix} tokens", found))
    table = Table(_explained("requests per second"), ("shared prefix", QUIRE, "Orca (Oracle)", "times", "paper"), rows)
    return Figure("Figure 16", "shared prefixes, LLaMA-13B, translation", [table], drawn)


def figure_17(lab: Lab) -> Figure:
    jobs = conversations(lab.lengths("sharegpt"), max(100, round(3000 * lab.scale)), lab.seed)
    found = {
        system: lab.curve(system, OPT_13B, jobs, guess, SECONDS["chat"])
        for system, guess in ((QUIRE, 0.8), *((name, 0.4) for name in ORCAS))
    }
    quire = found[QUIRE].rate
    rows = [(system, curve.rate, f"{quire / curve.rate:.2f} x", None if system == QUIRE else "2 x")
            for system, curve in found.items()]  # fmt: skip
    table = Table(_explained("requests per second"), ("system", "rate", "Quire's is", "paper"), rows)
    mean = sum(job.prompt_tokens for job in jobs) / len(jobs)
    notes = [f"Conversations are put together from ShareGPT's first turns; prompts have {mean:.0f} tokens on average."]
    return Figure("Figure 17", "chatbot, OPT-13B", [table], [_plot("chatbot", found)], notes)
