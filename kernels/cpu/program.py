"""The regions of a step, recorded once and replayed: one call in place of a hundred.

What Python does between two regions costs tens of microseconds, as each leaves nothing of Python's in the processor's
caches, and all threads but one wait for it. So a step's calls are noted instead of made, and from then on the threads
go from region to region by themselves, with a barrier in between.

A recording freezes addresses. What changes from step to step lies in memory that stays; results come from
`threads.empty`, which while a program is recorded takes memory that no other tensor uses at that point of it. Programs
run one at a time and share that memory. What no region computes cannot be recorded.
"""

# mypy: disable-error-code="attr-defined, call-arg, import-untyped, no-untyped-call, unreachable"
# numba's decorators change what mypy believes to see.

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from torch.utils._python_dispatch import TorchDispatchMode

from quire.kernels.cpu import threads
from quire.kernels.cpu.threads import Call, NotRecordable, pointer, thread

__all__ = ["Memory", "NotRecordable", "Program", "record"]

ALIGNED = 64
"""Bytes: a cache line."""

WORDS = 3
"""Of a call: the region's address, that of its arguments, whether the first of these counts what threads have taken."""


class Program:
    """Regions in their order, and all that they point at."""

    def __init__(self, result: torch.Tensor, calls: list[Call], kept: list[Any]) -> None:
        self.result = result
        """Written by each run; another program's run may write there too."""
        self._table = np.array([(c.address, ctypes.addressof(c.arguments), c.counts) for c in calls], np.int64)
        self._kept = calls, kept
        self._region = program_region()
        self._arguments = threads.pack(len(calls), self._table.ctypes.data)

    def run(self) -> None:
        threads.run(self._region, self._arguments)


class Memory:
    """Of results that last no longer than a program's run. Blocks have sizes of powers of two, so that programs of
    similar sizes use the same ones, and stay until this object goes."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self.num_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Its block is taken again once the last tensor that uses it is gone."""
        size = 1 << max(math.prod(shape) * dtype.itemsize, ALIGNED).bit_length()
        free = self._free[size]
        block = free.pop() if free else self._block(size)
        view = block[:]
        # Held by the tensor's storage, and by nothing else.
        weakref.finalize(view, free.append, block)
        return _tensor(view, shape, dtype)

    def lend(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory, which does not count as used for that."""
        address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return _tensor(view, tuple(tensor.shape), tensor.dtype)

    def _block(self, size: int) -> np.ndarray:
        self.num_bytes += size
        room = np.empty(size + ALIGNED, np.uint8)
        start = -room.ctypes.data % ALIGNED
        return room[start : start + size]


def _tensor(view: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(view)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def record(function: Callable[[], torch.Tensor], memory: Memory) -> Program:
    """Calls the function, whose regions are noted and not run; beside these it may use torch, and nothing else that
    computes. What it returns comes from a region and is contiguous. Raises NotRecordable, before anything is
    computed."""
    recorder = threads.Recorder(memory.empty)
    with _OnlyViews(), threads.recorded_by(recorder):
        result = function()
    return Program(memory.lend(result), recorder.calls, [memory, *recorder.kept])


class _OnlyViews(TorchDispatchMode):
    """Refuses what would compute or take memory of its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            raise NotRecordable(f"{func} computes beside the regions that can be recorded")
        return func(*args, **(kwargs or {}))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To keep its compiler out of this method, torch would import it: a second, and 150 MB."""
        return False


# -- the region that runs the others

_barrier = types.ExternalFunction("GOMP_barrier", types.void())


@intrinsic
def _call(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Calls the region at an address."""

    def generate(_context: Any, b: Any, _signature: Any, values: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        b.call(b.inttoptr(values[0], function.as_pointer()), [values[1]])

    return types.void(types.int64, types.int64), generate


@functools.cache
def program_region() -> int:
    version = threads.version()

    def body(address):  # type: ignore[no-untyped-def]
        if version == 0:
            return
        a = carray(pointer(address), (2,), np.int64)
        calls = carray(pointer(a[1]), (a[0], WORDS), np.int64)
        for i in range(a[0]):
            _call(calls[i, 0], calls[i, 1])
            _barrier()
            if thread() == 0 and calls[i, 2] != 0:
                carray(pointer(calls[i, 1]), (1,), np.int64)[0] = 0  # for the next run

    return threads.region(body)
