"""Where compiled kernels go, before numba and Triton ask."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire.worker.compiled import choose_folders, compile_ahead
from quire.worker.config import WorkerConfig


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders are made below the test's own; what nobody can write is a path through a file."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def test_one_folder_for_both(tmp_path: Path) -> None:
    environ = {"QUIRE_CACHE_DIR": str(tmp_path / "cache")}
    assert choose_folders(environ) is None
    assert environ["NUMBA_CACHE_DIR"] == str(tmp_path / "cache" / "numba")
    assert environ["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "triton")


def test_a_compilers_own_variable_wins(tmp_path: Path) -> None:
    environ = {"QUIRE_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": "/t"}
    assert choose_folders(environ) is None
    assert environ["TRITON_CACHE_DIR"] == "/t" and environ["NUMBA_CACHE_DIR"] == str(tmp_path / "numba")


def test_without_a_choice_the_compilers_choose(tmp_path: Path) -> None:
    environ = {"TRITON_HOME": str(tmp_path)}
    assert choose_folders(environ) is None
    assert set(environ) == {"TRITON_HOME"}


@pytest.mark.parametrize("name", ["TRITON_HOME", "QUIRE_CACHE_DIR"])
def test_a_folder_that_cannot_be_written_is_told_and_replaced(name: str, tmp_path: Path) -> None:
    environ = {name: str(tmp_path / "file" / "folder")}
    note = choose_folders(environ)
    assert note is not None and str(tmp_path / "file" / "folder") in note and "set QUIRE_CACHE_DIR" in note
    assert Path(environ["TRITON_CACHE_DIR"]).parent == tmp_path / "tmp" and "NUMBA_CACHE_DIR" not in environ


def test_a_model_that_has_run_leaves_its_cpu_kernels_there(tmp_path: Path) -> None:
    code = "from quire.cluster.llm import LLM; LLM(device='cpu', max_model_len=64, num_gpu_blocks_override=8).close()"
    environ = {**os.environ, "QUIRE_CACHE_DIR": str(tmp_path / "cache")}
    environ.pop("NUMBA_CACHE_DIR", None)
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=200)
    assert list((tmp_path / "cache" / "numba").rglob("*.nbi"))


def config(**chosen: Any) -> WorkerConfig:
    return WorkerConfig("model", **{"dtype": "bfloat16", **chosen})


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_loops_are_compiled_ahead_once(tmp_path: Path) -> None:
    environ = {**os.environ, "QUIRE_CACHE_DIR": str(tmp_path)}
    environ.pop("NUMBA_CACHE_DIR", None)
    process = compile_ahead(config(dtype="float32"), 16, environ)
    assert process is not None and process.wait(300) == 0
    assert list((tmp_path / "numba").rglob("*.nbc"))
    assert compile_ahead(config(dtype="float32"), 16, environ) is None
    other = compile_ahead(config(dtype="float32"), 32, environ)
    assert other is not None
    other.kill()


def test_nothing_is_compiled_ahead_for_a_gpu_or_where_it_could_not_be_kept(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "file" / "folder")
    assert compile_ahead(config(device="cuda"), 64, {"QUIRE_CACHE_DIR": str(tmp_path)}) is None
    assert compile_ahead(config(), 64, {"QUIRE_CACHE_DIR": nowhere, "XDG_CACHE_HOME": nowhere}) is None


def test_compiling_ends_with_whoever_asked_for_it(tmp_path: Path) -> None:
    code = (
        "import time; from quire.worker.compiled import compile_ahead; from quire.worker.config import WorkerConfig;"
        "print(compile_ahead(WorkerConfig('m'), 256).pid, flush=True); time.sleep(1000)"
    )
    environ = {**os.environ, "QUIRE_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().strip())
        assert wait_for(lambda: bool(list((tmp_path / "numba").rglob("*.nbi"))), 100) and child.exists()
        parent.kill()
    assert wait_for(lambda: not child.exists(), 10)
