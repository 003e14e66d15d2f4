"""The controller over real gRPC, with workers that are told how long a step takes."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from fake_worker import VOCAB, expected_logprob, expected_output
from grpc_health.v1 import health_pb2, health_pb2_grpc
from schedulers import make_request
from stepped_executor import LIMITS, SteppedExecutor

from quire.cluster import errors
from quire.cluster.controller import Controller, ControllerConfig
from quire.cluster.engine_thread import EngineThread
from quire.cluster.executor import WorkerAddress, WorkerLost
from quire.cluster.servers import GenerationServer
from quire.cluster.streams import Stream
from quire.protos import generation_pb2 as pb
from quire.protos import generation_pb2_grpc as pb_grpc
from quire.protos.channel import WORKER_CHANNEL_OPTIONS, WORKER_SERVER_OPTIONS, bearer
from quire.scheduler.engine import Engine
from quire.scheduler.plan import Answer, StepEvents
from quire.scheduler.request import ModelLimits
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import FinishReason

TOKEN = "secret"


@asynccontextmanager
async def serving(run_ahead: int = 1) -> AsyncIterator[tuple[Controller, SteppedExecutor, Any]]:
    executor = SteppedExecutor()
    config = ControllerConfig(LIMITS, ModelLimits(VOCAB, LIMITS.max_model_len), step_timeout=5, run_ahead=run_ahead)
    controller = Controller(config, pb.ModelInfo(model="m"))
    controller.attach(executor)
    server = GenerationServer(
        lambda s: pb_grpc.add_GenerationServicer_to_server(controller, s), WORKER_SERVER_OPTIONS, TOKEN
    )
    port = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=WORKER_CHANNEL_OPTIONS) as channel:
        yield controller, executor, pb_grpc.GenerationStub(channel)
    executor.run_freely()
    await server.stop(0)
    await controller.close()


def request(prompt: list[int], name: str = "", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=name, token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(**{"seed": 3, **sampling})
    )


def generate(stub: Any, *arguments: Any, timeout: float | None = None, **sampling: Any) -> Any:
    return stub.Generate(request(*arguments, **sampling), timeout=timeout, metadata=bearer(TOKEN))


async def read_all(call: Any) -> list[int]:
    return [token async for message in call for token in message.output.token_ids]


async def load_of(stub: Any) -> pb.Load:
    return await stub.GetLoad(pb.GetLoadRequest(), metadata=bearer(TOKEN))


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.005)


def test_streams_bring_exactly_the_tokens_that_the_prompts_call_for():
    async def scenario() -> None:
        async with serving() as (controller, executor, stub):
            executor.run_freely()
            calls = [generate(stub, [i, i + 1, 2], max_tokens=20) for i in range(20)]
            answers = await asyncio.gather(*(read_all(call) for call in calls))
            assert answers == [expected_output([i, i + 1, 2], 3, 20) for i in range(20)]
            await controller.audit()
            load = await load_of(stub)
            assert load.blocks_free + load.blocks_cached == load.blocks_total == 64 and not load.open_requests

    asyncio.run(scenario())


def test_a_step_is_handed_over_in_one_call_and_the_collector_waits_for_idle_moments():
    async def scenario() -> None:
        async with serving() as (controller, executor, stub):
            handed_over, post = [], controller._post
            controller._post = lambda *call: (handed_over.append(call[1:]), post(*call))
            calls = [generate(stub, [i], max_tokens=20) for i in range(20)]
            readers = [asyncio.ensure_future(read_all(call)) for call in calls]
            await until(lambda: open_streams_are(controller, 20))
            assert not gc.isenabled()
            knot = weakref.ref(Knot())
            executor.run_freely()
            assert sum(map(len, await asyncio.gather(*readers))) == 20 * 20
            load = await load_of(stub)
            assert len(handed_over) <= load.num_steps < 60
            assert sum(len(events) for (events,) in handed_over) == 20 * 20
            await until(lambda: is_gone(knot))
        assert gc.isenabled()

    asyncio.run(scenario())


class Knot:
    """Garbage that only the collector can find."""

    def __init__(self) -> None:
        self.me = self


async def is_gone(reference: weakref.ref[Any]) -> bool:
    return reference() is None


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_blocks_are_free_at_most_two_steps_after_a_stream_ends(how, run_ahead):
    """Half of 64 streams end while a step is under way; two steps later their blocks are back."""

    async def scenario() -> None:
        async with serving(run_ahead) as (controller, executor, stub):
            calls = []
            for i in range(64):
                timeout = 0.5 if how == "deadline" and i % 2 else None
                calls.append(generate(stub, [i % VOCAB], max_tokens=60, timeout=timeout))
            readers = [asyncio.ensure_future(read_all(call)) for call in calls]
            await until(lambda: open_streams_are(controller, 64))
            for call in calls[1::2] if how == "cancelled" else []:
                call.cancel()
            await until(lambda: open_streams_are(controller, 32))
            asking = asyncio.ensure_future(load_of(stub))  # answered between two steps
            load = await within_steps(2, executor, asking)
            assert load.num_running + load.num_waiting == 32 and load.num_cancelled == 32
            assert load.blocks_used <= 32
            executor.run_freely()
            ended = await asyncio.gather(*readers, return_exceptions=True)
            assert [len(tokens) for tokens in ended[::2]] == [60] * 32
            code = grpc.StatusCode.DEADLINE_EXCEEDED if how == "deadline" else grpc.StatusCode.CANCELLED
            assert all(_code(error) is code for error in ended[1::2])
            await controller.audit()

    asyncio.run(scenario())


async def open_streams_are(controller: Controller, count: int) -> bool:
    return controller.num_open == count


async def within_steps(limit: int, executor: SteppedExecutor, asking: asyncio.Future[pb.Load]) -> pb.Load:
    """The answer, letting at most `limit` steps end."""
    for _ in range(limit):
        await asyncio.wait([asking], timeout=0.5)
        executor.permits.release()
    return await asyncio.wait_for(asking, 5)


def _code(error: Any) -> grpc.StatusCode:
    return grpc.StatusCode.CANCELLED if isinstance(error, asyncio.CancelledError) else error.code()


def test_a_lost_worker_ends_every_stream_and_is_named_to_newcomers():
    async def scenario() -> None:
        async with serving() as (controller, executor, stub):
            calls = [generate(stub, [i], max_tokens=50) for i in range(8)]
            readers = [asyncio.ensure_future(read_all(call)) for call in calls]
            await until(lambda: open_streams_are(controller, 8))
            executor.failure = WorkerLost(WorkerAddress(1, "t", 5, "node-a", 77), "is gone: Socket closed")
            executor.run_freely()
            for error in await asyncio.gather(*readers, return_exceptions=True):
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert "worker rank 1 (process 77 on node-a) is gone" in error.details()
            with pytest.raises(grpc.aio.AioRpcError, match="worker rank 1"):
                await read_all(generate(stub, [1]))
            assert "worker rank 1" in await controller.failure()
            assert (await load_of(stub)).blocks_used == 0  # streams gone, blocks back: questions are still answered

    asyncio.run(scenario())


def test_a_full_queue_is_said_with_when_to_come_back():
    async def scenario() -> None:
        async with serving() as (controller, executor, stub):
            neighbour = asyncio.ensure_future(read_all(generate(stub, [1], n=100, max_tokens=50)))
            await until(lambda: open_streams_are(controller, 1))
            second = asyncio.ensure_future(read_all(generate(stub, [1], n=50)))
            await until(lambda: open_streams_are(controller, 2))
            executor.run_freely()
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await second
            error = errors.from_rpc_error(refusal.value)
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert error.retry_after_s == 1 and "the limit is 80" in error.message
            assert len(await neighbour) == 100 * 50

    asyncio.run(scenario())


def test_an_id_may_be_used_again_at_once_and_brings_only_its_own_tokens():
    """The first request's last token comes back when its id belongs to somebody else already."""

    async def scenario() -> None:
        async with serving(run_ahead=0) as (controller, executor, stub):
            first = generate(stub, [1], "same", max_tokens=2)
            executor.permits.release()
            while not (await first.read()).output.token_ids:
                pass
            first.cancel()
            await until(lambda: open_streams_are(controller, 0))
            second = asyncio.ensure_future(read_all(generate(stub, [7], "same", max_tokens=30)))
            await until(lambda: open_streams_are(controller, 1))
            executor.run_freely()
            assert await second == expected_output([7], 3, 30)
            await controller.audit()
            assert (await load_of(stub)).blocks_used == 0

    asyncio.run(scenario())


