"""A copy stream as late as it may be: a copy is made when something that is issued to the device has to wait for it.

What is computed happens at once. So staging memory that is filled again too early shows in what arrives, and a copy
that does not wait for what was computed from its source, or is computed from its target, is noticed when it is issued.
"""

from __future__ import annotations

from collections import deque

import torch


class LateCopies:
    def __init__(self) -> None:
        self.pinned: torch.Tensor | None = None
        self.num_copies = 0
        self._queue: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        self._reads: dict[int, int] = {}
        """By address: when it was last computed from."""
        self._issued = self._done = 0
        self._clock = self._seen = 0
        """How often the device has been given a fence; and the last fence that copies wait for."""

    def pin(self, memory: torch.Tensor) -> None:
        self.pinned = memory

    def unpin(self, address: int) -> None:
        pass

    def computed(self) -> tuple[str, int]:
        self._clock += 1
        return "computed", self._clock

    def copied(self) -> tuple[str, int]:
        return "copied", self._issued

    def copy_after(self, fence: tuple[str, int]) -> None:
        kind, number = fence
        if kind == "computed":
            self._seen = max(self._seen, number)

    def compute_after(self, fence: tuple[str, int]) -> None:
        kind, number = fence
        if kind == "copied":
            while self._done < number:
                self._make()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert self.pinned is not None
        if self._is_host(target):
            assert self._seen == self._clock, "a copy that does not wait for its source"
        else:
            assert self._seen > self._reads.get(target.data_ptr(), -1), "a copy that does not wait for its target"
        self._issued += 1
        self.num_copies += 1
        self._queue.append((target, source))

    def read(self, memory: torch.Tensor) -> None:
        """Something computes from this memory of the device."""
        self._reads[memory.data_ptr()] = self._clock

    def _make(self) -> None:
        target, source = self._queue.popleft()
        target.copy_(source)
        self._done += 1

    def _is_host(self, memory: torch.Tensor) -> bool:
        assert self.pinned is not None
        start = self.pinned.data_ptr()
        return start <= memory.data_ptr() < start + self.pinned.nbytes
