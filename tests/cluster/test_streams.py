"""What a controller's reader gets when it is slower than the engine, and what the engine's thread hands over."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from schedulers import make_request

from quire.cluster.errors import RequestError
from quire.cluster.streams import Stream
from quire.cluster.wire import MAX_TOKENS_PER_MESSAGE
from quire.protos import generation_pb2 as pb
from quire.scheduler.plan import Answer, Logprobs
from quire.scheduler.sequence import FinishReason


def stream_of(**params: Any) -> Stream:
    return Stream(make_request("a", [1], max_model_len=2048, **{"max_tokens": 1000, **params}))


async def take(messages: Any) -> pb.GenerateResponse:
    return await asyncio.wait_for(anext(messages), 5)


def test_the_first_token_comes_at_once_and_then_what_has_gathered():
    async def scenario() -> None:
        stream = stream_of()
        messages = stream.messages()
        stream.push(0, 7, None, None)
        assert (await take(messages)).output == pb.Output(index=0, seq=0, token_ids=[7])
        for token in (8, 9, 10):
            stream.push(0, token, None, None)
        assert (await take(messages)).output == pb.Output(index=0, seq=1, token_ids=[8, 9, 10])
        waiting = asyncio.ensure_future(anext(messages))
        await asyncio.sleep(0)
        stream.push(0, 11, FinishReason.LENGTH, None)
        assert (await asyncio.wait_for(waiting, 5)).output == pb.Output(index=0, seq=4, token_ids=[11])
        ended = (await take(messages)).finished
        assert (ended.seq, ended.reason, ended.HasField("stop_token_id")) == (5, pb.FINISH_REASON_LENGTH, False)
        with pytest.raises(StopAsyncIteration):
            await take(messages)
        assert not stream.is_unfinished

    asyncio.run(scenario())


def test_a_token_alone_passes_the_reader_by_and_keeps_its_place():
    async def scenario() -> None:
        stream, passed = stream_of(n=2), []
        messages = stream.messages()
        stream.push(0, 7, None, None)  # before anybody takes them
        stream.send_token = lambda *token: passed.append(token)
        stream.push(0, 8, None, None)  # not ahead of the one that waits
        stream.push(1, 9, None, None)
        assert passed == [(1, 0, 9)]
        assert (await take(messages)).output == pb.Output(index=0, seq=0, token_ids=[7, 8])
        waiting = asyncio.ensure_future(anext(messages))
        stream.push(0, 10, None, None)
        stream.push(1, 11, None, Logprobs((11,), (-1.0,), 1))  # it has something beside it
        assert passed[1:] == [(0, 2, 10)]
        assert (await asyncio.wait_for(waiting, 5)).output.seq == 1
        stream.push(0, 12, None, None)
        stream.push(0, 13, FinishReason.LENGTH, None)
        stream.drop(1)
        stream.push(1, 14, None, None)  # nobody waits for it
        assert passed[2:] == [(0, 3, 12)]
        assert (await take(messages)).output == pb.Output(index=0, seq=4, token_ids=[13])
        assert (await take(messages)).finished.seq == 5
        with pytest.raises(StopAsyncIteration):
            await take(messages)

    asyncio.run(scenario())


def test_no_message_grows_beyond_its_limit_and_log_probabilities_stay_with_their_tokens():
    async def scenario() -> None:
        stream, total = stream_of(logprobs=0), MAX_TOKENS_PER_MESSAGE + 3
        for token in range(total):
            end = FinishReason.STOP if token == total - 1 else None
            stream.push(0, token, end, Logprobs((token,), (-1.0,), 1))
        outputs = [message.output async for message in stream.messages() if message.HasField("output")]
        assert [len(output.token_ids) for output in outputs] == [MAX_TOKENS_PER_MESSAGE, 3]
        assert [output.seq for output in outputs] == [0, MAX_TOKENS_PER_MESSAGE]
        for output in outputs:
            assert [entry.candidates[0].token_id for entry in output.logprobs] == list(output.token_ids)

    asyncio.run(scenario())


def test_samples_end_one_by_one_and_a_dropped_one_says_nothing_more():
    async def scenario() -> None:
        stream = stream_of(n=3, stop_token_ids=[5])
        stream.push(0, 5, FinishReason.STOP, None)
        stream.push(1, 6, None, None)
        stream.push(2, 7, None, None)
        stream.drop(1)
        messages = stream.messages()
        found = [await take(messages) for _ in range(3)]
        assert [found[0].output.index, found[1].finished.stop_token_id, found[2].output.index] == [0, 5, 2]
        stream.drop(2)
        stream.drop(9)  # nobody is there
        with pytest.raises(StopAsyncIteration):
            await take(messages)

    asyncio.run(scenario())


def test_a_failure_is_told_after_the_tokens_that_had_come():
    async def scenario() -> None:
        stream = stream_of()
        stream.push(0, 7, None, None)
        stream.fail(RequestError(grpc.StatusCode.UNAVAILABLE, "gone"))
        messages = stream.messages()
        assert (await take(messages)).output.token_ids == [7]
        with pytest.raises(RequestError, match="gone"):
            await take(messages)

    asyncio.run(scenario())


def test_logits_that_were_not_numbers_end_the_stream():
    async def scenario() -> None:
        stream = stream_of()
        stream.push(0, -1, FinishReason.ERROR, None)
        with pytest.raises(RequestError, match="not numbers"):
            await take(stream.messages())

    asyncio.run(scenario())


def answer(stream: Stream, index: int, token_ids: list[int], reason: FinishReason = FinishReason.LENGTH) -> Answer:
    logprobs = tuple(Logprobs((token,), (-1.0,), 1) for token in token_ids)
    asked = logprobs if stream.request.params.logprobs is not None else ()
    return Answer(stream.request, index, tuple(token_ids), asked, -0.5 * len(token_ids), -0.5, reason)


def test_ranked_answers_come_whole_best_first_and_with_their_scores():
    async def scenario() -> None:
        stream, length = stream_of(n=2, best_of=3, logprobs=0, stop_token_ids=[5]), MAX_TOKENS_PER_MESSAGE + 2
        long = [token % 4 for token in range(length)]
        for made in (answer(stream, 1, [9, 5], FinishReason.STOP), answer(stream, 0, long)):
            assert stream.is_unfinished
            stream.push_answer(made)
        assert not stream.is_unfinished
        found = [message async for message in stream.messages()]
        assert " ".join(message.WhichOneof("event") for message in found) == "output output finished output finished"
        first, rest, end, second, last = found
        assert (first.output.index, first.output.seq, rest.output.seq) == (0, 0, MAX_TOKENS_PER_MESSAGE)
        assert [*first.output.token_ids, *rest.output.token_ids] == long
        assert len(first.output.logprobs) == MAX_TOKENS_PER_MESSAGE and len(rest.output.logprobs) == 2
        assert end.finished == pb.Finished(
            seq=length, reason=pb.FINISH_REASON_LENGTH, cumulative_logprob=-0.5 * length, score=-0.5
        )
        assert (second.output.index, list(second.output.token_ids)) == (1, [9, 5])
        assert last.finished == pb.Finished(
            index=1, seq=2, reason=pb.FINISH_REASON_STOP, stop_token_id=5, cumulative_logprob=-1.0, score=-0.5
        )

    asyncio.run(scenario())


def test_a_candidate_whose_logits_were_not_numbers_ends_the_stream():
    async def scenario() -> None:
        stream = stream_of(beam_width=2)
        stream.push_answer(answer(stream, 0, [], FinishReason.ERROR))
        with pytest.raises(RequestError, match="not numbers"):
            await take(stream.messages())

    asyncio.run(scenario())


def test_samples_that_are_not_ranked_have_no_score():
    async def scenario() -> None:
        stream = stream_of()
        stream.push(0, 7, FinishReason.LENGTH, None)
        _, end = [message.finished async for message in stream.messages()]
        assert end.seq == 1 and not end.HasField("cumulative_logprob") and not end.HasField("score")

    asyncio.run(scenario())
