"""Huge pages on a CPU, where the kernel has them.

A step reads all weights, and a block here and a block there of the KV pool. Over pages of 4 KiB the processor looks up
addresses for as long as it reads; over pages of 2 MiB a decode step of one row is a tenth shorter. Most systems give
huge pages to those who ask. Whatever goes wrong here costs speed and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

HUGE_PAGE = 2 << 20
FULL = 0.9
"""A mapping is worth it if so much of it is in use: what is not would be taken."""

MADV_COLLAPSE = 25
"""Linux 6.1: now, by copying, instead of some time later."""

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0 *(\[heap\])?$")


def allocate(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8, untouched: no memory is taken before it is written."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the kernel was built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def gather() -> int:
    """Moves the large things that this process has loaded into huge pages; returns the bytes of what was moved. For
    weights, of which libraries keep copies in layouts of their own, at places that they do not tell."""
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for start, stop in list(full_mappings()):
        start, stop = -(-start // HUGE_PAGE) * HUGE_PAGE, stop // HUGE_PAGE * HUGE_PAGE
        if start < stop and madvise(start, stop - start, MADV_COLLAPSE) == 0:
            moved += stop - start
    return moved


def full_mappings(smaps: Path = Path("/proc/self/smaps")) -> Iterator[tuple[int, int]]:
    """First address and end of memory without a file behind it, where nearly all of it is in use."""
    with contextlib.suppress(OSError):
        mapping = None
        for line in smaps.read_text().splitlines():
            if "-" in line.split(" ", 1)[0]:
                match = _MAPPING.match(line)
                mapping = (int(match[1], 16), int(match[2], 16)) if match else None
            elif mapping is not None and line.startswith("Rss:"):
                if int(line.split()[1]) * 1024 >= FULL * (mapping[1] - mapping[0]):
                    yield mapping
                mapping = None
