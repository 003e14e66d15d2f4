"""What the machine around a worker offers. Standard library only: planning reads it before torch is loaded."""

from __future__ import annotations

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


def _table(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines}


def cpu_pool_bytes(available: int, num_ranks: int) -> int:
    """The KV pool of one rank on a CPU, where nobody has said otherwise."""
    return int(available * CPU_SHARE) // num_ranks