def test_one_sample_can_be_ended_while_its_siblings_go_on():
    async def scenario() -> None:
        async with serving() as (controller, executor, stub):
            call = generate(stub, [1, 2], "three", n=3, max_tokens=40)
            reader = asyncio.ensure_future(read_samples(call))
            await until(lambda: open_streams_are(controller, 1))
            abort = asyncio.ensure_future(
                stub.Abort(pb.AbortRequest(request_id="three", index=1), metadata=bearer(TOKEN))
            )
            await asyncio.sleep(0.1)
            executor.run_freely()
            await abort
            tokens, ends = await reader
            assert ends == {0: 40, 2: 40} and len(tokens[0]) == len(tokens[2]) == 40
            await controller.audit()
            assert (await load_of(stub)).blocks_used == 0

    asyncio.run(scenario())


def best_of(prompt: list[int], n: int, count: int, length: int) -> list[list[int]]:
    """The n best of so many samples, by their mean log-probability."""
    of_sample = make_request("", prompt, seed=3).sample_seed
    sampled = [expected_output(prompt, of_sample(index), length) for index in range(count)]

    def mean(tokens: list[int]) -> float:
        return sum(expected_logprob([*prompt, *tokens[:i]], token) for i, token in enumerate(tokens)) / len(tokens)

    return sorted(sampled, key=mean, reverse=True)[:n]


