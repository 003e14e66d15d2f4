"""The worker's gRPC service over real sockets: order, epochs, take-over, refusals."""

from __future__ import annotations

import gc
import logging
import os
import queue
import subprocess
import sys
import threading
import time

import grpc
import pytest
import torch
import worker_process
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hash_model import HashDecoder, expected_tokens, load_hash_decoder
from transformers import LlamaConfig
from worker_plans import admit, plan, unpacked

from quire.protos import worker_pb2, worker_pb2_grpc
from quire.protos.channel import WORKER_CHANNEL_OPTIONS, bearer
from quire.worker.config import WorkerConfig
from quire.worker.service import WorkerServer
from quire.worker.transfer import DirectTransfer

CONFIG = WorkerConfig(
    model="hash", block_size=4, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64, num_threads=1
)
PROMPT = [1, 2, 3]
Code = grpc.StatusCode


class Decoder(HashDecoder):
    """Can be told to fail, or to wait in the middle of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False
        self.entered, self.may_go = threading.Event(), threading.Event()
        self.may_go.set()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.may_go.wait(20)
        if self.fails:
            raise RuntimeError("the device is gone")
        return super().logits(hidden)


class Worker:
    """A served worker and a client of it."""

    def __init__(self, token: str | None = None) -> None:
        self.decoder = Decoder()
        self.server = WorkerServer(CONFIG, token, loader=lambda *_: self.decoder)
        self.server.load()
        self.server.allocate(40)
        self.address = self.server.serve()
        self.channel = grpc.insecure_channel(self.address, WORKER_CHANNEL_OPTIONS)
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)
        self.incarnation = self.server.describe().incarnation
        self.decoder.entered.clear()

    def open(self, token: str | None = None) -> Stream:
        return Stream(self.stub, self.incarnation, token)

    def close(self) -> None:
        self.decoder.may_go.set()
        self.channel.close()
        self.server.stop(grace=0)


class Stream:
    """One Run call."""

    def __init__(self, stub: worker_pb2_grpc.WorkerStub, incarnation: int, token: str | None) -> None:
        self.incarnation = incarnation
        self.plans: queue.SimpleQueue[worker_pb2.StepPlan | None] = queue.SimpleQueue()
        self.reports = stub.Run(iter(self.plans.get, None), metadata=bearer(token), timeout=30)

    def send(self, epoch: int, step: int, **content) -> None:
        position = dict(incarnation=self.incarnation) | dict(epoch=epoch, step=step)
        incarnation = content.pop("incarnation", None)
        if incarnation is not None:
            position["incarnation"] = incarnation
        self.plans.put(plan(**content, **position))

    def tokens(self) -> list[int]:
        return unpacked(next(self.reports).token_ids)

    def start(self, epoch: int) -> list[int]:
        """The first step of an epoch."""
        self.send(epoch, 1, rows=[0], num_tokens=[3], admits=[admit(0, PROMPT, [0, 1, 2])])
        return self.tokens()

    def refused(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as error:
            next(self.reports)
        self.plans.put(None)
        return error.value.code(), error.value.details()

    def end(self) -> None:
        self.plans.put(None)
        assert list(self.reports) == []


@pytest.fixture(autouse=True)
def threads():
    """A worker sets the threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def test_plans_sent_ahead_are_answered_in_order(worker):
    stream = worker.open()
    stream.send(5, 1, rows=[0], num_tokens=[3], admits=[admit(0, PROMPT, [0, 1, 2])])
    for step in range(2, 8):
        stream.send(5, step, rows=[0])
    reports = [next(stream.reports) for _ in range(7)]
    assert [(r.epoch, r.step, r.incarnation) for r in reports] == [(5, s, worker.incarnation) for s in range(1, 8)]
    assert [unpacked(r.token_ids)[0] for r in reports] == expected_tokens(PROMPT, 7)
    description = worker.stub.Describe(worker_pb2.DescribeRequest())
    assert (description.epoch, description.step, description.num_blocks) == (5, 7, 40)
    stream.end()


