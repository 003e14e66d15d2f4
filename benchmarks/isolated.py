"""Cases run one after another in a process of their own, so that one that crashes, hangs or breaks the GPU's context
costs itself only: the next process goes on with the case after it.

The process reports through a pipe, one JSON object per line: {"case": name, "kind": "start"}, anything with other
kinds, {"case": name, "kind": "end"}.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

Event = dict[str, Any]


def run_cases(command: list[str], names: list[str], case_limit: float, total_limit: float) -> Iterator[Event]:
    """Events of all `names`; each ends with kind "end" or "error", {"text": what went wrong}.

    `command` is started with two more arguments: the pipe's number and the names left, as JSON. Seconds for limits.
    """
    left = list(names)
    deadline = time.monotonic() + total_limit
    while left:
        if time.monotonic() > deadline:
            yield from _errors(left, f"not run: {total_limit:.0f} s are over")
            return
        before = len(left)
        for event in _one_process(command, left, case_limit, deadline):
            if event["kind"] in ("end", "error"):
                left.remove(event["case"])
            yield event
        if len(left) == before:
            yield from _errors(left, "the process did not start")
            return


def _errors(names: list[str], text: str) -> list[Event]:
    return [{"case": name, "kind": "error", "text": text} for name in names]


def _one_process(command: list[str], names: list[str], case_limit: float, deadline: float) -> Iterator[Event]:
    """Until all are done or the process is: what it was at is then reported as an error."""
    reader, writer = os.pipe()
    process = subprocess.Popen([*command, str(writer), json.dumps(names)], pass_fds=[writer])
    os.close(writer)
    current, why = None, ""
    with open(reader, "rb", buffering=0) as pipe:
        for line in _lines(pipe.fileno(), case_limit, deadline):
            if line is None:
                why = f"killed: silent for {case_limit:.0f} s, or out of time"
                process.kill()
                break
            event: Event = json.loads(line)
            current = None if event["kind"] in ("end", "error") else event["case"]
            yield event
    code = process.wait()
    if current is not None:
        yield {"case": current, "kind": "error", "text": why or f"the process ended with {code}"}


def _lines(pipe: int, silence: float, deadline: float) -> Iterator[bytes | None]:
    """Whole lines until the other end closes; None, once, after so many seconds of silence or at the deadline."""
    data = b""
    while True:
        left = min(silence, deadline - time.monotonic())
        if not select.select([pipe], [], [], max(0.0, left))[0]:
            yield None
            return
        part = os.read(pipe, 1 << 16)
        if not part:
            return
        *lines, data = (data + part).split(b"\n")
        yield from lines


class Reporter:
    """The process's end of the pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe = os.fdopen(pipe, "w", buffering=1)

    def send(self, case: str, kind: str, **values: Any) -> None:
        self._pipe.write(json.dumps({"case": case, "kind": kind, **values}) + "\n")

    def run(self, names: list[str], work: Callable[[str], None], healthy: Callable[[], None]) -> None:
        """`work` on each name; where it raises, `healthy` says by raising that this process cannot go on."""
        for name in names:
            self.send(name, "start")
            try:
                work(name)
            except Exception as error:
                traceback.print_exc()
                self.send(name, "error", text=describe(error))
                try:
                    healthy()
                except Exception as broken:
                    print(f"giving up this process: {describe(broken)}", file=sys.stderr, flush=True)
                    os._exit(3)
            else:
                self.send(name, "end")


def describe(error: BaseException) -> str:
    """In one line of a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}".replace("|", "/")
