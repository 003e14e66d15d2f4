"""What a kernel may ask about the GPU it is launched on, or is compiled for; the only place that asks.

A `Variant` is one compiled form of a kernel that Quire ships. Every file with kernels lists its own in
`variants(device)`, so that all of them can be compiled, and their registers counted, on a machine without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Device:
    backend: str
    """"cuda" or "hip"."""
    arch: int | str
    """80, 90, 100; "gfx942"."""
    num_sms: int
    """Multiprocessors, or compute units."""
    shared_bytes: int
    """Shared memory that one program may take."""

    @property
    def is_hopper(self) -> bool:
        return self.backend == "cuda" and self.arch == 90

    @property
    def has_float8(self) -> bool:
        """Converts e4m3 (OCP's) by itself."""
        return self.backend == "cuda" and int(self.arch) >= 89

    @property
    def warp_size(self) -> int:
        return 32 if self.backend == "cuda" else 64


DEVICES = {
    "sm_80": Device("cuda", 80, 108, 163 << 10),
    "sm_90": Device("cuda", 90, 132, 227 << 10),
    "sm_100": Device("cuda", 100, 148, 227 << 10),
    "gfx942": Device("hip", "gfx942", 304, 64 << 10),
}
"""A100, H100 and H200, B200, MI300X."""

NO_GPU = DEVICES["sm_90"]
"""Stands in where kernels are interpreted."""


@functools.cache
def device_of(index: int | None) -> Device:
    """The GPU of this number; None: there is none, kernels are interpreted."""
    if index is None:
        return NO_GPU
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device("hip", found.gcnArchName.split(":")[0], found.multi_processor_count, 64 << 10)
    arch = found.major * 10 + found.minor
    # Not every build of torch says how much a kernel may ask for beyond what it gets unasked.
    shared_bytes = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return Device("cuda", arch, found.multi_processor_count, shared_bytes)


def device_for(x: torch.Tensor) -> Device:
    return device_of(x.device.index if x.is_cuda else None)


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel, specialised."""

    name: str
    """Of the form "operation: what distinguishes it"."""
    kernel: Any
    """The @triton.jit function."""
    arguments: Mapping[str, Any]
    """One value for each parameter of the kernel, in its order: for a pointer the torch.dtype that it points to, or
    None where the kernel is launched without it; for a scalar a typical int or float; for a constexpr its value. As at
    a launch, an int that is 1 or a multiple of 16 is compiled in as such."""
    num_warps: int = 4
    num_stages: int = 2
    hot: bool = False
    """On the path of every token: may not spill registers."""
    matrix: bool = False
    """Must use Hopper's matrix instructions when compiled for it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the launch, beside warps and stages; such as {"enable_fp_fusion": False}."""
