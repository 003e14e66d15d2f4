"""Decode steps on a CPU, recorded once per number of rows and replayed, as graphs.py does it on a GPU.

A recording takes no longer than what Python does in a step, so each is made when it is first needed and has exactly as
many rows as the step. Recorded is the way from the inputs to the final hidden states. Not every model's is made of
compiled loops alone; the others are launched, and so are rows that share prefixes, which are then read once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from quire.kernels import dispatch
from quire.kernels.attention import SharedPrefixes
from quire.worker.batch import Batch
from quire.worker.config import WorkerConfig

logger = logging.getLogger(__name__)


def are_used(config: WorkerConfig) -> bool:
    """One rank only: with several, sums over the ranks come in between."""
    return config.device == "cpu" and not config.enforce_eager and config.tensor_parallel_size == 1


class DecodePrograms:
    def __init__(
        self,
        batch: Callable[[int], Batch],
        forward: Callable[[Batch], torch.Tensor],
        finish: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """`batch` derives the inputs of a step of so many rows, at the same addresses each time; `forward` takes them
        to hidden states [rows, hidden]; `finish` samples from these, all rows greedily, stores the tokens and returns
        them."""
        self._batch, self._forward, self._finish = batch, forward, finish
        self._module: ModuleType | None = dispatch.programs()
        """None: loops cannot be compiled."""
        self._memory: Any = None if self._module is None else self._module.Memory()
        self._recorded: dict[int, Any] = {}
        self._too_many = float("inf")
        """So many rows, and more, cannot be recorded; 1: no step can."""

    def padded(self, num_rows: int) -> int:
        """`num_rows` if a step of so many can be replayed, else 0."""
        if num_rows not in self._recorded and num_rows < self._too_many and self._module is not None:
            batch = self._batch(num_rows)
            try:
                self._recorded[num_rows] = self._module.record(lambda: self._forward(batch), self._memory)
            except self._module.NotRecordable as error:
                logger.debug("steps of %d rows and more are launched: %s", num_rows, error)
                self._too_many = num_rows
        return num_rows if num_rows in self._recorded else 0

    @staticmethod
    def is_worth_launching(_shared: SharedPrefixes, _bytes_per_token: int) -> bool:
        """Reading them once always saves more."""
        return True

    def forward(self, size: int) -> torch.Tensor:
        """Hidden states [size, hidden] of the rows that the step's inputs name."""
        self._batch(size)
        program = self._recorded[size]
        program.run()
        result: torch.Tensor = program.result
        return result

    def finish(self, size: int) -> None:
        """Goes on from the hidden states of the last forward(size)."""
        self._finish(self._recorded[size].result)