def test_an_older_epoch_is_refused(worker):
    stream = worker.open()
    stream.start(epoch=5)
    stream.send(4, 2, rows=[0])
    assert stream.refused() == (Code.FAILED_PRECONDITION, "the plan is of epoch 4; this worker has seen epoch 5")
    # Nothing else drives now, and still.
    late = worker.open()
    late.send(3, 1)
    assert late.refused()[0] is Code.FAILED_PRECONDITION


def test_another_incarnation_is_refused_and_disturbs_nobody(worker):
    stream = worker.open()
    first = stream.start(epoch=5)
    lost = worker.open()
    lost.send(6, 1, incarnation=worker.incarnation ^ 1)
    code, message = lost.refused()
    assert code is Code.FAILED_PRECONDITION
    assert str(worker.incarnation) in message and str(worker.incarnation ^ 1) in message
    stream.send(5, 2, rows=[0])
    assert first + stream.tokens() == expected_tokens(PROMPT, 2)
    stream.end()


@pytest.mark.parametrize("step", [1, 3])
def test_a_gap_or_a_repetition_is_refused(worker, step):
    stream = worker.open()
    stream.start(epoch=5)
    stream.send(5, step, rows=[0])
    assert stream.refused() == (
        Code.FAILED_PRECONDITION,
        f"the plan is step {step} of epoch 5; the next one is step 2",
    )


def test_an_epoch_starts_with_step_one_or_takes_nothing_over(worker):
    stream = worker.open()
    first = stream.start(epoch=5)
    other = worker.open()
    other.send(6, 2)
    assert other.refused() == (Code.FAILED_PRECONDITION, "epoch 6 starts with step 2; its first step is 1")
    stream.send(5, 2, rows=[0])
    assert first + stream.tokens() == expected_tokens(PROMPT, 2)
    stream.end()


def test_a_newer_epoch_takes_over_with_empty_rows(worker):
    old, new = worker.open(), worker.open()
    old.start(epoch=5)
    # Row 0 was occupied; the blocks are handed out anew.
    assert new.start(epoch=6) == expected_tokens(PROMPT, 1)
    assert old.refused()[0] is Code.CANCELLED
    new.send(6, 2, rows=[0])
    assert new.tokens() == expected_tokens(PROMPT, 2)[1:]
    assert worker.stub.Describe(worker_pb2.DescribeRequest()).epoch == 6
    new.end()


def test_a_newer_epoch_takes_over_in_the_middle_of_a_step(worker):
    old, new = worker.open(), worker.open()
    worker.decoder.may_go.clear()
    old.send(5, 1, rows=[0], num_tokens=[3], admits=[admit(0, PROMPT, [0, 1, 2])])
    assert worker.decoder.entered.wait(20)
    old.send(5, 2, rows=[0])
    new.send(6, 1, rows=[0], num_tokens=[3], admits=[admit(0, PROMPT, [3])])
    assert old.refused()[0] is Code.CANCELLED
    worker.decoder.may_go.set()
    assert new.tokens() == expected_tokens(PROMPT, 1)
    new.send(6, 2, rows=[0])
    assert new.tokens() == expected_tokens(PROMPT, 2)[1:]
    new.end()


@pytest.mark.parametrize("epoch", [4, 5])
def test_a_second_stream_of_no_newer_epoch_is_refused(worker, epoch):
    stream, second = worker.open(), worker.open()
    first = stream.start(epoch=5)
    second.send(epoch, 1)
    assert second.refused() == (
        Code.ALREADY_EXISTS,
        f"the plan is of epoch {epoch}, but a stream of epoch 5 is driving this worker",
    )
    stream.send(5, 2, rows=[0])
    assert first + stream.tokens() == expected_tokens(PROMPT, 2)
    stream.end()


def test_a_stream_that_ended_may_be_followed_up_in_its_epoch(worker):
    stream = worker.open()
    first = stream.start(epoch=5)
    stream.end()
    again = worker.open()
    again.send(5, 2, rows=[0])
    assert first + again.tokens() == expected_tokens(PROMPT, 2)
    again.end()


