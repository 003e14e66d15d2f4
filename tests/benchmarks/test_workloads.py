"""Work that is the same for every engine, and the least time that it can take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import floors, shapes, workloads
from benchmarks.floors import Cost, Machine
from benchmarks.workloads import Job

H200 = Machine(4.3e12, 790e12)


def test_the_nano_workload_has_the_published_sums() -> None:
    jobs = workloads.load("nano")
    assert len(jobs) == 256
    assert sum(len(job.prompt) for job in jobs) == 142_827
    assert sum(job.output_tokens for job in jobs) == 133_966
    assert {job.temperature for job in jobs} == {0.6} and {job.n for job in jobs} == {1}
    assert all(100 <= size <= 1024 for job in jobs for size in (len(job.prompt), job.output_tokens))


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_a_workload_is_the_same_every_time(name: str) -> None:
    assert workloads.load(name) == workloads.load(name)
    lowest = min(token for job in workloads.load(name) for token in job.prompt)
    highest = max(token for job in workloads.load(name) for token in job.prompt)
    assert lowest >= 0 and highest <= 10000


def test_a_workload_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def work():\n    return [dict(prompt=[5, 6], out=3, n=2), dict(prompt=[7], out=1, n=1)]\n")
    assert workloads.load(f"{file}:work") == [Job([5, 6], 3, 2, 1.0), Job([7], 1)]
    with pytest.raises(SystemExit, match="no workload 'chta'"):
        workloads.load("chta")


@pytest.mark.parametrize(
    "model, weight_bytes, kv_bytes, steps",
    [
        ("llama-3.1-8b", 15.01e9, 128 << 10, {1: 3.52, 16: 3.99, 64: 5.49, 256: 12.85}),
        ("llama-3.2-1b", 2.47e9, 32 << 10, {1: 0.58, 16: 0.70, 64: 1.07, 256: 2.80}),
        ("qwen3-8b", 15.14e9, 144 << 10, {1: 3.56, 16: 4.08, 64: 5.77, 256: 13.9}),
        ("qwen3-0.6b", 1.192e9, 112 << 10, {1: 0.30, 16: 0.71, 64: 2.03, 256: 7.38}),
    ],
)
def test_floors_of_decode_steps(model: str, weight_bytes: float, kv_bytes: int, steps: dict[int, float]) -> None:
    """Worked out by hand for 4.3 TB/s and 790 TFLOP/s, milliseconds at 1k."""
    cost = Cost.of(model)
    assert cost.weight_bytes == pytest.approx(weight_bytes, rel=1e-3) and cost.kv_bytes == kv_bytes
    for rows, want in steps.items():
        assert 1e3 * cost.decode(H200, rows, 1024 * rows) == pytest.approx(want, abs=0.006 if want < 10 else 0.06)


@pytest.mark.parametrize(
    "model, tokens_per_s",
    [("qwen3-0.6b", 36_203), ("llama-3.2-1b", 70_028), ("qwen3-8b", 12_682), ("llama-3.1-8b", 13_292)],
)
def test_floors_of_the_nano_workload(model: str, tokens_per_s: float) -> None:
    jobs = workloads.load("nano")
    assert 133_966 / Cost.of(model).workload(H200, jobs, 256) == pytest.approx(tokens_per_s, rel=1e-4)


def test_the_floor_of_a_workload_is_the_sum_of_its_steps() -> None:
    """Two at a time: the third starts when the second, which has one token to generate, is done at once."""
    cost, machine = Cost.of("m160"), Machine(1e10, 1e12)
    jobs = [Job([1] * 10, 4), Job([1] * 20, 1), Job([1] * 30, 3)]
    want = sum(cost.prefill(machine, size) for size in (10, 20, 30))
    want += sum(cost.decode(machine, 2, 11 + step + 31 + step) for step in range(2)) + cost.decode(machine, 1, 13)
    assert cost.workload(machine, jobs, 2) == pytest.approx(want)
    one_by_one = cost.workload(machine, jobs, 1)
    assert one_by_one > want
    twice = cost.workload(machine, [Job([1] * 10, 4, n=2)], 2)
    assert twice == pytest.approx(cost.workload(machine, [Job([1] * 10, 4)] * 2, 2))


def test_a_shape_and_a_folder_with_its_config_cost_the_same(tmp_path: Path) -> None:
    folder = shapes.write("qwen3-0.6b", tmp_path)
    assert Cost.of(str(folder)) == Cost.of("qwen3-0.6b")
    assert Cost.of("m160", kv_element_bytes=1).kv_bytes * 2 == Cost.of("m160").kv_bytes
    # OPT's MLP has no gate: 4 h^2 of attention and 8 h^2 of MLP in each layer.
    assert Cost.of("opt-13b").linear_params == 40 * 12 * 5120**2


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_shape_is_a_model_that_can_be_served(name: str, tmp_path: Path) -> None:
    from quire.worker.models.checkpoint import tensors
    from quire.worker.models.spec import ModelSpec

    spec = ModelSpec.from_pretrained(shapes.write(name, tmp_path))
    assert json.loads((tmp_path / "config.json").read_text()) == shapes.config(name)
    matrices = sum(t.shape[0] * t.shape[1] for t in tensors(spec) if len(t.shape) == 2 and "layers" in t.name)
    assert Cost.of(name).linear_params == matrices


def test_ceilings_that_were_not_measured_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="no driver"):
        floors.from_ceilings({"bandwidth": {}, "products": [], "failure": "no driver"}, "bfloat16")
