"""Whose threads interrupt whom, where delivery and computation share cores."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies are Linux's")

CHILD = """
import os, threading
from quire.cluster.cores import give_way

def policies():
    return [os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")]

threads = [threading.Thread(target=threading.Event().wait, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
before = policies()
give_way()
threading.Thread(target=threading.Event().wait, daemon=True).start()  # started after
assert len(before) >= 4 and set(before) == {os.SCHED_OTHER}, before
assert len(policies()) > len(before) and set(policies()) == {os.SCHED_BATCH}, policies()
"""


def test_all_threads_give_way_and_those_to_come() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
