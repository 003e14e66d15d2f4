"""Memory of a CPU's pool: in huge pages, where the kernel has them, and there before a step writes to it.

A step reads all weights, and a block here and a block there of the KV pool. Over pages of 4 KiB the processor looks up
addresses for as long as it reads; over pages of 2 MiB a decode step of one row is a tenth shorter. Most systems give
huge pages to those who ask. Whatever goes wrong here costs speed and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

HUGE_PAGE = 2 << 20
FULL = 0.9
"""A mapping is worth it if so much of it is in use: what is not would be taken."""

MADV_COLLAPSE = 25
"""Linux 6.1: now, by copying, instead of some time later."""

MADV_POPULATE_WRITE = 23
"""Linux 5.14: as if every page had been written to, and none is changed."""

MOST_AHEAD = 2 << 30
"""Bytes that are taken before they are needed, at most;"""
SHARE_AHEAD = 4
"""and of a pool no more than one part in so many."""

BURST = 2 * HUGE_PAGE
"""It is not worth a thread to take fewer."""

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
    madvise = _madvise()
    moved = 0
    for start, stop in list(full_mappings()):
        start, stop = -(-start // HUGE_PAGE) * HUGE_PAGE, stop // HUGE_PAGE * HUGE_PAGE
        if start < stop and madvise(start, stop - start, MADV_COLLAPSE) == 0:
            moved += stop - start
    return moved


def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


class Ahead:
    """Takes memory of a pool shortly before it is first used; what is far from being used is not taken.

    The first write to a page waits until the kernel has cleared it, and a virtual machine until its host has found one:
    0.2 ms for a huge page, or 5. In a step all threads wait with the one that writes."""

    def __init__(self, pool: torch.Tensor) -> None:
        """A contiguous tensor, used from its beginning. It may go while memory is taken."""
        self._pool = weakref.ref(pool)
        start = pool.data_ptr()
        self._start = -(-start // HUGE_PAGE) * HUGE_PAGE
        self._size = (start + pool.numel() * pool.element_size() - self._start) // HUGE_PAGE * HUGE_PAGE
        self._ahead = min(MOST_AHEAD, self._size // SHARE_AHEAD)
        self._wanted = self._taken = 0
        self._is_possible = sys.platform.startswith("linux")
        self._changing = threading.Lock()
        self._thread: threading.Thread | None = None

    def reach(self, used: int) -> None:
        """So many bytes from the beginning are in use, or soon will be. Returns at once."""
        wanted = min(used + self._ahead, self._size)
        if wanted < self._wanted + BURST or not self._is_possible:
            return
        with self._changing:
            self._wanted = wanted
            if self._thread is None:
                self._thread = threading.Thread(target=self._take, name="memory-ahead", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # there may be no more threads
                    self._thread, self._is_possible = None, False

    def wait(self) -> None:
        """Until what has been reached so far is there."""
        if (thread := self._thread) is not None:
            thread.join()

    def _take(self) -> None:
        madvise = _madvise()
        with contextlib.suppress(OSError):
            # Of this thread alone: steps come first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            with self._changing:
                pool = self._pool()
                if self._taken >= self._wanted or not self._is_possible or pool is None:
                    self._thread = None
                    return
            # One page at a time: whoever needs the memory map meanwhile waits for no longer.
            self._is_possible = madvise(self._start + self._taken, HUGE_PAGE, MADV_POPULATE_WRITE) == 0
            self._taken += HUGE_PAGE
            del pool


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