def test_ranked_answers_come_when_the_last_candidate_has_ended():
    async def scenario() -> None:
        async with serving() as (controller, executor, stub):
            call = generate(stub, [1, 2], "ranked", n=2, best_of=4, max_tokens=9)
            reader = asyncio.ensure_future(read_ranked(call))
            await until(lambda: open_streams_are(controller, 1))
            with pytest.raises(grpc.aio.AioRpcError, match="ranked when all have ended") as refusal:
                await stub.Abort(pb.AbortRequest(request_id="ranked", index=1), metadata=bearer(TOKEN))
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            executor.run_freely()
            answers = await reader
            assert [tokens for tokens, _ in answers] == best_of([1, 2], 2, 4, 9)
            for _, end in answers:
                assert end.score == pytest.approx(end.cumulative_logprob / 9)
            assert answers[0][1].score >= answers[1][1].score
            await controller.audit()
            assert (await load_of(stub)).blocks_used == 0

    asyncio.run(scenario())


def test_answers_of_a_request_that_is_gone_are_not_its_successors():
    config = ControllerConfig(LIMITS, ModelLimits(VOCAB, LIMITS.max_model_len), step_timeout=5)
    controller = Controller(config, pb.ModelInfo(model="m"))
    gone, open_now = (make_request("same", [1], beam_width=2) for _ in range(2))
    stream = controller._streams["same"] = Stream(open_now)
    for request, is_unfinished in ((gone, True), (open_now, False)):
        answer = Answer(request, 0, (5,), (), -1.0, -1.0, FinishReason.LENGTH)
        controller._dispatch(StepEvents(answers=(answer,)))
        assert stream.is_unfinished is is_unfinished


@pytest.mark.parametrize("sampling", [{"n": 2, "best_of": 4}, {"n": 2, "beam_width": 3}])
def test_ranked_requests_that_are_left_free_their_blocks(sampling):
    async def scenario() -> None:
        async with serving() as (controller, executor, stub):
            calls = [generate(stub, [i], str(i), max_tokens=30, **sampling) for i in range(3)]
            readers = [asyncio.ensure_future(read_ranked(call)) for call in calls]
            await until(lambda: open_streams_are(controller, 3))
            executor.permits.release(3)
            calls[0].cancel()
            await until(lambda: open_streams_are(controller, 2))
            abort = asyncio.ensure_future(stub.Abort(pb.AbortRequest(request_id="1"), metadata=bearer(TOKEN)))
            await asyncio.sleep(0.05)
            executor.run_freely()
            await abort
            ended = await asyncio.gather(*readers, return_exceptions=True)
            assert [_code(error) for error in ended[:2]] == [grpc.StatusCode.CANCELLED] * 2
            assert [len(tokens) for tokens, _ in ended[2]] == [30, 30]
            await controller.audit()
            assert (await load_of(stub)).blocks_used == 0

    asyncio.run(scenario())


async def read_ranked(call: Any) -> list[tuple[list[int], pb.Finished]]:
    """The answers, which come one after the other, best first."""
    answers: list[tuple[list[int], pb.Finished]] = []
    tokens: list[int] = []
    async for message in call:
        if message.HasField("output"):
            assert message.output.index == len(answers) and message.output.seq == len(tokens)
            tokens.extend(message.output.token_ids)
        elif message.HasField("finished"):
            assert message.finished.index == len(answers) and message.finished.seq == len(tokens)
            answers.append((tokens, message.finished))
            tokens = []
    return answers


