"""What a step costs on the controller's host, over real gRPC to a worker whose steps take exactly 10 ms.

    python -m benchmarks.host_cost [--running 16,64,256,1024] [--run-ahead 0,1,2] [--steps 500] [--json FILE]

Every running sequence decodes one token per step; when one is full another takes its place. Printed for each number of
running sequences and each depth of run-ahead, in microseconds per step:

    schedule    the plan is made; this and the next four on the engine's thread, medians
    submit      it is encoded, and handed to the stream
    decode      the report becomes a result
    apply       the result is applied
    post        its events are handed to the loop that serves the streams
    host, p99   median and 99th percentile of their sum
    process     processor time of the whole controller process: these, the threads of gRPC, the loop
    wall        from step to step, on average
    exposed     (wall - 10 ms) / 10 ms: what is not hidden behind the worker

A second table: the controller whole, with 32 and 256 streams read by clients in another process; tokens per message
say how far messages were merged, gaps (milliseconds) how far apart a stream's messages came.

The worker is `benchmarks.sleeping_worker`: its steps follow one another without a gap as long as the next plan has come
when one ends, so that its own floor is exactly 10 ms per step.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.scheduler import LIMITS, OUTPUT, PROMPT, limits_for, request
from quire.cluster import wire
from quire.cluster.controller import Controller, ControllerConfig
from quire.cluster.executor import GrpcExecutor, WorkerAddress
from quire.cluster.quiet import SWITCH_S, QuietCollector
from quire.cluster.servers import GenerationServer
from quire.protos import generation_pb2_grpc
from quire.protos.channel import WORKER_SERVER_OPTIONS
from quire.protos.generation_pb2 import GetLoadRequest, ModelInfo
from quire.scheduler.engine import Engine
from quire.scheduler.plan import StepEvents
from quire.scheduler.scheduler import Scheduler

STEP_MS = 10.0
WARM_UP = 50
READERS_START_S = 3.5
"""Until the clients have started and warmed up."""
STREAM_S = 3.0
PARTS = ("schedule", "submit", "decode", "apply", "post")


@dataclass
class Figures:
    """Microseconds per step, but for `exposed`, a share of the worker's step."""

    running: int
    run_ahead: int
    parts: dict[str, float]
    host: float
    host_p99: float
    process: float
    wall: float
    exposed: float


class Stopwatch:
    """Adds up what calls take, step by step."""

    def __init__(self) -> None:
        self._now = dict.fromkeys(PARTS, 0)
        self.steps: list[dict[str, int]] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter_ns()
            result = function(*arguments)
            self._now[part] += time.perf_counter_ns() - started
            return result

        return call

    def next_step(self) -> None:
        self.steps.append(self._now)
        self._now = dict.fromkeys(PARTS, 0)


