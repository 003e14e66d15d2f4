"""The relay between gateway and controller: one stream for many requests, each as if it had a stream of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.cluster import errors, relay, wire
from quire.cluster.errors import RequestError
from quire.cluster.grpc_api import ApiSettings, GenerationService
from quire.cluster.relay import RelayedCall, RelayService, RelayStub
from quire.cluster.servers import GenerationServer
from quire.protos import generation_pb2 as pb
from quire.protos import generation_pb2_grpc as pb_grpc
from quire.protos import relay_pb2, relay_pb2_grpc
from quire.protos.channel import WORKER_CHANNEL_OPTIONS, WORKER_SERVER_OPTIONS, bearer
from quire.scheduler.params import MAX_LOGPROBS
from quire.scheduler.plan import Logprobs

CODE = grpc.StatusCode


def output(token_ids: list[int], seq: int, index: int = 0, logprobs: bool = False) -> pb.GenerateResponse:
    positions = [pb.TokenLogprobs(sampled_rank=token_id) for token_id in token_ids] if logprobs else []
    return pb.GenerateResponse(output=pb.Output(index=index, seq=seq, token_ids=token_ids, logprobs=positions))


def finished(seq: int, index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(index=index, seq=seq, reason=pb.FINISH_REASON_LENGTH))


def request(name: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(request_id=name, token_ids=pb.TokenIds(ids=[1]))


class Controller(pb_grpc.GenerationServicer):
    """Every request waits for each of its tokens until the test steps."""

    def __init__(self, tokens: int = 3) -> None:
        self.tokens = tokens
        self.step = asyncio.Condition()
        self.opened: list[str] = []
        self.ended: list[str] = []

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.opened.append(request.request_id)
        try:
            if request.request_id == "refused":
                await errors.abort(context, RequestError(CODE.RESOURCE_EXHAUSTED, "full", "n", "QUEUE_FULL", 1.5))
            if request.request_id == "broken":
                raise ZeroDivisionError("a bug")
            yield pb.GenerateResponse(started=pb.Started(request_id=request.request_id))
            for seq in range(self.tokens):
                async with self.step:
                    await self.step.wait()
                yield output([seq], seq)
            yield finished(self.tokens)
        finally:
            self.ended.append(request.request_id)

    async def advance(self) -> None:
        async with self.step:
            self.step.notify_all()
        await asyncio.sleep(0)

    async def GetLoad(self, _request: pb.GetLoadRequest, _context: Any) -> pb.Load:
        return pb.Load(num_running=7)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def relayed(controller: Controller, token: str = "secret") -> AsyncIterator[tuple[RelayStub, GenerationServer]]:
    def add(server: grpc.aio.Server) -> None:
        pb_grpc.add_GenerationServicer_to_server(controller, server)
        RelayService(controller.Generate).add_to_server(server)

    server = GenerationServer(add, WORKER_SERVER_OPTIONS, "secret")
    port = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=WORKER_CHANNEL_OPTIONS) as channel:
        stub = RelayStub(channel, bearer(token))
        yield stub, server
        stub.close()
    await server.stop(0)


def run(body: Callable[[RelayStub, Controller], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        controller = Controller()
        async with relayed(controller, **options) as (stub, _):
            await body(stub, controller)

    asyncio.run(main())


async def read(call: RelayedCall) -> list[pb.GenerateResponse]:
    return [message async for message in call]


def tokens(messages: list[pb.GenerateResponse]) -> list[int]:
    return [token_id for message in messages for token_id in message.output.token_ids]


def test_what_a_stopped_gateway_finds_waiting_fits_into_what_it_can_receive():
    """Answers that come whole, as large as a message of them may be."""
    tokens = [(1 << 31) - 1 - i for i in range(wire.MAX_TOKENS_PER_MESSAGE)]
    most = Logprobs(tuple(tokens[: MAX_LOGPROBS + 1]), (-1.5,) * (MAX_LOGPROBS + 1), 1 << 30)
    largest = wire.encode_output(127, 1 << 30, tokens, [most] * len(tokens))
    columns = [[1 << 62] * relay.MAX_COLUMN, *([[1 << 30] * relay.MAX_COLUMN] * 3)]
    widest = relay_pb2.Tokens(**dict(zip(("keys", "indexes", "seqs", "token_ids"), columns, strict=True)))
    assert widest.ByteSize() < largest.ByteSize()
    answer = relay_pb2.RelayAnswers(answers=[relay_pb2.RelayAnswer(key=1 << 62, response=largest)])
    limit = dict(WORKER_CHANNEL_OPTIONS)["grpc.max_receive_message_length"]
    assert limit / 2 < answer.ByteSize() * relay.MAX_ANSWERS < limit


def test_requests_share_a_stream_and_a_step_is_one_message(monkeypatch):
    sizes = []

    class Counting(relay._Served):
        async def take(self) -> Any:
            taken = await super().take()
            sizes.append(sum(answer.response.HasField("output") for answer in taken))
            return taken

    monkeypatch.setattr(relay, "_Served", Counting)

    async def body(stub: RelayStub, controller: Controller) -> None:
        reading = [asyncio.create_task(read(stub.Generate(request(str(i))))) for i in range(8)]
        await until(lambda: len(controller.opened) == 8)
        for _ in range(controller.tokens):
            await controller.advance()
            await asyncio.sleep(0.05)
        for number, messages in enumerate(await asyncio.gather(*reading)):
            assert messages[0].started.request_id == str(number)
            assert tokens(messages) == [0, 1, 2]
            assert messages[-1] == finished(3)
        assert [size for size in sizes if size] == [8, 8, 8]
        assert (await stub.GetLoad(pb.GetLoadRequest(), metadata=bearer("secret"))).num_running == 7

    run(body)


class Passing(Controller):
    """Tokens pass `Generate` by, two samples in turn; between them it says something itself."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: dict[str, relay.RelayContext] = {}

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(started=pb.Started(request_id=request.request_id))
        self.contexts[request.request_id] = context
        try:
            for seq in (2, 5):
                async with self.step:
                    await self.step.wait()
                yield output([100 + seq], seq)
            yield finished(6)
        finally:
            del self.contexts[request.request_id]


