"""Where compiled kernels go, before numba and Triton ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quire.worker.compiled import choose_folders


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
