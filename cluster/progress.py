"""What a person at a terminal sees while a server starts: lines, a bar while weights load, and how to try it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TextIO

from tqdm import tqdm

from quire.cluster.config import ResolvedEngine
from quire.cluster.laps import describe


class Progress:
    """Writes to one stream; the bar only where that is a terminal."""

    def __init__(self, stream: TextIO, started: float | None = None) -> None:
        """`started`: what the lines' times count from, a value of time.monotonic(); None: now."""
        self._stream = stream
        self._started = time.monotonic() if started is None else started
        self._bar: tqdm | None = None  # type: ignore[type-arg]

    def line(self, text: str) -> None:
        self._close_bar()
        print(f"[quire {time.monotonic() - self._started:5.1f} s] {text}", file=self._stream, flush=True)

    def weights(self, done: int, total: int) -> None:
        """Bytes of weights read so far."""
        if not total or not self._stream.isatty():
            return
        if self._bar is None:
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="weights", file=self._stream, leave=False)
        self._bar.update(done - self._bar.n)

    def ready(self, address: str, engine: ResolvedEngine, num_blocks: int, laps: dict[str, float]) -> None:
        """`laps`: seconds by stage since the command was given."""
        tokens, seconds = num_blocks * engine.block_size, sum(laps.values())
        self.line(
            f"ready after {seconds:.1f} s: {engine.model_name} ({engine.spec.architecture}, {engine.dtype}) on"
            f" {engine.tensor_parallel_size} x {engine.device}, KV cache for {tokens:,} tokens:"
            f" {tokens / engine.max_model_len:.1f} requests of {engine.max_model_len:,} tokens at once"
        )
        self.line(f"seconds by stage: {describe(laps)}")
        where = "" if address == "127.0.0.1:50051" else f" --url {address}"
        self.line(f'gRPC on {address}; try, in another terminal:  {_command()} generate{where} "Once upon a time"')

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _command() -> str:
    """How this user starts the `quire` command."""
    if shutil.which("quire"):
        return "quire"
    return os.path.relpath(os.path.join(os.path.dirname(sys.executable), "quire"))
