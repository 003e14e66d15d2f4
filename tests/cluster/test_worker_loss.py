"""Processes that die or hang: every stream ends within seconds, with UNAVAILABLE and the rank's name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from quire.cluster.client import Client, ServerError
from quire.cluster.executor import GrpcExecutor, WorkerAddress, WorkerLost
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.engine import Engine
from quire.scheduler.params import SamplingParams
from quire.scheduler.request import ModelLimits, Request
from quire.scheduler.scheduler import Scheduler

STREAMS = 8


@pytest.fixture
def replica(start_own_replica: Any) -> Any:
    return start_own_replica(tensor_parallel_size=2, max_num_seqs=STREAMS)


def endless(client: Client) -> tuple[int, ServerError]:
    """Tokens received before the server ended the stream, and with what."""
    tokens = 0
    try:
        for response in client.generate("A fox", max_tokens=900, ignore_eos=True):
            tokens += len(response.output.token_ids)
    except ServerError as error:
        return tokens, error
    raise AssertionError("the stream came to a false end")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_worker_is_named_to_every_stream(replica, number):
    handle, client = replica
    victim = handle.addresses[1]
    try:
        with ThreadPoolExecutor(STREAMS) as pool:
            ends = [pool.submit(endless, client) for _ in range(STREAMS)]
            while client.load().generation_tokens < 4 * STREAMS:
                time.sleep(0.01)
            os.kill(victim.pid, number)
            struck = time.monotonic()
            results = [end.result(timeout=30) for end in ends]
            took = time.monotonic() - struck
        for tokens, error in results:
            assert tokens and error.code is grpc.StatusCode.UNAVAILABLE
            assert f"worker rank 1 (process {victim.pid}" in error.message and error.reason == "WORKER_LOST"
        assert took < 10
        with pytest.raises(ServerError, match="worker rank 1") as refusal:
            endless_start(client)
        assert refusal.value.code is grpc.StatusCode.UNAVAILABLE
        assert "worker rank 1" in (handle.wait(lambda: False) or "")
        assert not client.load().blocks_used
    finally:
        if number == signal.SIGSTOP:
            os.kill(victim.pid, signal.SIGCONT)


def endless_start(client: Client) -> None:
    next(client.generate("A fox", max_tokens=5))


def test_a_worker_lost_while_nobody_asks_is_noticed_too(replica):
    handle, client = replica
    os.kill(handle.addresses[0].pid, signal.SIGKILL)
    assert "worker rank 0" in (handle.wait(lambda: False) or "")
    with pytest.raises(ServerError, match="worker rank 0"):
        endless_start(client)


# -- the executor alone, over worker processes without Ray


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[tuple[subprocess.Popen[str], WorkerAddress]]]:
    """Two ranks that serve a hash model as processes of their own; they end with their standard input."""
    command = [sys.executable, str(Path(__file__).with_name("hash_worker.py"))]
    processes = [
        subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = []
    for rank, process in enumerate(processes):
        assert process.stdout is not None
        target, incarnation = process.stdout.readline().split()
        found.append((process, WorkerAddress(rank, target, int(incarnation), pid=process.pid)))
    yield found
    for process in processes:
        process.kill()
        process.communicate()


def make_engine(
    workers: list[tuple[subprocess.Popen[str], WorkerAddress]], step_timeout: float
) -> tuple[Engine, GrpcExecutor]:
    executor = GrpcExecutor([address for _, address in workers], 1, "", step_timeout)
    executor.start()
    limits = SchedulerConfig(num_blocks=32, block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64)
    return Engine(Scheduler(limits), executor, run_ahead=1), executor


def ask(engine: Engine, name: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    engine.scheduler.add(Request.checked(name, [1, 2], params, 0, ModelLimits(512, 64)))


def test_a_late_rank_runs_into_the_steps_time_limit_and_is_named(workers):
    engine, executor = make_engine(workers, step_timeout=1.0)
    ask(engine, "a")
    assert engine.step()
    os.kill(workers[1][1].pid, signal.SIGSTOP)  # shorter than what the keepalive would need
    with pytest.raises(WorkerLost, match=r"worker rank 1 .* did not answer step \d+ within 1 s"):
        for _ in range(10):
            engine.step()
    os.kill(workers[1][1].pid, signal.SIGCONT)
    executor.close()


def test_the_dead_process_is_blamed_and_not_its_peer(workers):
    engine, executor = make_engine(workers, step_timeout=30)
    ask(engine, "a")
    assert engine.step()
    workers[1][0].kill()
    with pytest.raises(WorkerLost, match=r"worker rank 1 .* is gone"):
        for _ in range(60):
            engine.step()
    executor.close()


def test_another_life_of_a_worker_is_not_driven(workers):
    (process, address), other = workers
    stale = WorkerAddress(0, address.target, address.incarnation + 1, pid=process.pid)
    engine, executor = make_engine([(process, stale), other], step_timeout=10)
    ask(engine, "a")
    with pytest.raises(WorkerLost, match="FAILED_PRECONDITION: the plan is for incarnation"):
        engine.step()
    executor.close()