def test_tokens_that_pass_by_come_in_order_and_as_columns(monkeypatch):
    seen: list[relay_pb2.RelayAnswer] = []

    class Watching(relay._Served):
        async def take(self) -> Any:
            seen.extend(taken := await super().take())
            return taken

    monkeypatch.setattr(relay, "_Served", Watching)
    monkeypatch.setattr(relay, "MAX_COLUMN", 5)

    async def main() -> None:
        controller = Passing()
        async with relayed(controller) as (stub, _):
            gone = stub.Generate(request("gone"))
            reading = {name: asyncio.create_task(read(stub.Generate(request(name)))) for name in "abc"}
            await until(lambda: len(controller.contexts) == 4)
            contexts = list(controller.contexts.values())
            for first in (0, 3):
                for seq in (first, first + 1):
                    for context in contexts:
                        context.send_token(0, seq, 200 + seq)
                await controller.advance()
                await asyncio.sleep(0.05)
            for name, task in reading.items():
                messages = await task
                assert messages[0].started.request_id == name
                assert tokens(messages) == [200, 201, 102, 203, 204, 105] and messages[-1] == finished(6)
                place = 0
                for message in messages[1:-1]:
                    assert message.output.seq == place
                    place += len(message.output.token_ids)
            gone.cancel()

    asyncio.run(main())
    columns = [answer.tokens for answer in seen if answer.HasField("tokens")]
    assert [len(each.keys) for each in columns] == [5, 3, 5, 3]
    assert all(len(each.keys) == len(each.seqs) == len(each.indexes) == len(each.token_ids) for each in columns)


def test_tokens_of_one_that_was_cancelled_are_nobodys():
    async def main() -> None:
        controller = Passing()
        async with relayed(controller) as (stub, _):
            first, second = stub.Generate(request("first")), stub.Generate(request("second"))
            await until(lambda: len(controller.contexts) == 2)
            context = controller.contexts["first"]
            first.cancel()
            context.send_token(0, 0, 7)  # before the controller has heard of it
            controller.contexts["second"].send_token(1, 0, 8)
            assert (await anext(second)).started.request_id == "second"
            assert (await anext(second)).output == pb.Output(index=1, seq=0, token_ids=[8])
            second.cancel()

    asyncio.run(main())


def test_one_that_is_cancelled_ends_at_the_controller_and_the_others_go_on():
    async def body(stub: RelayStub, controller: Controller) -> None:
        first, second = stub.Generate(request("first")), stub.Generate(request("second"))
        reading = asyncio.create_task(read(second))
        assert (await anext(first)).started.request_id == "first"
        await until(lambda: len(controller.opened) == 2)
        first.cancel()
        first.cancel()
        await until(lambda: controller.ended == ["first"])
        while not reading.done():
            await controller.advance()
        assert tokens(reading.result()) == [0, 1, 2]
        second.cancel()  # it has ended: nothing happens

    run(body)


@pytest.mark.parametrize(
    ("name", "code", "words"), [("refused", CODE.RESOURCE_EXHAUSTED, "full"), ("broken", CODE.UNKNOWN, "a bug")]
)
def test_a_failure_keeps_its_status_and_is_that_requests_alone(name, code, words):
    async def body(stub: RelayStub, controller: Controller) -> None:
        other = asyncio.create_task(read(stub.Generate(request("other"))))
        with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
            await read(stub.Generate(request(name)))
        error = errors.from_rpc_error(caught.value)
        assert error.code == code
        if name == "refused":
            assert (error.message, error.field, error.reason, error.retry_after_s) == ("full", "n", "QUEUE_FULL", 1.5)
        while not other.done():
            await controller.advance()
        assert tokens(other.result()) == [0, 1, 2]

    run(body)


