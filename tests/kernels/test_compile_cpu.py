"""A CPU's loops compiled ahead, in another process: all that a model needs, and nothing twice."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("numba")

from quire.kernels.cpu import compile as ahead
from quire.kernels.cpu import threads

SERVED = """
import sys
from quire.cluster.llm import LLM, SamplingParams
from quire.kernels.cpu import threads
llm = LLM(device="cpu", max_model_len=256, dtype="bfloat16")
llm.generate([[3, 4, 5]] * 2, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
print([bool(x.cache_hits) for x in threads._COMPILED])
print([name for name in sys.modules if name == "torch._dynamo"])
"""


def run(code: list[str], cache: Path) -> str:
    environ = {**os.environ, "QUIRE_CACHE_DIR": str(cache), "NUMBA_CACHE_DIR": str(cache / "numba")}
    command = [sys.executable, *code]
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True, timeout=300).stdout


def test_a_model_finds_everything_that_it_needs(tmp_path: Path) -> None:
    """Nor does recording its steps import torch's compiler, which takes a second and 150 MB."""
    done = tmp_path / "folder" / "done"
    arguments = ["--dtype", "bfloat16", "--head-size", str(head_size()), "--done", str(done)]
    run(["-m", "quire.kernels.cpu.compile", *arguments], tmp_path)
    assert done.exists()
    hits, imported = run(["-c", SERVED], tmp_path).splitlines()
    assert "True" in hits and "False" not in hits
    assert imported == "[]"


def head_size() -> int:
    from quire.cluster.config import find_model
    from quire.worker.models.spec import ModelSpec

    return ModelSpec.from_pretrained(find_model(None)).head_dim


def body(address):  # type: ignore[no-untyped-def]
    return


def lock_of(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """The file of `body`'s turn, in a folder for temporary files of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with threads._turn(body):
        (lock,) = folder.glob("quire-*.lock")
    return lock


def test_what_another_process_compiles_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_of(monkeypatch, tmp_path)
    code = (
        f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(threads.Busy), threads.impatient(), threads._turn(body):
            pass
        began = time.monotonic()
        threading.Timer(1, holder.kill).start()
        with threads._turn(body):
            assert time.monotonic() - began >= 1
        assert holder.wait(10) == -9


def test_a_turn_that_cannot_be_had_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with threads._turn(body):
        pass


def test_of_two_what_is_busy_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def one() -> int:
        calls.append("one")
        if not threads._here.waits:
            raise threads.Busy
        return 1

    def other() -> int:
        calls.append("other")
        return 2

    ahead.compile_all([one, other])
    assert calls == ["one", "other", "one"]
