"""Engines beside each other, steps of a model and parts of a GPU's run: what is done with processes and figures."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decode_step, engines, gpu, offline, startup
from benchmarks.floors import Machine
from benchmarks.gpu import Part

SAYS = """
import json, sys
print("a line of somebody's log")
print(json.dumps({"engine": "x", "load_s": 1.5}))
print(json.dumps({"run": 0, "seconds": 9.0, "output_tokens_per_s": 1.0}))
print(json.dumps({"run": 1, "seconds": 3.0, "output_tokens_per_s": 4.0, "peak_memory_mib": 7}))
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


# -- engines


def test_the_last_run_of_an_engine_counts() -> None:
    found = offline.run_engine([sys.executable, "-c", SAYS, "0"], 30)
    assert found == {
        "engine": "x", "load_s": 1.5, "run": 1, "seconds": 3.0, "output_tokens_per_s": 4.0, "peak_memory_mib": 7,
    }  # fmt: skip


def test_an_engine_that_fails_is_told() -> None:
    assert offline.run_engine([sys.executable, "-c", SAYS, "3"], 30)["failure"].startswith("ended with 3")
    assert offline.run_engine([sys.executable, "-c", "pass"], 30)["failure"].startswith("ended with 0")
    assert offline.run_engine([sys.executable, "-c", "input()"], 30)["failure"].startswith("ended with")
    slow = offline.run_engine([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert slow["failure"] == "not done after 0 s"
    assert "No such file" in offline.run_engine(["/no/such/python"], 1)["failure"]


def test_every_engine_is_given_the_same_work() -> None:
    arguments = offline.options().parse_args(
        ["--model=m30", "--workload=tiny", "--device=cpu", "--peer=transformers", "--peer=vllm", "--run-ahead=0",
         "--max-num-seqs=8"]
    )  # fmt: skip
    made = offline.commands(arguments, {"vllm": "/v/python"})
    shared = {"--model=m30", "--workload=tiny", "--device=cpu", "--repeat=2", "--max-num-seqs=8"}
    assert all(shared < set(command) for command in made.values()) and list(made) == ["quire", "transformers", "vllm"]
    assert "--run-ahead=0" in made["quire"] and "--run-ahead=0" not in made["vllm"]
    assert made["vllm"][0] == "/v/python" and made["transformers"][0] == sys.executable


def test_missing_tokens_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(model="m30", workload="tiny", repeat=2)
    wanted = sum(job.output_tokens for job in engines.workloads.load("tiny"))
    engines.measure("x", arguments, lambda jobs: wanted, time.perf_counter())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("run") for line in lines] == [None, 0, 1] and lines[2]["output_tokens"] == wanted
    with pytest.raises(SystemExit, match=f"gave {wanted - 1} tokens where {wanted}"):
        engines.measure("x", arguments, lambda jobs: wanted - 1, time.perf_counter())


def told(**engines_found: Any) -> dict[str, Any]:
    return {
        "machine": {"device": "cpu"}, "model": "m30", "workload": "tiny", "engines": engines_found,
        "work": {"requests": 8, "prompt_tokens": 88, "output_tokens": 93},
        "limits": {"bandwidth": 2e10, "flops": 1e12}, "floor": {"seconds": 1.0, "output_tokens_per_s": 200.0},
    }  # fmt: skip


def test_engines_in_a_table() -> None:
    line = {"output_tokens_per_s": 100.0, "seconds": 2.0, "load_s": 1.0, "peak_memory_mib": 1500}
    slow = line | {"output_tokens_per_s": 20.0, "peak_gpu_memory_mib": 9}
    text = offline.describe(told(quire=line, transformers=slow, vllm={"failure": "not installed"}))
    assert "| quire | 100 | 2.00 | 50 % | 1.00 | 1.0 | 1,500 |  |" in text
    assert "| transformers | 20 | 2.00 | 10 % | 5.00 | 1.0 | 1,500 | 9 |" in text
    assert "| vllm | not installed |" in text and "| floor | 200 |" in text


# -- steps


def test_cases_are_read_as_people_write_them() -> None:
    made = decode_step.cases("1,32", "128,8k")
    assert [(case.batch, case.context) for case in made] == [(1, 128), (32, 128), (1, 8192), (32, 8192)]


def test_figures_of_a_step() -> None:
    row: dict[str, Any] = {
        "model": "llama-3.1-8b", "batch": 64, "context": 1024, "seconds": 6.0e-3, "device_seconds": 5.7e-3,
        "element_bytes": 2, "kv_element_bytes": 2, "device": "cuda",
    }  # fmt: skip
    decode_step.finish(row, Machine(4.3e12, 790e12))
    assert row["floor"] == pytest.approx(5.49e-3, rel=1e-3) and row["ratio"] == pytest.approx(6.0 / 5.49, rel=1e-3)
    assert row["exposed"] == pytest.approx(0.05) and row["tokens_per_s"] == pytest.approx(64 / 6.0e-3)
    assert row["target"] == pytest.approx(6.9e-3)
    rows = gpu._decode_steps({"rows": [row]})
    assert rows[0][-2:] == ["<= 6.90 ms", "yes"] and rows[1] == [
        "its exposed host time", "5.0 %", "", "", "<= 2 %", "**no**",
    ]  # fmt: skip
    assert decode_step.summarize([(3.0, 1.0), (1.0, 2.0), (2.0, 3.0)])["seconds"] == 2.0


def test_a_model_is_stepped_at_the_contexts_asked_for(tmp_path: Path) -> None:
    """The whole path on the bundled model: a process of its own, its floor beside every step."""
    from quire.cluster.config import EngineConfig, resolve

    folder = resolve(EngineConfig(device="cpu")).model
    arguments = decode_step.options().parse_args(
        [f"--model={folder}", "--device=cpu", "--batch=1,3", "--context=40,900", "--steps=3", f"--out={tmp_path}"]
    )
    found = decode_step.run(arguments)
    assert [(row.get("failure"), row["batch"], row["context"]) for row in found["rows"]] == [
        (None, 1, 40), (None, 3, 40), (None, 1, 900), (None, 3, 900),
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["samples"] == 3 and row["seconds"] >= row["device_seconds"] > 0 and row["floor"] > 0
    assert json.loads((tmp_path / "decode_step.json").read_text())["rows"] == found["rows"]
    assert "| 900 |" in decode_step.describe(found)


# -- parts


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_leaves_what_it_has_when_its_time_is_over(tmp_path: Path) -> None:
    part = Part("x", [], [], "some-*", 1.5)
    code = f"""
import subprocess, sys, time
from pathlib import Path
Path({str(tmp_path)!r}, "some-a.json").write_text('{{"rows": [1]}}')
Path({str(tmp_path)!r}, "some-a.md").write_text("text")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
Path({str(tmp_path)!r}, "pid").write_text(str(child.pid))
time.sleep(100)
"""
    found = gpu.run_part(python(code), part, tmp_path, time.monotonic() + 60)
    assert found["found"] == {"rows": [1]} and found["text"] == "text" and found["failure"] == "not done after 2 s"
    child = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "a process outlived its part"
        time.sleep(0.05)


def test_parts_that_fail_or_do_not_begin(tmp_path: Path) -> None:
    part = Part("x", [], [], "some", 30)
    soon = time.monotonic() + 60
    assert gpu.run_part(python("raise SystemExit(4)"), part, tmp_path, soon)["failure"] == "ended with 4"
    assert gpu.run_part(python("pass"), part, tmp_path, soon)["failure"] == "it left nothing"
    late = gpu.run_part(python("pass"), part, tmp_path, time.monotonic() + 3)
    assert late == {"failure": "not run: no time was left"}


def test_the_parts_fit_their_time() -> None:
    made = gpu.parts(["transformers"])
    first = [made[name].limit for name in ("ceilings", "decode_step", "offline")]
    assert sum(first) <= gpu.TOTAL_SECONDS - gpu.END_SECONDS


def test_one_table_of_all_parts() -> None:
    machine = {"device": "NVIDIA H200", "date": "2026-11-21 10:00 UTC", "cuda": "13.0"}
    quire = {"output_tokens_per_s": 30_000.0, "seconds": 4.5, "load_s": 1.0, "peak_memory_mib": 1}
    nano = told(quire=quire, transformers=quire | {"output_tokens_per_s": 10_000.0})
    nano |= {"machine": machine, "model": "qwen3-0.6b", "workload": "nano"}
    nano["floor"]["output_tokens_per_s"] = 36_000.0
    ceilings = {"bandwidth": {"read": 4.5e12}, "products": [{"dtype": "bfloat16", "flops_per_s": 7.8e14}]}
    kernels = {"rows": [{"case": "a", "met": True}, {"case": "b", "failure": "wrong", "met": False}, {"case": "c"}]}
    found = {
        "machine": machine,
        "parts": {
            "ceilings": {"found": ceilings, "text": "C"}, "offline": {"found": nano, "text": "O"},
            "kernels": {"found": kernels, "text": "K"}, "offline-8b": {"failure": "not run: no time was left"},
        },
    }  # fmt: skip
    rows = gpu.summary(found)
    assert ["memory, read", "4.50 TB/s", "", "", "", ""] in rows
    assert ["nano, qwen3-0.6b, quire", "30,000 tok/s", "36,000 tok/s", "83 %", ">= 27,800 tok/s", "yes"] in rows
    assert ["Quire / transformers", "3.00", "", "", ">= 4.0", "**no**"] in rows
    assert ["kernels", "2 of 3 right; failed: b", "", "", "2 have targets", "1 of 2"] in rows
    assert ["offline-8b", "not run: no time was left", "", "", "", ""] in rows
    text = gpu.describe(found)
    assert text.startswith("# 2026-11-21-nvidia-h200\n\nC\nO\nK\n") and text.rstrip().endswith("|")


# -- starting


def test_stages_are_read_from_the_servers_line() -> None:
    log = "[quire   5.2 s] seconds by stage: command 0.48, Ray 2.29, controller and gateway 0.13\nnext\n"
    assert startup.read_stages(log) == {"command": 0.48, "Ray": 2.29, "controller and gateway": 0.13}
    with pytest.raises(SystemExit, match="did not say"):
        startup.read_stages("[quire   5.2 s] ready\n")


def test_processes_have_names_that_people_know() -> None:
    assert startup.process_name("/x/python /x/ray/dashboard/dashboard.py --host=1") == "Ray: API server"
    assert startup.process_name("ray::WorkerActor.serve") == "worker"
    assert startup.process_name("ray::RuntimeEnvAgent") == "Ray: agents"
    assert startup.process_name("something") == "Ray: other"


def test_cpu_seconds_of_a_process_and_of_those_below_it() -> None:
    before = startup.cpu_seconds(os.getpid())["Ray: other"]
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert startup.cpu_seconds(os.getpid())["Ray: other"] - before >= 0.25
    assert startup.cpu_seconds(1 << 30) == {}


def test_starts_in_a_table() -> None:
    run = {"model": "bundled", "cache": "warm", "stages": {"Ray": 2.0, "torch": 1.0}, "ready": 3.0,
           "cpu": {"worker": 2.5}, "first token": 0.02, "answer": 0.08}  # fmt: skip
    runs = [run, run | {"ready": 5.0}, run | {"ready": 4.0}, run | {"model": "/m/m160", "cache": "cold", "ready": 9.0}]
    text = startup.describe({"machine": {"device": "cpu"}, "runs": runs})
    assert "| seconds | bundled, warm | m160, cold |" in text
    assert "| **ready, from the process's start** | 4.00 | 9.00 |" in text
    assert "| least and most | 3.00 to 5.00 | 9.00 to 9.00 |" in text and "| limit | 10 | 15 |" in text
    assert "| worker | 2.50 | 2.50 |" in text