def test_a_gateway_that_goes_away_ends_all_of_its_requests():
    async def body(stub: RelayStub, controller: Controller) -> None:
        for i in range(3):
            await anext(stub.Generate(request(str(i))))
        stub.close()
        await until(lambda: sorted(controller.ended) == ["0", "1", "2"])

    run(body)


def test_a_controller_that_goes_away_fails_all_requests_and_a_later_one_asks_again():
    async def main() -> None:
        controller = Controller()
        async with relayed(controller) as (stub, server):
            calls = [stub.Generate(request(str(i))) for i in range(3)]
            for call in calls:
                await anext(call)
            await server.stop(0)
            for call in [*calls, stub.Generate(request("late"))]:
                with pytest.raises(RequestError, match="the controller is gone") as caught:
                    await asyncio.wait_for(read(call), 10)
                assert caught.value.code == CODE.UNAVAILABLE
            assert sorted(controller.ended) == ["0", "1", "2"]

    asyncio.run(main())


def test_the_stream_asks_for_the_replicas_secret():
    async def body(stub: RelayStub, controller: Controller) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(stub.Generate(request("a")))
        assert caught.value.code() == CODE.UNAUTHENTICATED
        assert not controller.opened

    run(body, token="another")


def test_a_stream_that_the_controller_ends_in_order_is_an_error_and_no_end():
    class Ends(relay_pb2_grpc.RelayServicer):
        async def Open(self, request_iterator: Any, context: Any) -> AsyncIterator[relay_pb2.RelayAnswers]:
            async for message in request_iterator:
                started = pb.GenerateResponse(started=pb.Started(request_id="a"))
                yield relay_pb2.RelayAnswers(
                    answers=[relay_pb2.RelayAnswer(key=message.calls[0].key, response=started)]
                )
                return

    async def main() -> None:
        server = grpc.aio.server()
        relay_pb2_grpc.add_RelayServicer_to_server(Ends(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = RelayStub(channel)
            for _ in range(2):  # the second opens a stream of its own
                call = stub.Generate(request("a"))
                assert (await anext(call)).HasField("started")
                with pytest.raises(RequestError, match="ended its stream") as caught:
                    await anext(call)
                assert caught.value.code == CODE.UNAVAILABLE
        await server.stop(None)

    asyncio.run(main())


def test_the_public_deadline_ends_the_request_at_the_controller():
    async def body(stub: RelayStub, controller: Controller) -> None:
        settings = ApiSettings(("tiny",), 100, 263, internal_token="secret")
        server = grpc.aio.server()
        GenerationService(settings, stub, None).add_to_server(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [message async for message in pb_grpc.GenerationStub(channel).Generate(request("a"), timeout=0.3)]
            assert caught.value.code() == CODE.DEADLINE_EXCEEDED
            await until(lambda: controller.ended == ["a"])
        await server.stop(None)

    run(body)


# -- a reader that is slower than the tokens


@settings(deadline=None)
@given(data=st.data(), samples=st.integers(1, 3), logprobs=st.booleans())
def test_whatever_is_put_together_the_reader_gets_every_token_once_and_in_order(data, samples, logprobs):
    async def main() -> None:
        call = RelayedCall(lambda: None)
        sent: list[int] = [0] * samples
        got: list[list[int]] = [[] for _ in range(samples)]
        done: set[int] = set()

        async def take() -> None:
            message = await anext(call)
            if message.HasField("finished"):
                assert message.finished.seq == len(got[message.finished.index])
                done.add(message.finished.index)
                return
            part = message.output
            assert part.index not in done and part.seq == len(got[part.index])
            assert 1 <= len(part.token_ids) <= wire.MAX_TOKENS_PER_MESSAGE
            assert [position.sampled_rank for position in part.logprobs] == (list(part.token_ids) if logprobs else [])
            got[part.index] += part.token_ids

        for _ in range(data.draw(st.integers(0, 30))):
            index, count = data.draw(st.integers(0, samples - 1)), data.draw(st.sampled_from([1, 1, 2, 100]))
            call.push(output(list(range(sent[index], sent[index] + count)), sent[index], index, logprobs))
            sent[index] += count
            while call._messages and data.draw(st.booleans()):
                await take()
        for index in range(samples):
            call.push(finished(sent[index], index))
        call.end(None)
        while len(done) < samples:
            await take()
        with pytest.raises(StopAsyncIteration):
            await anext(call)
        assert got == [list(range(count)) for count in sent]

    asyncio.run(main())


def test_what_waits_for_a_reader_is_one_message_for_each_sample():
    async def main() -> None:
        call = RelayedCall(lambda: None)
        for seq in range(100):
            for index in range(2):
                call.push(output([seq], seq, index))
        call.end(None)
        assert [len(message.output.token_ids) for message in await read(call)] == [100, 100]

    asyncio.run(main())


def test_a_gap_is_not_hidden():
    async def main() -> None:
        call = RelayedCall(lambda: None)
        for seq in (0, 2, 3):
            call.push(output([seq], seq))
        call.end(None)
        assert [message.output.seq for message in await read(call)] == [0, 2]

    asyncio.run(main())
