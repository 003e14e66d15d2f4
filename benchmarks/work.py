"""One case of benchmarks/kernels.py: what is called, how it is checked, and what it is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.timing import Call, Timing, replayed


@dataclass(frozen=True, slots=True)
class Setting:
    device: torch.device
    tiny: bool
    """Sizes for a run-through on a CPU."""
    quick: bool
    """Fewer samples."""

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; where kernels are interpreted float16, as the interpreter cannot multiply bfloat16 matrices."""
        return torch.float16 if self.device.type == "cpu" else torch.bfloat16


@dataclass(frozen=True, slots=True)
class Target:
    kind: str
    """"share" of the ceiling, at least; "TFLOP/s", at least; "us", at most; "ratio": times a peer's speed, at least."""
    value: float
    peer: str = ""

    def __str__(self) -> str:
        if self.kind == "share":
            return f">= {100 * self.value:.0f} %"
        if self.kind == "ratio":
            return f">= {self.value:g}x {self.peer}"
        return f"< {self.value:g} us" if self.kind == "us" else f">= {self.value:g} {self.kind}"

    def met(self, row: Mapping[str, Any]) -> bool | None:
        """None: cannot be told."""
        if self.kind == "us":
            return bool(row["seconds"] * 1e6 < self.value)
        if self.kind == "ratio":
            seconds = row.get("peers", {}).get(self.peer, {}).get("seconds")
            return None if seconds is None else bool(seconds / row["seconds"] >= self.value)
        value = row["share"] if self.kind == "share" else row["flops_per_s"] / 1e12
        return None if value is None or value != value else bool(value >= self.value)


@dataclass(slots=True)
class Peer:
    """Another way to the same result."""

    calls: Sequence[Call]
    error: Callable[[], float] | None = None
    """Relative, against the same reference; None: it computes something slightly different, such as other samples."""
    how: Callable[..., Timing] = replayed


@dataclass(slots=True)
class Work:
    calls: Sequence[Call]
    """The same call on different inputs, taken in turn so that no cache holds them."""
    check: Callable[[], float]
    """Runs the operation on poisoned memory; its relative error."""
    tolerance: float = 1e-2
    num_bytes: float = 0
    """Least that a call moves."""
    flops: float = 0
    """Least that a call computes with the matrix units."""
    dtype: str = "bfloat16"
    against: str = "read"
    """The ceiling for `num_bytes`: "read", "copy", "write", "to host", "to device"."""
    how: Callable[..., Timing] = replayed
    target: Target | None = None
    extras: Mapping[str, Callable[[], Timing]] = field(default_factory=dict)
    """Timed beside, such as what is done once per step."""
    prepare_peers: Callable[[], None] | None = None
    peers: Mapping[str, Callable[[], Peer]] = field(default_factory=dict)


Case = Callable[[Setting], Work]