class Listener:
    """A loop in a thread of its own that takes events as the controller's does, and looks at each once."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.num_seen = 0

    def post(self, events: StepEvents) -> None:
        self._loop.call_soon_threadsafe(self._take, events)

    def _take(self, events: StepEvents) -> None:
        for sequence, _ in zip(events.sequences, events.token_ids, strict=True):
            self.num_seen += sequence.index + 1

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def sleeping_worker(rows: int) -> Iterator[WorkerAddress]:
    command = [sys.executable, "-m", "benchmarks.sleeping_worker", "--step-ms", str(STEP_MS), "--rows", str(rows)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        target, incarnation = process.stdout.readline().split()
        try:
            yield WorkerAddress(0, target, int(incarnation), pid=process.pid)
        finally:
            process.stdin.close()
            process.wait(10)


def measure(worker: WorkerAddress, epoch: int, running: int, run_ahead: int, steps: int) -> Figures:
    scheduler = Scheduler(limits_for(running))
    executor = GrpcExecutor([worker], epoch, token="", step_timeout=60)
    engine = Engine(scheduler, executor, run_ahead)
    listener, watch = Listener(), Stopwatch()
    post = watch.timed("post", listener.post)
    for name in ("schedule", "apply"):
        setattr(scheduler, name, watch.timed(name, getattr(scheduler, name)))
    executor.submit = watch.timed("submit", executor.submit)  # type: ignore[method-assign]
    with mock.patch.object(wire, "decode_report", watch.timed("decode", wire.decode_report)):
        executor.start()
        try:
            for number in range(running):
                scheduler.add(request(number, number * (OUTPUT - 2) // running))
            added, events = running, engine.step()
            marks: list[tuple[float, float]] = []
            while len(marks) <= WARM_UP + steps:
                post(events)
                for _ in events.ends:
                    scheduler.add(request(added, 0))
                    added += 1
                watch.next_step()
                marks.append((time.perf_counter(), time.process_time()))
                events = engine.step()
        finally:
            executor.close()
            listener.close()
    return _figures(running, run_ahead, watch.steps[-steps:], marks[-steps - 1 :])


def _figures(running: int, run_ahead: int, watched: list[dict[str, int]], marks: list[tuple[float, float]]) -> Figures:
    steps = len(watched)
    host = sorted(sum(step.values()) / 1e3 for step in watched)
    wall, process = ((marks[-1][i] - marks[0][i]) / steps * 1e6 for i in (0, 1))
    return Figures(
        running,
        run_ahead,
        {part: statistics.median(step[part] for step in watched) / 1e3 for part in PARTS},
        statistics.median(host),
        host[int(steps * 0.99)],
        process,
        wall,
        wall / (STEP_MS * 1e3) - 1,
    )


# -- the controller whole


@dataclass
class StreamFigures:
    streams: int
    switch_ms: float
    wall: float
    """Microseconds per step."""
    exposed: float
    process: float
    """Microseconds of the process per step."""
    tokens_per_message: float
    gap_p50_ms: float
    gap_p99_ms: float


async def serve_streams(worker: WorkerAddress, epoch: int, streams: int, switch_s: float) -> StreamFigures:
    """A whole controller, read by `streams` clients in another process."""
    controller = Controller(ControllerConfig(limits_for(streams), LIMITS, step_timeout=60), ModelInfo(model="m"))
    controller.connect([worker], epoch, token="")
    server = GenerationServer(
        lambda s: generation_pb2_grpc.add_GenerationServicer_to_server(controller, s), WORKER_SERVER_OPTIONS
    )
    port = await server.start("127.0.0.1:0")
    await controller.audit()  # the engine's thread runs, and has set its own interval
    sys.setswitchinterval(switch_s)
    command = ["-m", "benchmarks.stream_readers", f"127.0.0.1:{port}", "--streams", str(streams)]
    command += ["--prompt", str(PROMPT), "--output", str(OUTPUT)]
    readers = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=subprocess.PIPE)
    assert readers.stdout is not None
    answer = asyncio.ensure_future(readers.stdout.read())
    await asyncio.sleep(READERS_START_S)
    marks = []
    for seconds in (STREAM_S, 0):
        load = await controller.GetLoad(GetLoadRequest(), None)  # type: ignore[arg-type]
        assert load.num_running > streams // 2, f"{load.num_running} of {streams} streams run"  # some begin anew
        marks.append((time.perf_counter(), time.process_time(), load.num_steps))
        await asyncio.sleep(seconds)
    found = json.loads(await answer)
    await readers.wait()
    await server.stop(0)
    await controller.close()
    steps = marks[1][2] - marks[0][2]
    wall, process = ((marks[1][i] - marks[0][i]) / steps * 1e6 for i in (0, 1))
    return StreamFigures(
        streams,
        switch_s * 1e3,
        wall,
        wall / (STEP_MS * 1e3) - 1,
        process,
        found["tokens"] / found["messages"],
        found["gap_p50_ms"],
        found["gap_p99_ms"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", default="16,64,256,1024", help="numbers of running sequences")
    parser.add_argument("--run-ahead", default="0,1,2", help="depths")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--streams", default="32,256", help="numbers of open streams; empty: leave them out")
    parser.add_argument("--switch-ms", default=f"{SWITCH_S * 1e3:g}", help="switch intervals to try with streams")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args()
    numbers, depths = (_integers(text) for text in (arguments.running, arguments.run_ahead))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; {arguments.steps} steps of {STEP_MS:g} ms each; microseconds per step", flush=True)
    print(_line("running", "ahead", *PARTS, "host", "p99", "process", "wall", "exposed"))
    found: list[Figures] = []
    streamed: list[StreamFigures] = []
    quiet = QuietCollector()
    streams = _integers(arguments.streams)
    with sleeping_worker(max(numbers + streams)) as worker:
        epoch = 0
        for running, depth in itertools.product(numbers, depths):
            quiet.begin()
            epoch += 1
            figures = measure(worker, epoch, running, depth, arguments.steps)
            quiet.end()
            found.append(figures)
            times = (*figures.parts.values(), figures.host, figures.host_p99, figures.process, figures.wall)
            cells = [f"{time:.0f}" for time in times]
            print(_line(str(running), str(depth), *cells, f"{figures.exposed:.2%}"), flush=True)
        if streams:
            print("\nThe controller whole, run-ahead 1, read by as many streams from one other process", flush=True)
            print(_line("streams", "switch", "process", "wall", "exposed", "tok/msg", "gap p50", "gap p99"))
        for number, switch in itertools.product(streams, map(float, arguments.switch_ms.split(","))):
            epoch += 1
            row = asyncio.run(serve_streams(worker, epoch, number, switch / 1e3))
            streamed.append(row)
            cells = [f"{row.process:.0f}", f"{row.wall:.0f}", f"{row.exposed:.2%}", f"{row.tokens_per_message:.2f}"]
            gaps = [f"{row.gap_p50_ms:.1f}", f"{row.gap_p99_ms:.1f}"]
            print(_line(str(number), f"{switch:g}", *cells, *gaps), flush=True)
    if arguments.json is not None:
        rows = {"steps": [asdict(row) for row in found], "streams": [asdict(row) for row in streamed]}
        arguments.json.write_text(json.dumps({"machine": machine, **rows}, indent=1) + "\n")


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _line(*cells: str) -> str:
    return " ".join(f"{cell:>8}" for cell in cells)


if __name__ == "__main__":
    main()
