"""A server as a child process, and what its processes cost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from quire.cluster.fate import end_with_parent

_TICKS = os.sysconf("SC_CLK_TCK")
READY_LINE = re.compile(r"gRPC on (\S+);")


class ServedQuire:
    """`quire serve` in a process group of its own, on a free port and a Ray of its own."""

    def __init__(self, arguments: list[str], show_log: bool = False) -> None:
        """Starts it with these arguments of `quire serve` and waits until it is ready. Raises SystemExit."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quire.cluster.cli", "serve", "--grpc-port", "0", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_parent,
            env=environment,
        )
        self.pid = self.process.pid
        self._log: list[str] = []
        self.address = self._wait_ready(show_log)

    def _wait_ready(self, show_log: bool) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._log.append(line)
            if show_log:
                sys.stderr.write(line)
            if match := READY_LINE.search(line):
                return match[1]
        raise SystemExit(f"quire serve ended with {self.process.wait()}:\n{''.join(self._log[-20:])}")

    def stop(self) -> None:
        """A signal, as a user would; its whole group if that does not end it."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.communicate()


def cpu_seconds(root: int) -> dict[str, float]:
    """CPU seconds so far of a process and of all that descend from it, by name. Empty where there is no /proc."""
    stats: dict[int, tuple[int, float]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            stats[int(folder.name)] = (int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS)
    found: dict[str, float] = {}
    for pid, (_, seconds) in stats.items():
        if _descends(pid, root, stats):
            name = _name(pid)
            found[name] = found.get(name, 0.0) + seconds
    return found


def _descends(pid: int, root: int, stats: dict[int, tuple[int, float]]) -> bool:
    while pid != root:
        if pid not in stats:
            return False
        pid = stats[pid][0]
    return True


def _name(pid: int) -> str:
    """What tells a process from its siblings: Ray's title, a script's or module's name, or the program's."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    except OSError:
        return "ended"
    if not words:
        return "ended"
    if words[0].startswith("ray::") or "python" not in Path(words[0]).name:
        return Path(words[0]).name.partition(".")[0]
    chosen = next((word for word in words[1:] if not word.startswith("-")), words[0])
    return Path(chosen).name.removesuffix(".py")
