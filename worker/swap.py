"""The swap space: memory of the host that holds blocks of the pool while nobody computes with them.

Invariant: on return from a call, the blocks that it names may be rewritten by whatever is issued to the device next,
and slots and blocks hold what was put there to whatever is issued next. On a CPU that is a copy. On a GPU blocks are
gathered into staging memory in the order of the steps, and go from there to pinned memory on a stream of their own;
the way back is the same. Fences in both directions keep staging memory from being taken again too early.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from quire.kernels.blocks import gather_blocks, scatter_blocks
from quire.worker import pages

STAGING_BYTES = 64 << 20
"""Of the device's memory, unless a few blocks are larger."""

CHUNKS = 4
"""So many parts of it are on their way at once."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Blocks that move together, and their slots."""

    blocks: torch.Tensor
    """[n] int32, on the pool's device."""
    slots: np.ndarray
    """[n]."""


class SwapSpace(Protocol):
    num_slots: int
    chunk: int
    """Blocks that move together, at most."""

    def out(self, chunk: Chunk) -> None:
        """Blocks to slots."""

    def back(self, chunk: Chunk) -> None:
        """Slots to blocks."""


class NoSwap:
    """For a pool without one."""

    num_slots = 0
    chunk = 1

    def out(self, chunk: Chunk) -> None:
        raise AssertionError(f"there are no slots {chunk.slots}")

    back = out


class DirectSwap:
    """On a CPU."""

    chunk = 1 << 20

    def __init__(self, pool: torch.Tensor, num_slots: int) -> None:
        self.num_slots = num_slots
        self._pool, self._slots = pool, _host_memory(pool, num_slots)

    def out(self, chunk: Chunk) -> None:
        for block, slot in zip(chunk.blocks.tolist(), chunk.slots.tolist(), strict=True):
            self._slots[slot].copy_(self._pool[block])

    def back(self, chunk: Chunk) -> None:
        for block, slot in zip(chunk.blocks.tolist(), chunk.slots.tolist(), strict=True):
            self._pool[block].copy_(self._slots[slot])


Fence = Any
"""A point in the order of a stream."""


class CopyStream(Protocol):
    """Copies between device and pinned memory, beside what is computed."""

    def pin(self, memory: torch.Tensor) -> None:
        """From here on copies from and to this memory do not hold up the host."""

    def unpin(self, address: int) -> None:
        """The memory pinned at this address is about to be given back. Returns when nothing copies any more."""

    def computed(self) -> Fence:
        """Everything issued to the device until now."""

    def copied(self) -> Fence:
        """Every copy until now."""

    def copy_after(self, fence: Fence) -> None:
        """Further copies wait for it."""

    def compute_after(self, fence: Fence) -> None:
        """Whatever is issued to the device next waits for it."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None: ...


class StagedSwap:
    """On a GPU. All copies run on one stream, so a slot that is read has been written."""

    def __init__(self, pool: torch.Tensor, num_slots: int, stream: CopyStream) -> None:
        self.num_slots = num_slots
        self.chunk = _blocks_per_chunk(pool[0].nbytes)
        self._pool, self._slots, self._stream = pool, _host_memory(pool, num_slots), stream
        stream.pin(self._slots)
        weakref.finalize(self, stream.unpin, self._slots.data_ptr()).atexit = False
        self._staging = torch.empty(CHUNKS, self.chunk, *pool.shape[1:], dtype=pool.dtype, device=pool.device)
        self._free: list[Fence | None] = [None] * CHUNKS
        """When what was in each part last has left it."""
        self._turn = 0

    def out(self, chunk: Chunk) -> None:
        stream, turn = self._stream, self._take()
        staging, free = self._staging[turn, : len(chunk.slots)], self._free[turn]
        if free is not None:
            stream.compute_after(free)
        gather_blocks(self._pool, chunk.blocks, staging)
        stream.copy_after(stream.computed())
        for slots, rows in _runs(chunk.slots):
            stream.copy(self._slots[slots], staging[rows])
        self._free[turn] = stream.copied()

    def back(self, chunk: Chunk) -> None:
        stream, turn = self._stream, self._take()
        staging, free = self._staging[turn, : len(chunk.slots)], self._free[turn]
        if free is not None:
            stream.copy_after(free)
        for slots, rows in _runs(chunk.slots):
            stream.copy(staging[rows], self._slots[slots])
        stream.compute_after(stream.copied())
        scatter_blocks(self._pool, chunk.blocks, staging)
        self._free[turn] = stream.computed()

    def _take(self) -> int:
        self._turn = (self._turn + 1) % CHUNKS
        return self._turn


class CudaCopyStream:
    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def pin(self, memory: torch.Tensor) -> None:
        # Not torch's own pinned memory: it takes the next power of two.
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(error):
            raise MemoryError(f"{memory.nbytes} bytes of swap space could not be pinned ({error}); lower --swap-space")

    def unpin(self, address: int) -> None:
        self._stream.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)

    def computed(self) -> torch.cuda.Event:
        return _recorded(torch.cuda.current_stream())

    def copied(self) -> torch.cuda.Event:
        return _recorded(self._stream)

    def copy_after(self, fence: torch.cuda.Event) -> None:
        self._stream.wait_event(fence)

    def compute_after(self, fence: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(fence)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)


def swap_for(pool: torch.Tensor, num_slots: int) -> SwapSpace:
    if not num_slots:
        return NoSwap()
    if pool.device.type == "cpu":
        return DirectSwap(pool, num_slots)
    return StagedSwap(pool, num_slots, CudaCopyStream())


def staging_bytes(block_bytes: int) -> int:
    """What a swap space takes of the device's memory."""
    return CHUNKS * _blocks_per_chunk(block_bytes) * block_bytes


def _blocks_per_chunk(block_bytes: int) -> int:
    return max(1, STAGING_BYTES // CHUNKS // block_bytes)


def _host_memory(pool: torch.Tensor, num_slots: int) -> torch.Tensor:
    """[num_slots, ...]: untouched, so not yet taken."""
    return pages.allocate(num_slots * pool[0].nbytes).view(pool.dtype).view(num_slots, *pool.shape[1:])


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _runs(slots: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Consecutive slots, and where in the chunk they are: each run is one copy."""
    bounds = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
    for start, stop in pairwise(bounds):
        first = int(slots[start])
        yield slice(first, first + stop - start), slice(start, stop)
