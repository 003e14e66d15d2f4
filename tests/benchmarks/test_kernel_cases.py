"""The table of benchmarks/kernels.py: floors, targets, failures; and that a case finds what is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from benchmarks import gpu, kernels, layer_cases, shapes
from benchmarks.work import Setting, Target, Work
from quire.kernels import activation, dispatch

TINY = Setting(torch.device("cpu"), tiny=True, quick=False)
LIMITS: dict[str, Any] = {
    "bandwidth": {"read": 4e12, "copy": 3e12, "write": 3e12},
    "products": [{"dtype": "bfloat16", "flops_per_s": flops} for flops in (2e14, 8e14)],
    "link": [{"way": "to host", "bytes_per_s": 5e10}],
}


def row(**values: Any) -> dict[str, Any]:
    given = {"num_bytes": 0, "flops": 0, "dtype": "bfloat16", "against": "read", "how": "graph", "p10": 0.0, "p90": 0.0}
    return {"case": "x", "seconds": 1e-3} | given | values


def finished(**values: Any) -> dict[str, Any]:
    found = row(**values)
    kernels.finish(found, LIMITS)
    return found


def test_a_floor_is_the_longer_of_bytes_and_products() -> None:
    assert finished(num_bytes=2e9)["share"] == pytest.approx(0.5)
    assert finished(num_bytes=1.5e9, against="copy")["share"] == pytest.approx(0.5)
    assert finished(flops=4e11)["share"] == pytest.approx(0.5)
    assert finished(num_bytes=2e9, flops=6e11)["floor"] == pytest.approx(7.5e-4)
    assert finished(num_bytes=2.5e7, against="to host")["share"] == pytest.approx(0.5)
    assert finished(num_bytes=1, against="to device")["share"] is None is finished()["share"]
    assert finished(flops=1, dtype="float32")["share"] is None


@pytest.mark.parametrize(
    ("target", "values", "met"),
    [
        (Target("share", 0.4), {"num_bytes": 2e9}, True),
        (Target("share", 0.6), {"num_bytes": 2e9}, False),
        (Target("share", 0.6), {"num_bytes": 1, "against": "to device"}, None),
        (Target("TFLOP/s", 300), {"flops": 4e11}, True),
        (Target("TFLOP/s", 500), {"flops": 4e11}, False),
        (Target("us", 1001), {}, True),
        (Target("us", 999), {}, False),
        (Target("ratio", 2, "other"), {"peers": {"other": {"seconds": 3e-3}}}, True),
        (Target("ratio", 2, "other"), {"peers": {"other": {"seconds": 1e-3}}}, False),
        (Target("ratio", 2, "other"), {"peers": {"other": {"failure": "no"}}}, None),
    ],
)
def test_targets(target: Target, values: dict[str, Any], met: bool | None) -> None:
    from dataclasses import asdict

    assert finished(goal=asdict(target), **values)["met"] is met
    assert "met" not in finished(goal=asdict(target), how="cpu", **values)


def test_a_table_of_what_ran_and_what_did_not() -> None:
    rows = [
        finished(num_bytes=2e9, error=1e-3, peers={"A": {"seconds": 2e-3}, "B": {"failure": "no"}}, extras={"e": 1e-5}),
        finished(case="late", peers={"A": {"seconds": 1e-3, "error": 0.5}}, failure="died"),
        {"case": "bad", "failure": "ValueError: x", "error": math.nan},
    ]
    found = {"machine": {"device": "GPU", "date": "2026-11-21 00:00"}, "ceilings": LIMITS, "seconds": 3.0, "rows": rows}
    text = kernels.describe(found)
    assert "| x | 1.0e-03 | 1000 | 0-0 | 2000 |  | 50 % |  |  | A 2000: 2.00x; B: no |" in text
    assert "| x | e | 10 |" in text and "then: died" in text and "(its error 5.0e-01)" in text
    assert "| bad | nan | ValueError: x |" in text and "1 of 3 cases ran" in text and "Failed: late, bad." in text
    assert all(line.count("|") in (4, 11) for line in text.splitlines() if line.startswith("|"))
    assert gpu.file_name({"date": "2026-11-21 09:00 UTC", "device": "NVIDIA H200"}) == "2026-11-21-nvidia-h200"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_gpu", lambda _: True)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["decode 1x1k", "norm_rotate_write T=1", "silu_and_mul T=1", "sample 1 greedy"])
def test_a_case_runs_through(name: str) -> None:
    parts = list(kernels.measure(kernels.cases()[name], TINY, "all"))
    json.dumps(parts)
    found = {key: value for kind, values in parts if kind == "row" for key, value in values["row"].items()}
    assert found["error"] <= found["tolerance"] and found["how"] == "cpu"
    assert [values["peer"] for kind, values in parts if kind == "peer"]


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = activation.relu
    for wrong in (lambda x: right(x) * 1.1, lambda x: right(x).index_fill(-1, torch.tensor([3]), torch.nan)):
        monkeypatch.setattr(activation, "relu", wrong)
        parts = kernels.measure(layer_cases.CASES["relu T=64"], TINY, "none")
        with pytest.raises(ArithmeticError, match="not timed"):
            list(parts)


def test_a_peer_that_fails_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("not built")

    work = Work([lambda: None], lambda: 0.0, peers={"torch": broken, "other": broken}, extras={"more": broken})
    parts = list(kernels.measure(lambda _: work, TINY, "torch"))
    assert [values for kind, values in parts if kind == "peer"] == [
        {"peer": "torch", "found": {"failure": "RuntimeError: not built"}}
    ]
    assert parts[1][1]["row"]["extras"] == {"more": "RuntimeError: not built"}


def test_shapes_are_those_of_the_models() -> None:
    assert shapes.linears("llama-3.1-8b") == {
        "qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
    }  # fmt: skip
    opt = shapes.sizes("opt-13b")
    assert (opt.heads, opt.kv_heads, opt.head_dim, opt.mlp) == (40, 40, 128, 20480)
