"""Whose end is whose: signals reach a replica once, and no process outlives the one that it serves.

A terminal's Ctrl-C, `timeout` and many init systems signal a whole process group. Ray's own processes would end at
once, and with them every request that could still have been finished; so the replica runs in a session of its own,
and its parent passes signals on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0


def in_own_session(run: Callable[[], int]) -> int:
    """Call `run` in a child process with a session of its own; returns its exit code. Call it before threads exist."""
    child = os.fork()
    if child == 0:
        os.setsid()
        end_with_parent()
        os._exit(_exit_code(run))
    for number in SIGNALS:
        signal.signal(number, lambda received, _frame: os.kill(child, received))
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        # Its session's stragglers: what a Ray whose head was killed leaves behind.
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def exit_with_parent() -> None:
    """End this process, whatever it is doing, when the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def end_with_parent() -> None:
    """SIGTERM for this process when its parent is gone: one that is killed cannot pass anything on, the kernel does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _exit_code(run: Callable[[], int]) -> int:
    try:
        return run()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
