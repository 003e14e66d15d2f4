"""Loops compiled by numba, run by the threads of torch's own OpenMP pool.

numba's own threads would be a second pool, and each would spin on the other's cores between its turns. A region is a
function of one address, that of its arguments, which every thread calls; `thread` and `threads` tell it which part is
its own.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding
import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

thread = types.ExternalFunction("omp_get_thread_num", types.int32())
threads = types.ExternalFunction("omp_get_num_threads", types.int32())


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """What an int64 points at, for numba.carray."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@functools.cache
def _parallel() -> Any:
    """The entry of torch's OpenMP runtime, whichever it is; GNU's entry points are the ones that all of them have."""
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    for name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
        address = ctypes.cast(torch_cpu[name], ctypes.c_void_p).value
        llvmlite.binding.add_symbol(name, address)
    function = torch_cpu["GOMP_parallel"]
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


@functools.cache
def _alone() -> Callable[[int], Callable[[Any], None]]:
    """From an address to the function there, to be called by this thread, without Python's lock."""
    return functools.cache(ctypes.CFUNCTYPE(None, ctypes.c_void_p))


def check() -> None:
    """Raises if torch's OpenMP has no entry for us (OSError, AttributeError)."""
    _parallel()


@functools.cache
def version() -> int:
    """Of this folder's files. A body that refers to it is compiled anew when any of them changes: numba looks at the
    file of the body alone."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:6], "little")


def region(body: Callable[..., None]) -> int:
    """The address of a compiled body; compiled once, and kept on disk where possible. Raises Busy, within `impatient`,
    where another process compiles it."""
    _parallel()
    signature = types.void(types.int64)
    with _turn(body):
        try:
            compiled = numba.cfunc(signature, cache=True)(body)
        except RuntimeError:  # there is no folder where numba could keep a cache
            compiled = numba.cfunc(signature)(body)
    _COMPILED.append(compiled)
    address: int | None = compiled.address
    assert address is not None
    return address


_COMPILED: list[Any] = []
"""Kept alive: an address does not hold its function."""


class Busy(RuntimeError):
    """Another process compiles this body."""


@contextmanager
def _turn(body: Callable[..., None]) -> Iterator[None]:
    """One process of a user compiles a body, and those that come meanwhile wait and find it on disk. Beside saving
    them the work, it keeps them from writing over each other's entries in the body's index."""
    name = hashlib.sha256(f"{__file__}:{body.__module__}.{body.__qualname__}".encode()).hexdigest()[:20]
    path = Path(tempfile.gettempdir(), f"quire-{os.getuid()}-{name}.lock")
    with ExitStack() as stack:
        with suppress(OSError):  # of no use to compiling itself
            file = stack.enter_context(open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if _here.waits else fcntl.LOCK_NB))
            except BlockingIOError:
                raise Busy(f"{body.__qualname__} is being compiled") from None
        yield


@contextmanager
def impatient() -> Iterator[None]:
    """Within it, this thread does not wait for what other processes compile."""
    _here.waits = False
    try:
        yield
    finally:
        _here.waits = True


@functools.cache
def _numbers(count: int) -> type[Any]:
    return ctypes.c_int64 * count


def pack(*numbers: int) -> Any:
    """int64 side by side, as `run` takes them. Between the loops of a step Python finds little of itself in the
    processor's caches, and an array of NumPy costs several times more."""
    return _numbers(len(numbers))(*numbers)


@functools.lru_cache(maxsize=64)
def float_bits(x: float) -> int:
    """A number whose first four bytes are x as float32, to be packed."""
    return int.from_bytes(struct.pack("=fi", x, 0), sys.byteorder)


class NotRecordable(RuntimeError):
    """What was to be recorded computes something beside our regions, or takes too much memory for it."""


class Call(NamedTuple):
    """Of a region, recorded."""

    address: int
    arguments: Any
    counts: bool
    """Its first argument counts what threads have taken."""


class Recorder:
    """What `run`, `empty` and `keep` tell while a program is recorded."""

    def __init__(self, empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]) -> None:
        self.empty = empty
        self.calls: list[Call] = []
        self.kept: list[Any] = []


class _Here(threading.local):
    """Other threads may compute while this one records."""

    recorder: Recorder | None = None
    waits = True
    """For bodies that other processes compile."""


_here = _Here()


@contextmanager
def recorded_by(recorder: Recorder) -> Iterator[None]:
    """Within it, this thread notes regions and does not run them."""
    _here.recorder = recorder
    try:
        yield
    finally:
        _here.recorder = None


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """For a region's results."""
    if (recorder := _here.recorder) is not None:
        return recorder.empty(tuple(shape), dtype)
    return torch.empty(shape, dtype=dtype)


def keep(*objects: Any) -> None:
    """What arguments point at and nobody else will hold."""
    if (recorder := _here.recorder) is not None:
        recorder.kept.extend(objects)


def run(address: int, arguments: Any, num_threads: int | None = None, counts: bool = False) -> None:
    """Every thread of the pool calls the region with what `pack` made; a single one without the pool. `counts`: the
    first argument counts what threads have taken, and is 0."""
    if (recorder := _here.recorder) is not None:
        copy = type(arguments).from_buffer_copy(arguments)  # layers set them anew
        recorder.calls.append(Call(address, copy, counts))
    elif num_threads == 1:
        _alone()(address)(arguments)
    else:
        _parallel()(address, arguments, num_threads or torch.get_num_threads(), 0)
