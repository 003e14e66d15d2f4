"""Where compiled kernels are kept between starts, and compiling those of a CPU while a first start does other things.
numba and Triton read these variables when they are imported or first used, so this comes before both; standard library
only.

numba by itself keeps what it compiles beside its source, or under the user's cache folder where that cannot be written,
or nowhere; Triton keeps its own under the home folder and fails where that cannot be written.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import sys
import tempfile
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, Popen

from quire.worker.config import WorkerConfig

VARIABLE = "QUIRE_CACHE_DIR"
"""One folder for both: what a container mounts to keep kernels from one start to the next."""


def choose_folders(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Sets the two compilers' variables where they are not set. Returns a sentence for the user where what is compiled
    will not be kept."""
    path = _choose_for_numba(environ)
    if path is not None:
        environ.setdefault("TRITON_CACHE_DIR", str(path / "triton"))
    if "TRITON_CACHE_DIR" in environ:
        return None
    folder = environ.get(VARIABLE)
    home = Path(environ.get("TRITON_HOME") or Path.home())
    if not folder and _can_write(home / ".triton"):
        return None
    environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="quire-triton-")
    return (
        f"{folder or home / '.triton'} cannot be written, so GPU kernels are compiled at every start: set {VARIABLE} to"
        " a folder that can"
    )


def _choose_for_numba(environ: MutableMapping[str, str]) -> Path | None:
    """The user's folder for both, where there is one that can be written."""
    folder = environ.get(VARIABLE)
    path = Path(folder).expanduser().absolute() if folder else None
    if path is None or not _can_write(path):
        return None
    environ.setdefault("NUMBA_CACHE_DIR", str(path / "numba"))
    return path


def compile_ahead(config: WorkerConfig, head_size: int, environ: Mapping[str, str] = os.environ) -> Popen[bytes] | None:
    """Starts compiling the loops of a model on a CPU, on this machine, in a process that ends with this one. None where
    they should be on disk already, and where nothing can be kept there."""
    folder = _notes_folder(environ)
    if config.device != "cpu" or folder is None:
        return None
    arguments = ["--dtype", config.dtype, "--head-size", str(head_size), "--block-size", str(config.block_size)]
    if config.kv_cache_dtype is not None:
        arguments += ["--kv-cache-dtype", config.kv_cache_dtype]
    environ = dict(environ)
    _choose_for_numba(environ)
    done = folder / "compiled" / _fingerprint([*arguments, environ.get("NUMBA_CACHE_DIR", "")])
    if done.exists():
        return None
    command = [sys.executable, "-P", "-m", "quire.kernels.cpu.compile", *arguments, "--done", str(done)]
    process = Popen(command, env=environ, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)  # noqa: S603
    threading.Thread(target=process.wait, name="compiling", daemon=True).start()
    return process


def _notes_folder(environ: Mapping[str, str]) -> Path | None:
    """Where it is noted what has been compiled."""
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    for folder in (environ.get(VARIABLE), f"{base}/quire"):
        if folder and _can_write(path := Path(folder).expanduser().absolute()):
            return path
    return None


def _fingerprint(words: Sequence[str]) -> str:
    """Other where numba would not take what it has on disk: after an upgrade, on another processor."""
    loops = Path(__file__).parents[1] / "kernels" / "cpu"
    stamps = [f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in sorted(loops.glob("*.py"))]
    info = Path("/proc/cpuinfo")
    told = re.findall(r"^(?:model name|flags|Features)\s*:.*", info.read_text(), re.MULTILINE) if info.exists() else []
    versions = [sys.version, importlib.metadata.version("numba"), platform.machine()]
    return hashlib.sha256("\n".join([*words, *stamps, *sorted(set(told)), *versions]).encode()).hexdigest()[:32]


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