def test_an_epoch_may_change_within_a_stream(worker):
    stream = worker.open()
    stream.start(epoch=5)
    assert stream.start(epoch=7) == expected_tokens(PROMPT, 1)
    stream.end()


def test_a_plan_that_does_not_fit_is_refused_and_leaves_the_rows(worker):
    stream = worker.open()
    first = stream.start(epoch=5)
    stream.send(5, 2, rows=[3])
    assert stream.refused() == (Code.INVALID_ARGUMENT, "rank 0, step 2: row 3 is computed but empty")
    again = worker.open()
    again.send(5, 2, rows=[0])
    assert first + again.tokens() == expected_tokens(PROMPT, 2)
    again.end()


def test_a_step_that_fails_ends_its_epoch(worker, caplog):
    stream = worker.open()
    stream.start(epoch=5)
    worker.decoder.fails = True
    stream.send(5, 2, rows=[0])
    with caplog.at_level(logging.ERROR):
        code, message = stream.refused()
    assert (code, message) == (Code.INTERNAL, "rank 0: step 2 failed: RuntimeError: the device is gone")
    assert "Traceback" in caplog.text and "step 2 of epoch 5 failed" in caplog.text
    worker.decoder.fails = False
    again = worker.open()
    again.send(5, 2, rows=[0])
    assert again.refused()[0] is Code.FAILED_PRECONDITION
    assert worker.open().start(epoch=6) == expected_tokens(PROMPT, 1)


def test_a_report_says_how_long_the_worker_had_to_wait_for_the_plan(worker):
    stream = worker.open()
    stream.start(epoch=5)
    worker.decoder.may_go.clear()
    worker.decoder.entered.clear()
    time.sleep(0.2)
    stream.send(5, 2, rows=[0])
    assert worker.decoder.entered.wait(20)
    stream.send(5, 3, rows=[0])  # comes while step 2 runs
    time.sleep(0.2)
    worker.decoder.may_go.set()
    late, early = next(stream.reports), next(stream.reports)
    assert late.starved_us >= 200_000 and early.starved_us == 0
    stream.end()


