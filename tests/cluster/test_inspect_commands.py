"""Recording a server, replaying what it decided, and the lives of its requests, by call and by command."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_worker import VOCAB, FakeWorker

from quire.cluster import cli, wire
from quire.cluster.client import Client, ServerError
from quire.cluster.controller import Controller, ControllerConfig
from quire.cluster.grpc_api import ApiSettings, GenerationService
from quire.cluster.launch import LaunchError, _check_record
from quire.cluster.relay import RelayService, RelayStub
from quire.protos import generation_pb2 as pb
from quire.protos import generation_pb2_grpc as pb_grpc
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.explaining.explain import Explanation, Moment, Sums
from quire.scheduler.plan import StepPlan, StepResult
from quire.scheduler.recording.replay import replay
from quire.scheduler.request import ModelLimits

LIMITS = SchedulerConfig(num_blocks=20, block_size=4, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=32)


class Executor:
    """A fake worker that can be lost."""

    starved_s = 0.0

    def __init__(self) -> None:
        self.worker = FakeWorker(
            LIMITS.num_blocks, LIMITS.block_size, LIMITS.max_num_seqs, LIMITS.max_num_batched_tokens
        )
        self.failure: Exception | None = None
        self.num_open: Callable[[], int] = lambda: 0
        """Requests that have come and not ended."""
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def start(self) -> None: ...

    def submit(self, plan: StepPlan) -> None:
        self.worker.submit(plan)

    def collect(self) -> StepResult:
        if self.failure is not None:
            raise self.failure
        assert self.may_go_on.wait(30)
        return self.worker.collect()

    def check(self) -> None: ...

    def close(self) -> None: ...


@asynccontextmanager
async def serving(record: Path | None = None, enable_admin: bool = True) -> AsyncIterator[tuple[Executor, Client]]:
    """Controller and gateway as they stand together, without text."""
    executor = Executor()
    settings = ControllerConfig(
        LIMITS, ModelLimits(VOCAB, LIMITS.max_model_len), step_timeout=5, record=None if record is None else str(record)
    )
    controller = Controller(settings, pb.ModelInfo(model="m"))
    controller.attach(executor)
    executor.num_open = lambda: controller.num_open
    inner, outer = grpc.aio.server(), grpc.aio.server()
    pb_grpc.add_GenerationServicer_to_server(controller, inner)
    RelayService(controller.Generate).add_to_server(inner)
    inner_port = inner.add_insecure_port("127.0.0.1:0")
    await inner.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{inner_port}") as channel:
        upstream = RelayStub(channel)
        api = ApiSettings(("m",), LIMITS.max_model_len, VOCAB, enable_admin=enable_admin)
        GenerationService(api, upstream, None).add_to_server(outer)
        port = outer.add_insecure_port("127.0.0.1:0")
        await outer.start()
        with Client(f"127.0.0.1:{port}") as client:
            yield executor, client
        await outer.stop(None)
        upstream.close()
    await inner.stop(None)
    await controller.close()


def _crowd(executor: Executor, client: Client) -> None:
    """More than the pool holds: somebody is preempted, and somebody waits. No step ends before all have come."""

    def ask(number: int) -> None:
        for _ in client.generate([number, 2, 3] * 4, request_id=f"r{number}", max_tokens=40, seed=number):
            pass

    executor.may_go_on.clear()
    with ThreadPoolExecutor(8) as threads:
        asked = threads.map(ask, range(8))
        deadline = time.monotonic() + 20
        while executor.num_open() < 8 and time.monotonic() < deadline:
            time.sleep(0.002)
        executor.may_go_on.set()
        list(asked)


def test_a_recorded_controller_replays_and_tells_lives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run"

    async def scenario() -> list[str]:
        async with serving(file) as (executor, client):
            await asyncio.to_thread(_crowd, executor, client)
            lives = [await asyncio.to_thread(client.explain, f"r{number}") for number in range(8)]
            with pytest.raises(ServerError, match="no request with id 'r9' is known") as error:
                await asyncio.to_thread(client.explain, "r9")
            assert error.value.code is grpc.StatusCode.NOT_FOUND
            with pytest.raises(ServerError, match="name the request to explain"):
                await asyncio.to_thread(client.explain, "")
            target = client.target
            assert await asyncio.to_thread(cli.run, ["explain", "r3", "--url", target]) == 0
            assert await asyncio.to_thread(cli.run, ["explain", "r9", "--url", target]) == 1
        assert [(life.state, life.num_output_tokens) for life in lives] == [("finished", 40)] * 8
        assert sum(life.num_preemptions for life in lives) > 0 and all(life.waits for life in lives)
        assert any("preempted for r" in moment.text for life in lives for moment in life.moments)
        return wire.decode_explanation(lives[3]).lines()

    lines = asyncio.run(scenario())
    out, err = capsys.readouterr()
    assert out.splitlines() == lines and lines[0].startswith("request r3: finished, ")
    assert err == "quire: no request with id 'r9' is known: there was none, or it ended too long ago\n"

    assert cli.run(["replay", str(file)]) == 0
    assert capsys.readouterr().out.endswith(": every decision is the same\n")
    # The same events in the same order; the clock of a recording is read a little later.
    assert cli.run(["replay", str(file), "--explain", "r3"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert [line.partition(" s  ")[2] for line in again] == [line.partition(" s  ")[2] for line in lines]


def test_a_changed_setting_is_told_by_its_first_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run"

    async def scenario() -> None:
        async with serving(file) as (executor, client):
            await asyncio.to_thread(_crowd, executor, client)

    asyncio.run(scenario())
    assert cli.run(["replay", str(file), "--set", "num_blocks=200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": every decision is the same")
    assert lines[1] == "with num_blocks=200:"
    assert lines[2].startswith("first difference in step ") and lines[3].startswith("  then: ")
    table = {line.split()[0]: line.split()[1:] for line in lines[6:]}
    assert int(table["num_preemptions"][0]) > 0 == int(table["num_preemptions"][1])
    assert "generation_tokens" not in table  # everybody gets what they got
    assert cli.run(["replay", str(file), "--set", "max-num-waiting=10000"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["with max_num_waiting=10000: every decision is the same too"]


def test_an_engine_that_fails_leaves_a_whole_recording(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "run") as (executor, client):
            executor.failure = RuntimeError("the disk is full")
            with pytest.raises(ServerError, match="the engine failed: the disk is full"):
                await asyncio.to_thread(lambda: list(client.generate([1, 2], request_id="early")))
            life = await asyncio.to_thread(client.explain, "early")
            assert life.state in ("running", "cancelled")

    asyncio.run(scenario())
    assert replay(tmp_path / "run").difference is None
    assert replay(tmp_path / "run").num_plans > 0


def test_whose_requests_those_were_is_the_operators_to_know() -> None:
    async def scenario(enable_admin: bool) -> set[str]:
        async with serving(enable_admin=enable_admin) as (executor, client):
            await asyncio.to_thread(_crowd, executor, client)
            lives = [await asyncio.to_thread(client.explain, f"r{number}") for number in range(8)]
        return {m.text.split(",")[0] for life in lives for m in life.moments if m.kind == "Preempted"}

    assert any("for r" in text for text in asyncio.run(scenario(True)))
    told = asyncio.run(scenario(False))
    assert told and told <= {"preempted for an earlier one", "preempted as the latest"}


def test_an_explanation_survives_the_wire() -> None:
    sums = Sums({"its turn": 0.5, "rows": 2.25}, 2.0, 3, 1, 4, 5, 6, 7, 8, 9)
    told = Explanation("r", "running", 3.5, sums, (Moment(0.25, 7, "Added", "arrived"),), 11)
    message = pb.Explanation.FromString(wire.encode_explanation(told).SerializeToString())
    assert wire.decode_explanation(message) == told
    assert {name for name in Sums.__slots__ if name != "waited_s"} <= set(pb.Explanation.DESCRIPTOR.fields_by_name)


# -- what is said to who gives it the wrong thing


def test_replay_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("hello")
    file = tmp_path / "run"

    async def scenario() -> None:
        async with serving(file) as (_, client):
            await asyncio.to_thread(lambda: list(client.generate([1, 2], request_id="r", max_tokens=3)))

    asyncio.run(scenario())
    for arguments, sentence in (
        ([str(text)], f"{text} is no recording: give a file that `quire serve --record` has written"),
        ([f"{text}s"], f"{text}s cannot be read: No such file or directory"),
        ([str(file), "--set", "watermark"], "--set takes NAME=VALUE, such as watermark=0.05, not 'watermark'"),
        ([str(file), "--set", "water=1"], "there is no setting 'water': give one of num_blocks, block_size,"),
        ([str(file), "--set", "watermark=7"], "watermark must be in [0, 1), not 7.0"),
        ([str(file), "--explain", "q"], "the recording has no request 'q'"),
    ):
        assert cli.run(["replay", *arguments]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"quire: {sentence}") and err.count("\n") == 1


def test_a_decision_that_is_no_longer_taken_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run"

    async def scenario() -> None:
        async with serving(file) as (executor, client):
            await asyncio.to_thread(_crowd, executor, client)

    asyncio.run(scenario())
    monkeypatch.setattr(
        "quire.scheduler.recording.replay.changed", lambda config, _: replace(config, max_num_batched_tokens=8)
    )
    for arguments in ([], ["--set", "watermark=0.5"], ["--explain", "r1"]):
        assert cli.run(["replay", str(file), *arguments]) == 1
        out = capsys.readouterr().out
        assert "first difference in step 1" in out


def test_replaying_needs_neither_torch_nor_ray_nor_grpc(tmp_path: Path) -> None:
    code = (
        "import sys; from quire.cluster import cli; code = cli.run(['replay', 'nothing']);"
        "assert not {'ray', 'torch', 'transformers', 'numpy', 'grpc', 'google.protobuf'} & set(sys.modules);"
        " sys.exit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "quire: nothing cannot be read: No such file or directory\n")


def test_a_file_that_cannot_be_written_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"--record .*/none/run cannot be written: No such file or directory"):
        _check_record(str(tmp_path / "none" / "run"))
    _check_record(str(tmp_path / "run"))

    async def attach() -> None:
        config = ControllerConfig(LIMITS, ModelLimits(VOCAB, 64), step_timeout=5, record=str(tmp_path / "none" / "run"))
        Controller(config, pb.ModelInfo()).attach(Executor())

    with pytest.raises(ValueError, match="cannot be written: No such file or directory"):
        asyncio.run(attach())


# -- a server of real processes


def test_a_recorded_server_replays_without_a_difference(start_own_replica: Any, tmp_path: Path) -> None:
    file = tmp_path / "run"
    modes: tuple[dict[str, Any], ...] = (
        {}, {"temperature": 0}, {"n": 4}, {"beam_width": 3}, {"n": 1, "best_of": 3}, {"stop": ["e"]}, {"logprobs": 2},
    )  # fmt: skip
    with ThreadPoolExecutor(16) as threads:
        replica, client = start_own_replica(
            record=str(file), num_gpu_blocks_override=24, max_model_len=256, max_num_seqs=16
        )

        def ask(number: int) -> int:
            prompt = "Once upon a time there was a little dog. " * (number % 3 + 1)
            mode = modes[number % len(modes)]
            call = client.generate(prompt, max_tokens=40, request_id=f"r{number}", seed=number, **mode)
            if number % 10 == 9:
                next(call)
                call.close()
                return 0
            return sum(len(message.output.token_ids) for message in call)

        assert sum(threads.map(ask, range(42))) > 1000
        assert client.explain("r2").num_chunks > 0
        preemptions = client.load().num_preemptions
        replica.stop()
    followed = replay(file)
    assert followed.difference is None and followed.num_plans > 50
    assert followed.scheduler.counters.num_preemptions == preemptions > 0
    assert not followed.scheduler.has_work
