"""What the controller has for a request's reader: tokens wait here, however slow it is.

A request's samples are sent as they grow. Ranked answers come whole, when the last of their candidates has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection

import grpc

from quire.cluster import wire
from quire.cluster.errors import RequestError
from quire.protos import generation_pb2
from quire.scheduler.plan import Answer, Logprobs
from quire.scheduler.request import Request
from quire.scheduler.sequence import FinishReason


class _Sample:
    """What has come for one sample of a request and has not been sent, and how it ended."""

    __slots__ = ("answer", "end", "index", "is_open", "is_unfinished", "logprobs", "num_sent", "token_ids")

    def __init__(self, index: int) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.end: FinishReason | None = None
        self.answer: Answer | None = None
        """What it has become, where answers are ranked."""
        self.num_sent = 0
        self.is_unfinished = True
        """The engine still works on it."""
        self.is_open = True
        """Its end has not been handed to the reader."""

    @property
    def has_news(self) -> bool:
        return self.is_open and (bool(self.token_ids) or self.end is not None)

    def take_messages(self, stop_token_ids: Collection[int]) -> list[generation_pb2.GenerateResponse]:
        """What there is to send, in as few messages as may be. Raises RequestError."""
        if self.end is FinishReason.ERROR:
            raise RequestError(grpc.StatusCode.INTERNAL, "the model's logits were not numbers", reason="NAN_LOGITS")
        token_ids, logprobs = self.token_ids, self.logprobs
        self.token_ids, self.logprobs = [], []
        messages = []
        for start in range(0, len(token_ids), wire.MAX_TOKENS_PER_MESSAGE):
            part = slice(start, start + wire.MAX_TOKENS_PER_MESSAGE)
            messages.append(wire.encode_output(self.index, self.num_sent, token_ids[part], logprobs[part]))
            self.num_sent += len(token_ids[part])
        if self.end is not None:
            self.is_open = False
            messages.append(self._finished(self.end, token_ids, stop_token_ids))
        return messages

    def _finished(
        self, end: FinishReason, token_ids: list[int], stop_token_ids: Collection[int]
    ) -> generation_pb2.GenerateResponse:
        is_named = end is FinishReason.STOP and token_ids[-1] in stop_token_ids
        stop_token = token_ids[-1] if is_named else None
        if self.answer is None:
            return wire.encode_finished(self.index, self.num_sent, end, stop_token)
        cumulative, score = self.answer.cumulative_logprob, self.answer.score
        return wire.encode_finished(self.index, self.num_sent, end, stop_token, cumulative, score)


class Stream:
    """One open request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.error: RequestError | None = None
        self.send_token: Callable[[int, int, int], None] | None = None
        """Takes index, position and id of a token that comes alone: nothing beside it, nothing of its sample waiting.
        The reader is not woken up for it. None: it is."""
        self._samples = [_Sample(index) for index in range(request.params.n)]
        self._ready = asyncio.Event()

    def push(self, index: int, token: int, end: FinishReason | None, logprobs: Logprobs | None) -> None:
        sample = self._samples[index]
        is_alone = logprobs is None and end is None and sample.is_open and not sample.token_ids
        if is_alone and self.send_token is not None:
            self.send_token(index, sample.num_sent, token)
            sample.num_sent += 1
            return
        sample.token_ids.append(token)
        if logprobs is not None:
            sample.logprobs.append(logprobs)
        if end is not None:
            sample.end = end
            sample.is_unfinished = False
        if not self._ready.is_set():
            self._ready.set()

    def push_answer(self, answer: Answer) -> None:
        """One of the `n`; all of them come with the same step."""
        sample = self._samples[answer.index]
        sample.token_ids, sample.logprobs = list(answer.token_ids), list(answer.logprobs)
        sample.answer, sample.end = answer, answer.finish_reason
        sample.is_unfinished = False
        self._ready.set()

    @property
    def is_unfinished(self) -> bool:
        return any(sample.is_unfinished for sample in self._samples)

    def drop(self, index: int) -> None:
        """Forget one sample: nobody waits for its end any more."""
        if 0 <= index < len(self._samples):
            self._samples[index].is_open = self._samples[index].is_unfinished = False
        self._ready.set()

    def fail(self, error: RequestError) -> None:
        self.error = error
        self._ready.set()

    async def messages(self) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Everything up to the last sample's end. Raises RequestError."""
        open_samples = self._samples
        while open_samples := [sample for sample in open_samples if sample.is_open]:
            await self._ready.wait()
            self._ready.clear()
            for sample in open_samples:
                if sample.has_news:
                    for message in sample.take_messages(self.request.params.stop_token_ids):
                        yield message
            if self.error is not None and any(sample.is_open for sample in open_samples):
                raise self.error
