"""A GPU that is none: Triton's interpreter for kernels, and stand-ins for what else only CUDA has.

A recording is the recorded function, called again at each replay, with what it then returns in the memory of what it
first returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from late_copies import LateCopies
from late_transfer import LateTransfer

from quire.kernels import dispatch
from quire.kernels.gpu import attention
from quire.kernels.gpu.device import NO_GPU
from quire.worker.batch import Batch, StepInputs
from quire.worker.swap import NoSwap, StagedSwap

SMALL = replace(NO_GPU, num_sms=3)
"""So few multiprocessors that contexts are hardly cut: every program is interpreted."""


@dataclass
class Replayed:
    function: Callable[[], torch.Tensor]
    result: torch.Tensor
    recorder: ReplayRecorder

    def replay(self) -> None:
        self.recorder.num_replays += 1
        self.result.copy_(self.function())


@dataclass
class ReplayRecorder:
    num_replays: int = 0
    num_recorded: int = 0

    def record(self, function: Callable[[], torch.Tensor]) -> Replayed:
        self.num_recorded += 1
        function()
        return Replayed(function, function().clone(), self)


def poison_padding(inputs: StepInputs, num_rows: int, deterministic: bool) -> Batch:
    """What a recorded step reads of rows that are padding, where it may be anything."""
    is_padding = inputs.step.rows[:num_rows] < 0
    inputs.step.block_tables[:num_rows][is_padding] = 10**6
    return _static_batch(inputs, num_rows, deterministic)


_static_batch = StepInputs.static_batch


def poisoned_attention(*arguments: Any) -> torch.Tensor:
    """What attention leaves of rows that are padding, where it may be anything too."""
    out, rows = _paged_attention(*arguments), arguments[2]
    if rows.static:
        out[rows.on_device[1] == 0] = torch.nan
    return out


_paged_attention = attention.paged_attention


def emulate(patch: pytest.MonkeyPatch, graphs: bool) -> ReplayRecorder:
    """Whatever is loaded from here on believes to be on a GPU."""
    recorder = ReplayRecorder()
    patch.setattr(dispatch, "on_gpu", lambda x: True)
    patch.setattr(attention, "device_for", lambda x: SMALL)
    patch.setattr("quire.worker.runner.transfer_for", lambda device: LateTransfer())
    patch.setattr("quire.worker.runner.swap_for", lambda pool, n: StagedSwap(pool, n, LateCopies()) if n else NoSwap())
    patch.setattr("quire.worker.runner.recorder_for", lambda config: recorder if graphs else None)
    patch.setattr(StepInputs, "static_batch", poison_padding)
    patch.setattr(attention, "paged_attention", poisoned_attention)
    return recorder
