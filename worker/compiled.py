"""Where compiled kernels are kept between starts. numba and Triton read these variables when they are imported or first
used, so this comes before both; standard library only.

numba by itself keeps what it compiles beside its source, or under the user's cache folder where that cannot be written,
or nowhere; Triton keeps its own under the home folder and fails where that cannot be written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "QUIRE_CACHE_DIR"
"""One folder for both: what a container mounts to keep kernels from one start to the next."""


def choose_folders(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Sets the two compilers' variables where they are not set. Returns a sentence for the user where what is compiled
    will not be kept."""
    folder = environ.get(VARIABLE)
    if folder:
        path = Path(folder).expanduser().absolute()
        if _can_write(path):
            environ.setdefault("NUMBA_CACHE_DIR", str(path / "numba"))
            environ.setdefault("TRITON_CACHE_DIR", str(path / "triton"))
            return None
    if "TRITON_CACHE_DIR" in environ:
        return None
    home = Path(environ.get("TRITON_HOME") or Path.home())
    if not folder and _can_write(home / ".triton"):
        return None
    environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="quire-triton-")
    return (
        f"{folder or home / '.triton'} cannot be written, so GPU kernels are compiled at every start: set {VARIABLE} to"
        " a folder that can"
    )


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
