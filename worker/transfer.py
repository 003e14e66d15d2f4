"""What travels between host and device, without either waiting for the other.

On a GPU both directions go through pinned memory: inputs on the stream that computes, results on one of their own, so
that the next step's kernels do not queue behind a copy to the host. On a CPU both sides are one memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

SPIN_S = 50e-6
"""A result that comes within this is taken at once."""

NAP_S = 20e-6
LONGEST_NAP_S = 200e-6
"""After that the waiting thread sleeps, longer and longer: what it then loses is hidden by the step sent ahead."""


class Arrival(Protocol):
    """Results on their way to the host."""

    def wait(self) -> list[np.ndarray]:
        """The arrays, in the order of the tensors; also the moment at which the step is over. May be called again."""

    @property
    def busy_us(self) -> int | None:
        """Between begin() and the last kernel, on the device; None where that is not known. After wait()."""


class Transfer(Protocol):
    num_lines: int
    """Steps whose inputs and results can be under way at once."""

    def staging(self, device: torch.Tensor) -> torch.Tensor:
        """Memory on the host from which `device` is sent to."""

    def begin(self) -> None:
        """A step starts."""

    def send(self, staging: torch.Tensor, device: torch.Tensor, count: int) -> None:
        """The first elements; `staging` may be written again when the step's results have arrived."""

    def fetch(self, results: Sequence[torch.Tensor]) -> Arrival:
        """Everything issued so far, and these results of it."""


class Here:
    """An arrival on a CPU: computed when it was asked for."""

    busy_us: int | None = None

    def __init__(self, results: Sequence[torch.Tensor]) -> None:
        self._arrays = [result.numpy().copy() for result in results]

    def wait(self) -> list[np.ndarray]:
        return self._arrays


class DirectTransfer:
    """Both sides are the same memory."""

    num_lines = 1

    def staging(self, device: torch.Tensor) -> torch.Tensor:
        return device

    def begin(self) -> None:
        pass

    def send(self, staging: torch.Tensor, device: torch.Tensor, count: int) -> None:
        pass

    def fetch(self, results: Sequence[torch.Tensor]) -> Here:
        return Here(results)


class CudaTransfer:
    """Called from one thread, but for the arrivals' wait()."""

    num_lines = 8

    def __init__(self) -> None:
        self._results = torch.cuda.Stream()
        self._begin = torch.cuda.Event(enable_timing=True)

    def staging(self, device: torch.Tensor) -> torch.Tensor:
        return torch.empty(device.shape, dtype=device.dtype, pin_memory=True)

    def begin(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def send(self, staging: torch.Tensor, device: torch.Tensor, count: int) -> None:
        device[:count].copy_(staging[:count], non_blocking=True)

    def fetch(self, results: Sequence[torch.Tensor]) -> _CudaArrival:
        computed = torch.cuda.Event(enable_timing=True)
        computed.record()
        arrays = []
        arrived = computed
        if results:
            self._results.wait_event(computed)
            with torch.cuda.stream(self._results):
                for result in results:
                    array = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
                    array.copy_(result, non_blocking=True)
                    arrays.append(array)
                arrived = torch.cuda.Event()
                arrived.record()
        return _CudaArrival(list(results), arrays, self._begin, computed, arrived)


class _CudaArrival:
    def __init__(
        self,
        results: list[torch.Tensor],
        arrays: list[torch.Tensor],
        begun: torch.cuda.Event,
        computed: torch.cuda.Event,
        arrived: torch.cuda.Event,
    ) -> None:
        self._results = results  # kept until they have been copied: the allocator knows one stream only
        self._arrays = arrays
        self._begun, self._computed, self._arrived = begun, computed, arrived

    def wait(self) -> list[np.ndarray]:
        spin_until(self._arrived.query)
        self._results.clear()
        return [array.numpy() for array in self._arrays]

    @property
    def busy_us(self) -> int | None:
        return int(self._begun.elapsed_time(self._computed) * 1000)


class _Query(Protocol):
    def __call__(self) -> bool: ...


def spin_until(is_done: _Query) -> None:
    """Returns when it is. Spins for a moment, giving way to other threads, then sleeps, so that a waiting thread costs
    no core."""
    deadline = time.perf_counter() + SPIN_S
    while not is_done():
        # Python's lock is given up here: a loop that kept it would hold up the thread that launches.
        time.sleep(0)
        if time.perf_counter() > deadline:
            break
    nap = NAP_S
    while not is_done():
        time.sleep(nap)
        nap = min(1.5 * nap, LONGEST_NAP_S)


def transfer_for(device: torch.device) -> Transfer:
    return CudaTransfer() if device.type == "cuda" else DirectTransfer()