def test_a_reserved_prefix_is_computed_once_and_found_by_those_of_its_salt():
    async def scenario() -> None:
        async with serving() as (controller, executor, stub):
            executor.run_freely()
            prefix, secret = list(range(1, 11)), bearer(TOKEN)

            async def reserve(name: str, ids: list[int], salt: str = "") -> pb.ReservedPrefix:
                request = pb.ReservePrefixRequest(name=name, token_ids=pb.TokenIds(ids=ids), cache_salt=salt)
                return await stub.ReservePrefix(request, metadata=secret)

            async def listed() -> list[pb.ReservedPrefix]:
                return list((await stub.ListPrefixes(pb.ListPrefixesRequest(), metadata=secret)).prefixes)

            async def is_ready() -> bool:
                return all(kept.is_ready for kept in await listed())

            assert (await reserve("p", prefix, "tenant")).num_tokens == 10
            await until(is_ready)
            before = await load_of(stub)
            assert before.blocks_reserved_prefix == before.blocks_used == 3
            for salt, found in (("tenant", 10), ("", 0)):
                message = request([*prefix, 11, 12], max_tokens=4)
                message.cache_salt = salt
                hits = (await load_of(stub)).prefix_hit_tokens
                assert await read_all(stub.Generate(message, metadata=secret)) == expected_output(
                    [*prefix, 11, 12], 3, 4
                )
                assert (await load_of(stub)).prefix_hit_tokens - hits == found
            assert [kept.num_hits for kept in await listed()] == [1]
            for name, ids, words in (
                ("p", prefix, "already"),
                ("q", [], "empty"),
                ("q", [VOCAB], "vocabulary"),
                ("q", [1] * 64, "63 fit"),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match=words) as refusal:
                    await reserve(name, ids)
                assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            await stub.ReleasePrefix(pb.ReleasePrefixRequest(name="p"), metadata=secret)
            assert await listed() == [] and (await load_of(stub)).blocks_used == 0
            with pytest.raises(grpc.aio.AioRpcError, match="no prefix 'p'") as refusal:
                await stub.ReleasePrefix(pb.ReleasePrefixRequest(name="p"), metadata=secret)
            assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
            await controller.audit()

    asyncio.run(scenario())


async def read_samples(call: Any) -> tuple[dict[int, list[int]], dict[int, int]]:
    tokens: dict[int, list[int]] = {}
    ends: dict[int, int] = {}
    async for message in call:
        if message.HasField("output"):
            tokens.setdefault(message.output.index, []).extend(message.output.token_ids)
        elif message.HasField("finished"):
            ends[message.finished.index] = message.finished.seq
    return tokens, ends


def test_strangers_may_not_drive_the_controller():
    async def scenario() -> None:
        async with serving() as (_, _, stub):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await read_all(stub.Generate(request([1]), metadata=bearer("guess")))
            assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(scenario())


def test_draining_lets_open_requests_finish_and_refuses_new_ones():
    async def scenario() -> None:
        async with serving() as (controller, executor, stub):
            reader = asyncio.ensure_future(read_all(generate(stub, [1], max_tokens=30)))
            await until(lambda: open_streams_are(controller, 1))
            drained = asyncio.ensure_future(controller.drain(10))
            await asyncio.sleep(0)
            with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
                await read_all(generate(stub, [2]))
            executor.run_freely()
            assert await reader == expected_output([1], 3, 30)
            await drained

    asyncio.run(scenario())


def test_a_worker_that_never_answered_is_noticed_before_anybody_asks():
    async def scenario() -> None:
        with socket.socket() as closed:  # bound, but nobody listens
            closed.bind(("127.0.0.1", 0))
            target = f"127.0.0.1:{closed.getsockname()[1]}"
            config = ControllerConfig(LIMITS, ModelLimits(VOCAB, LIMITS.max_model_len), step_timeout=60)
            controller = Controller(config, pb.ModelInfo(model="m"))
            controller.connect([WorkerAddress(0, target, 5)], 1, TOKEN)
            assert "worker rank 0" in await asyncio.wait_for(controller.failure(), 10)
            await controller.close()

    asyncio.run(scenario())


def test_a_health_watch_does_not_keep_a_server_from_stopping():
    async def scenario() -> None:
        server = GenerationServer(lambda s: None, WORKER_SERVER_OPTIONS)
        port = await server.start("127.0.0.1:0")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

            async def idle() -> None:
                await asyncio.sleep(0.05)

            await asyncio.wait_for(server.stop(60, idle()), 5)

    asyncio.run(scenario())


def test_a_call_into_the_engine_hands_back_its_own_errors():
    async def scenario() -> None:
        engine = Engine(Scheduler(LIMITS), SteppedExecutor())
        thread = EngineThread(engine, SteppedExecutor(), lambda events: None, lambda error: None)
        thread.start()
        with pytest.raises(ZeroDivisionError):
            await thread.call(lambda scheduler: 1 // 0)
        assert await thread.call(lambda scheduler: scheduler.num_requests) == 0
        thread.stop()

    asyncio.run(scenario())
