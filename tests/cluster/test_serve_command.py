"""`quire serve` as a user starts it: a process, its ready line, a client, signals, deaths, and nothing left behind."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from quire.cluster.client import Client

QUIRE = str(Path(sys.executable).with_name("quire"))


class Server:
    """A `quire serve` in a process group of its own, marked so that whatever it starts can be found."""

    def __init__(self, *arguments: str) -> None:
        self.mark = secrets.token_hex(8)
        kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [QUIRE, "serve", "--grpc-port", "0", "--device", "cpu", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**kept, "QUIRE_TEST_MARK": self.mark},
        )
        self.log = ""

    def wait_ready(self) -> str:
        """The address in the ready line."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if match := re.search(r"gRPC on (\S+);", line):
                return match[1]
        raise AssertionError(f"serve ended with {self.process.wait()}:\n{self.log}")

    def end(self, timeout: float = 60) -> int:
        """The exit code, once it has ended by itself."""
        self.log += self.process.communicate(timeout=timeout)[1] or ""
        return self.process.returncode

    def processes(self, name: str = "") -> list[int]:
        """Living processes that descend from this server, whatever has become of their parents."""
        mark = f"QUIRE_TEST_MARK={self.mark}".encode()
        return [
            int(folder.name)
            for folder in Path("/proc").iterdir()
            if folder.name.isdigit()
            and mark in _read(folder / "environ")
            and name.encode() in _read(folder / "cmdline")
        ]

    def names(self) -> list[bytes]:
        return [_read(Path(f"/proc/{pid}/cmdline")) for pid in self.processes()]

    def nothing_is_left(self) -> bool:
        deadline = time.monotonic() + 15
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def kill(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # ended meanwhile
        return b""


@pytest.fixture
def start() -> Iterator[type[Server]]:
    servers: list[Server] = []

    def make(*arguments: str) -> Server:
        servers.append(Server(*arguments))
        return servers[-1]

    yield make  # type: ignore[misc]
    for server in servers:
        server.kill()


def test_serve_generate_and_a_sigterm_that_lets_open_streams_finish(start):
    server = start()
    address = server.wait_ready()
    command = [QUIRE, "generate", "--url", address, "--temperature", "0", "--max-tokens", "30", "Once upon a time"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0 and len(answer.stdout.split()) > 8, answer
    with Client(address) as client:
        stream = client.generate("A fox", max_tokens=300, ignore_eos=True)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        tokens = sum(len(message.output.token_ids) for message in stream)
    assert tokens == 300
    assert server.end() == 0, server.log
    assert server.nothing_is_left(), server.names()


def test_a_dead_worker_ends_serve_with_its_name_and_exit_code_1(start):
    server = start("--tensor-parallel-size", "2")
    server.wait_ready()
    workers = server.processes("ray::WorkerActor")
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert server.end() == 1
    assert re.search(r"stopping: worker rank [01] \(process \d+ on .*\) is gone", server.log), server.log
    assert server.nothing_is_left(), server.names()


@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_without_ray_serve_ends_and_leaves_nothing(start, victim):
    server = start()
    server.wait_ready()
    (pid,) = [p for p in server.processes(victim) if victim in os.readlink(f"/proc/{p}/exe")]
    os.kill(pid, signal.SIGKILL)
    assert server.end() == 1
    assert "Ray's head is gone" in server.log or "is gone" in server.log, server.log
    assert server.nothing_is_left(), server.names()


def test_a_second_signal_ends_at_once_and_leaves_nothing(start):
    server = start()
    with Client(server.wait_ready()) as client:
        stream = client.generate("A fox", max_tokens=1000, ignore_eos=True)
        next(stream)
        os.killpg(server.process.pid, signal.SIGINT)
        time.sleep(0.5)
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.end(timeout=10) == 128 + signal.SIGINT
    assert server.nothing_is_left(), server.names()


@pytest.mark.parametrize(("kind", "sentence"), [("Controller", "controller"), ("Gateway", "gateway's process is gone")])
def test_a_dead_controller_or_gateway_ends_serve(start, kind, sentence):
    server = start()
    server.wait_ready()
    (pid,) = server.processes(f"ray::{kind}Actor")
    os.kill(pid, signal.SIGKILL)
    assert server.end() == 1
    assert sentence in server.log and "Traceback" not in server.log, server.log
    assert server.nothing_is_left(), server.names()


def test_joining_a_cluster_and_leaving_it_as_it_was(start, ray_cluster):
    import ray

    address = ray.get_runtime_context().gcs_address
    server = start("--address", address)
    with Client(server.wait_ready()) as client:
        assert client.complete("Once upon a time", max_tokens=5)
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 0, server.log
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)


def test_a_cluster_without_room_says_what_it_has(start, ray_cluster, monkeypatch):
    import ray

    from quire.cluster import launch
    from quire.cluster.config import EngineConfig, ServeConfig, resolve
    from quire.cluster.progress import Progress

    monkeypatch.setattr(launch, "PLACEMENT_TIMEOUT_S", 1.0)
    cores = int(ray.cluster_resources()["CPU"])
    engine = replace(resolve(EngineConfig(device="cpu")), tensor_parallel_size=cores + 1)
    replica = launch.Replica(ServeConfig(), engine, Progress(sys.stderr))
    shortage = rf"no room for {cores + 1} worker.*asked for CPU {cores + 1}.*CPU {cores}, GPU 0"
    with pytest.raises(launch.LaunchError, match=shortage):
        replica.start(lambda: False)
    replica.stop()


def test_a_cluster_that_is_not_there_is_one_line(start):
    server = start("--address", "127.0.0.1:1")
    assert server.end() == 1
    assert "no Ray cluster could be joined at '127.0.0.1:1'" in server.log and "Traceback" not in server.log