class Slow:
    """Steps whose results come when they are let, or fail to: what a GPU does after a launch."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.runner = worker.server._runner
        self.launched = queue.SimpleQueue()
        self.may_arrive = threading.Semaphore(0)
        self.failing_step = 0
        launch = self.runner.launch

        def launched_only(plan):
            pending = launch(plan)
            self.launched.put(plan.step)
            finish = pending._finish

            def finish_late(launched):
                assert self.may_arrive.acquire(timeout=20)
                if plan.step == self.failing_step:
                    raise RuntimeError("an illegal address")
                finish(launched)

            pending._finish = finish_late
            return pending

        self.runner.launch = launched_only

    def launches(self, count: int) -> list[int]:
        return [self.launched.get(timeout=20) for _ in range(count)]


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(DirectTransfer, "num_lines", 8)
    slow = Slow(Worker())
    yield slow
    for _ in range(9):
        slow.may_arrive.release()
    slow.worker.close()


def test_steps_are_launched_before_earlier_ones_are_over(slow):
    stream = slow.worker.open()
    stream.send(5, 1, rows=[0], num_tokens=[3], admits=[admit(0, PROMPT, [0, 1, 2])])
    for step in (2, 3, 4):
        stream.send(5, step, rows=[0])
    assert slow.launches(4) == [1, 2, 3, 4]
    assert slow.worker.stub.Describe(worker_pb2.DescribeRequest(), timeout=10).step == 0
    for token in expected_tokens(PROMPT, 4):
        slow.may_arrive.release()
        assert stream.tokens() == [token]
    assert slow.worker.stub.Describe(worker_pb2.DescribeRequest(), timeout=10).step == 4
    stream.end()


def test_a_step_that_fails_on_the_device_ends_its_epoch(slow, caplog):
    slow.failing_step = 2
    stream = slow.worker.open()
    stream.send(5, 1, rows=[0], num_tokens=[3], admits=[admit(0, PROMPT, [0, 1, 2])])
    for step in (2, 3):
        stream.send(5, step, rows=[0])
    assert slow.launches(3) == [1, 2, 3]
    for _ in range(3):
        slow.may_arrive.release()
    assert stream.tokens() == expected_tokens(PROMPT, 1)
    assert stream.refused() == (Code.INTERNAL, "rank 0: step 2 failed: RuntimeError: an illegal address")
    assert "step 2 of epoch 5 failed" in caplog.text
    again = slow.worker.open()
    again.send(5, 4, rows=[0])
    assert again.refused()[0] is Code.FAILED_PRECONDITION
    slow.failing_step = 0
    assert slow.worker.open().start(epoch=6) == expected_tokens(PROMPT, 1)


def test_a_refused_plan_is_reported_after_the_steps_before_it(slow):
    stream = slow.worker.open()
    stream.send(5, 1, rows=[0], num_tokens=[3], admits=[admit(0, PROMPT, [0, 1, 2])])
    stream.send(5, 2, rows=[3])
    stream.send(5, 3, rows=[0])  # nobody looks at it
    assert slow.launches(1) == [1]
    slow.may_arrive.release()
    assert stream.tokens() == expected_tokens(PROMPT, 1)
    assert stream.refused() == (Code.INVALID_ARGUMENT, "rank 0, step 2: row 3 is computed but empty")
    again = slow.worker.open()
    again.send(5, 2, rows=[0])
    slow.may_arrive.release()
    assert again.tokens() == expected_tokens(PROMPT, 2)[1:]
    again.end()


def test_a_newer_epoch_does_not_wait_for_results_that_nobody_takes(slow):
    old, new = slow.worker.open(), slow.worker.open()
    old.send(5, 1, rows=[0], num_tokens=[3], admits=[admit(0, PROMPT, [0, 1, 2])])
    old.send(5, 2, rows=[0])
    assert slow.launches(2) == [1, 2]
    new.send(6, 1, rows=[0], num_tokens=[3], admits=[admit(0, PROMPT, [3])])
    assert slow.launches(1) == [1]
    assert old.refused()[0] is Code.CANCELLED
    for _ in range(3):
        slow.may_arrive.release()
    assert new.tokens() == expected_tokens(PROMPT, 1)
    new.end()


def test_a_worker_s_collector_rests_while_it_serves_and_collects_in_between(monkeypatch):
    monkeypatch.setattr("quire.worker.loop.IDLE_S", 0.01)
    assert gc.isenabled()
    worker = Worker()
    try:
        assert not gc.isenabled() and gc.get_freeze_count() > 1000
        collected = threading.Event()
        gc.callbacks.append(lambda phase, _: collected.set() if phase == "start" else None)
        stream = worker.open()
        stream.start(epoch=5)
        assert collected.wait(20)  # after the step, with nothing to do
        stream.end()
    finally:
        gc.callbacks.pop()
        worker.close()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_describe_answers_while_a_step_runs(worker):
    worker.decoder.may_go.clear()
    stream = worker.open()
    stream.send(5, 1, rows=[0], num_tokens=[3], admits=[admit(0, PROMPT, [0, 1, 2])])
    assert worker.decoder.entered.wait(20)
    description = worker.stub.Describe(worker_pb2.DescribeRequest(), timeout=10)
    assert (description.epoch, description.step) == (5, 0)
    worker.decoder.may_go.set()
    assert stream.tokens() == expected_tokens(PROMPT, 1)
    stream.end()


def test_health_and_reflection(worker):
    health = health_pb2_grpc.HealthStub(worker.channel)
    for service in ("", "quire.v1.Worker"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    answer = next(reflection_pb2_grpc.ServerReflectionStub(worker.channel).ServerReflectionInfo(requests))
    assert "quire.v1.Worker" in [service.name for service in answer.list_services_response.service]


def test_calls_without_the_token_are_refused():
    worker = Worker(token="geheim")
    try:
        for token in (None, "Geheim", "geheim2", "gehei"):
            stream = worker.open(token)
            stream.send(5, 1)
            assert stream.refused()[0] is Code.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as error:
                worker.stub.Describe(worker_pb2.DescribeRequest(), metadata=bearer(token))
            assert error.value.code() is Code.UNAUTHENTICATED
            assert "geheim" not in error.value.details()
        assert worker.stub.Describe(worker_pb2.DescribeRequest(), metadata=bearer("geheim")).num_blocks == 40
        stream = worker.open("geheim")
        assert stream.start(epoch=1) == expected_tokens(PROMPT, 1)
        stream.end()
    finally:
        worker.close()


def test_a_prompt_larger_than_the_usual_message_limit_passes(worker):
    stream = worker.open()
    stream.send(5, 1, admits=[admit(0, [1] * 2_000_000, [0])])
    code, message = stream.refused()
    assert code is Code.INVALID_ARGUMENT and "2000000 tokens; 1 to 64 fit" in message


def test_a_second_server_on_the_same_port_fails(worker):
    other = WorkerServer(CONFIG, loader=load_hash_decoder)
    other.load()
    other.allocate(20)
    with pytest.raises(RuntimeError, match="bind"):
        other.serve(port=int(worker.address.rsplit(":", 1)[1]))
    other.stop()


def test_stopping_ends_open_streams():
    worker = Worker()
    stream = worker.open()
    stream.start(epoch=5)
    worker.server.stop(grace=0.1)
    assert stream.refused()[0] in (Code.CANCELLED, Code.UNAVAILABLE)
    worker.close()


def start_ranks(folder, size: int, rendezvous) -> list[subprocess.Popen]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return [
        subprocess.Popen(
            [sys.executable, worker_process.__file__, str(folder), str(rank), str(size), str(rendezvous)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def generate(addresses: list[str], prompts: list[list[int]], n: int) -> list[list[int]]:
    """The same plans to every rank; tokens of the first, by step."""
    channels = [grpc.insecure_channel(address, WORKER_CHANNEL_OPTIONS) for address in addresses]
    stubs = [worker_pb2_grpc.WorkerStub(channel) for channel in channels]
    told = [stub.Describe(worker_pb2.DescribeRequest()) for stub in stubs]
    assert [d.rank for d in told] == list(range(len(addresses))) and {d.num_blocks for d in told} == {40}
    streams = [Stream(stub, d.incarnation, None) for stub, d in zip(stubs, told, strict=True)]
    rows = list(range(len(prompts)))
    admits = [
        admit(row, prompt, range(10 * row, 10 * row + 10), temperature=row % 2, top_p=0.9, seed=row)
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    for stream in streams:
        stream.send(1, 1, rows=rows, num_tokens=[len(prompt) for prompt in prompts], admits=admits)
        for step in range(2, n + 1):
            stream.send(1, step, rows=rows)
    reports = [[next(stream.reports) for _ in range(n)] for stream in streams]
    assert all(report.token_ids == b"" for rank in reports[1:] for report in rank)
    for stream in streams:
        stream.end()
    for channel in channels:
        channel.close()
    return [unpacked(report.token_ids) for report in reports[0]]


def test_two_ranks_give_the_tokens_of_one(make_model, tmp_path):
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    folder, _ = make_model(config)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
    groups = [start_ranks(folder, size, tmp_path / f"meet-{size}") for size in (1, 2)]
    try:
        outputs = [generate([process.stdout.readline().strip() for process in group], prompts, 12) for group in groups]
        assert outputs[0] == outputs[1]
        assert len({token for step in outputs[0] for token in step}) > 10
        for process in [*groups[0], *groups[1]]:
            process.communicate(timeout=30)
            assert process.returncode == 0
    finally:
        for process in [*groups[0], *groups[1]]:
            process.kill()
            process.communicate()
