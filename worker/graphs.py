"""Decode steps recorded once per number of rows and replayed: one call in place of hundreds of launches.

A recording freezes addresses and sizes, so everything that changes from step to step lies in memory that stays: the
rows' tables and the step's inputs. A step of fewer rows than its recording is filled with padding, rows that compute
and leave no trace. Recorded is the way from the inputs to the final hidden states, and, by itself, the rest of a step
in which all rows are greedy. Other rows sample by launches, so that logits need not be kept for each size.

Steps with prompts are launched: their lengths decide how attention is cut, a recording would have to be sized for the
worst of them, and a step is bound by launches only below some hundred tokens, where a prompt passes once.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from quire.kernels.attention import SharedPrefixes
from quire.worker.config import WorkerConfig

BYTES_PER_GRAPH = 16 << 20
"""What the driver and the allocator take for each further recording, an allowance."""

LAUNCHES_WORTH = 256 << 20
"""Bytes of keys and values that a GPU reads in about the time in which a layer's kernels are launched one by one."""


class Recorder(Protocol):
    def record(self, function: Callable[[], torch.Tensor]) -> Recording:
        """Calls it, for what has to happen once, and records it. Recordings share their memory: they are replayed one
        at a time, in the order of one stream."""


class Recording(Protocol):
    result: torch.Tensor
    """Written by each replay."""

    def replay(self) -> None: ...


class CudaRecorder:
    """Call record() while nothing else uses the device; on several ranks on all of them, in the same order."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, function: Callable[[], torch.Tensor]) -> CudaRecording:
        self._stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Compiles kernels, and lets libraries choose theirs and take their memory.
            function()
            torch.cuda.synchronize()
            # Threads of collectives may ask for their events meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return CudaRecording(graph, result)


@dataclass(slots=True)
class CudaRecording:
    graph: torch.cuda.CUDAGraph
    result: torch.Tensor

    def replay(self) -> None:
        self.graph.replay()


def recorder_for(config: WorkerConfig) -> Recorder | None:
    """None: steps are launched kernel by kernel."""
    return CudaRecorder() if config.device == "cuda" and not config.enforce_eager else None


def padded_sizes(most: int) -> list[int]:
    """Numbers of rows that are recorded, ascending: close together where a step is short, and `most` in any case."""
    usual = [1, 2, 4, *range(8, 257, 8), *range(272, most + 1, 16)]
    return [size for size in usual if size < most] + [most]


class DecodeGraphs:
    def __init__(
        self,
        sizes: list[int],
        forward: Callable[[int], torch.Tensor],
        finish: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """`forward` takes a number of rows to their hidden states [rows, hidden]; `finish` samples from these, all
        rows greedily, stores the tokens and returns them."""
        self._sizes = sizes
        self._forward, self._finish = forward, finish
        self._recordings: dict[int, tuple[Recording, Recording]] = {}

    def record(self, recorder: Recorder) -> None:
        """The largest first: the others find room in its memory."""
        for size in reversed(self._sizes):
            forward = recorder.record(lambda size=size: self._forward(size))  # type: ignore[misc]
            finish = recorder.record(lambda hidden=forward.result: self._finish(hidden))  # type: ignore[misc]
            self._recordings[size] = forward, finish

    def padded(self, num_rows: int) -> int:
        """Rows of the recording that a step of so many takes; 0: there is none."""
        index = bisect.bisect_left(self._sizes, num_rows)
        return self._sizes[index] if self._recordings and index < len(self._sizes) else 0

    @staticmethod
    def is_worth_launching(shared: SharedPrefixes, bytes_per_token: int) -> bool:
        """Whether reading shared prefixes once, which a recording cannot, saves more than a replay does.
        `bytes_per_token` are keys and values of one layer."""
        members = shared.starts[1:] - shared.starts[:-1]
        saved = int(((members - 1) * shared.lengths).sum())
        return saved * bytes_per_token > LAUNCHES_WORTH

    def forward(self, size: int) -> torch.Tensor:
        """Hidden states [size, hidden] of the rows that the step's inputs name."""
        recording = self._recordings[size][0]
        recording.replay()
        return recording.result

    def finish(self, size: int) -> None:
        """Goes on from the hidden states of the last forward(size)."""
        self._recordings[size][1].replay()
