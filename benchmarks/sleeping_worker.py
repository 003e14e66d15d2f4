"""A worker whose steps take a fixed time and compute nothing: what is left to measure is everything else.

    python -m benchmarks.sleeping_worker --step-ms 10 --rows 1024

Serves the step protocol through the worker's own service and prints address and incarnation; ends with its standard
input. It is a device with a queue, as a GPU is: a step starts when it has been launched and the one before has ended,
and ends exactly `--step-ms` later by the clock. How late a thread wakes up afterwards delays a report, as it does
behind a GPU, and never the step that is queued already.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from quire.protos import worker_pb2, worker_pb2_grpc
from quire.protos.channel import WORKER_SERVER_OPTIONS
from quire.worker.config import WorkerConfig
from quire.worker.loop import StepThread
from quire.worker.service import WorkerService

SPIN_S = 0.0002
"""Before a step's end the thread asks for the time instead of sleeping: sleep() returns up to 0.1 ms late."""
TOKEN = np.int32(7)


class SleepingStep:
    """A step on its way."""

    def __init__(self, report: worker_pb2.StepReport, ends_at: float) -> None:
        self.epoch, self.step = report.epoch, report.step
        self._report = report
        self._ends_at = ends_at

    def wait(self) -> worker_pb2.StepReport:
        while (left := self._ends_at - time.perf_counter()) > 0:
            time.sleep(max(0.0, left - SPIN_S))  # sleep(0) lets other threads run
        return self._report


class SleepingRunner:
    """In the place of `worker.runner.Runner`; knows of its rows how many tokens they have, and nothing else."""

    incarnation = 1

    def __init__(self, num_rows: int, step_s: float) -> None:
        self.config = WorkerConfig("", max_num_seqs=num_rows, num_threads=1)
        self._step_s = step_s
        self._free_at = 0.0
        self._known = np.zeros(num_rows, np.int64)
        self._computed = np.zeros(num_rows, np.int64)

    def launch(self, plan: worker_pb2.StepPlan) -> SleepingStep:
        for admit in plan.admits:
            self._known[admit.row] = len(admit.token_ids) // 4
            self._computed[admit.row] = admit.num_computed_tokens
        rows = np.frombuffer(plan.rows, "<i4")
        self._computed[rows] += np.frombuffer(plan.num_tokens, "<i4") if plan.num_tokens else 1
        sampling = rows[self._computed[rows] == self._known[rows]]
        self._known[sampling] += 1
        report = worker_pb2.StepReport(
            epoch=plan.epoch,
            incarnation=self.incarnation,
            step=plan.step,
            token_ids=np.full(len(sampling), TOKEN).tobytes(),
            busy_us=int(self._step_s * 1e6),
        )
        self._free_at = max(self._free_at, time.perf_counter()) + self._step_s
        return SleepingStep(report, self._free_at)

    def run(self, plan: worker_pb2.StepPlan) -> worker_pb2.StepReport:
        return self.launch(plan).wait()

    def reset(self) -> None:
        self._known[:] = self._computed[:] = 0

    def describe(self) -> worker_pb2.WorkerDescription:
        return worker_pb2.WorkerDescription(incarnation=self.incarnation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=1024)
    arguments = parser.parse_args()
    steps = StepThread("steps")
    runner = SleepingRunner(arguments.rows, arguments.step_ms / 1e3)
    server = grpc.server(ThreadPoolExecutor(4), options=WORKER_SERVER_OPTIONS)
    worker_pb2_grpc.add_WorkerServicer_to_server(WorkerService(runner, steps), server)  # type: ignore[arg-type]
    steps.be_quiet()
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", runner.incarnation, flush=True)
    sys.stdin.read()
    server.stop(0).wait()


if __name__ == "__main__":
    main()
