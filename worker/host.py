"""What the machine around a worker offers. Standard library only: planning reads it before torch is loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

CPU_SHARE = 0.4
"""Of the available memory, for the KV pools of all ranks on the machine: the rest is for activations and neighbours."""


def available_memory(meminfo: Path = Path("/proc/meminfo"), control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that new allocations can take without swapping, on the machine and within this process's control group."""
    available = _table(meminfo)["MemAvailable:"] * 1024
    limit = control_group / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        stat = _table(control_group / "memory.stat")
        # Files that were read count as used, but give way.
        used = int((control_group / "memory.current").read_text()) - stat["active_file"] - stat["inactive_file"]
        available = min(available, int(most) - used)
    return max(available, 0)


def usable_cores(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may run on, no more than its control group's share of time."""
    cores = len(os.sched_getaffinity(0))
    limit = control_group / "cpu.max"
    if limit.exists():
        quota, period = limit.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def packs_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether weights in bfloat16 are laid out anew on this CPU: where a loop of ours takes them, or oneDNN computes in
    it."""
    if not cpuinfo.is_file():
        return False
    flags = set(re.findall(r"\w+", cpuinfo.read_text(encoding="utf-8")))
    return {"avx2", "fma"} <= flags or bool(flags & {"avx_ne_convert", "bf16"})


def _table(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines}


def cpu_pool_bytes(available: int, num_ranks: int) -> int:
    """The KV pool of one rank on a CPU, where nobody has said otherwise."""
    return int(available * CPU_SHARE) // num_ranks
