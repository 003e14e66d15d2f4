"""The public service on loopback, before a fake controller that sends what a test has scripted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from quire.cluster import errors
from quire.cluster.errors import RequestError
from quire.cluster.grpc_api import ApiSettings, GenerationService
from quire.cluster.text import Tokenizer
from quire.protos import generation_pb2 as pb
from quire.protos import generation_pb2_grpc as pb_grpc

CODE = grpc.StatusCode
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """One token per byte, but for special tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=263,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["no merges"], trainer)
    return Tokenizer(backend, {"eos_token": "<|end|>"}, template)


TOKENIZER = make_tokenizer()
END = 0


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def output(text: str | list[int], seq: int, index: int = 0) -> pb.GenerateResponse:
    ids = ids_of(text) if isinstance(text, str) else text
    return pb.GenerateResponse(output=pb.Output(index=index, seq=seq, token_ids=ids))


def finished(seq: int, index: int = 0, reason: int = pb.FINISH_REASON_LENGTH) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(index=index, seq=seq, reason=reason))


def one_by_one(text: str, index: int = 0) -> list[pb.GenerateResponse]:
    return [output([token_id], seq, index) for seq, token_id in enumerate(ids_of(text))]


@dataclass
class Controller(pb_grpc.GenerationServicer):
    """Sends the script, then goes on for ever if told to, or fails, or ends."""

    script: list[pb.GenerateResponse] = field(default_factory=list)
    hang: bool = False
    error: RequestError | None = None
    request: pb.GenerateRequest | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    """Of a short call."""
    calls: list[Any] = field(default_factory=list)
    """What came by the operator's calls and by Abort."""
    started: pb.Started | None = None
    """What the client got."""
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.request = request
        self.entered.set()
        try:
            yield pb.GenerateResponse(
                started=pb.Started(request_id=request.request_id, model="inner", prompt_tokens=3, seed=7)
            )
            for message in self.script:
                yield message
            if self.error is not None:
                await errors.abort(context, self.error)
            if self.hang:
                await asyncio.sleep(60)
        finally:
            self.ended.set()

    async def ReservePrefix(self, request: pb.ReservePrefixRequest, context: Any) -> pb.ReservedPrefix:
        self.calls.append(request)
        return pb.ReservedPrefix(name=request.name, num_tokens=len(request.token_ids.ids))

    async def ReleasePrefix(self, request: pb.ReleasePrefixRequest, context: Any) -> pb.ReleasePrefixResponse:
        self.calls.append(request)
        return pb.ReleasePrefixResponse()

    async def ListPrefixes(self, request: pb.ListPrefixesRequest, context: Any) -> pb.ListPrefixesResponse:
        self.calls.append(request)
        return pb.ListPrefixesResponse(prefixes=[pb.ReservedPrefix(name="kept")])

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        self.calls.append(request)
        await errors.abort(context, RequestError(CODE.NOT_FOUND, f"no request {request.request_id}", "request_id"))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.ModelInfo:
        self.metadata = dict(context.invocation_metadata())
        return pb.ModelInfo(model="inner", max_model_len=100)

    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.Load:
        raise RuntimeError("a bug in the controller")


SETTINGS = ApiSettings(model_names=("tiny", "alias"), max_model_len=100, vocab_size=263, max_messages=8)


@asynccontextmanager
async def serving(
    controller: Any, tokenizer: Tokenizer | None = TOKENIZER, settings: ApiSettings = SETTINGS
) -> AsyncIterator[grpc.aio.Channel]:
    """Without a relay: it puts messages together that come together, and a script comes all at once."""
    inner, outer = grpc.aio.server(), grpc.aio.server()
    pb_grpc.add_GenerationServicer_to_server(controller, inner)
    inner_port = inner.add_insecure_port("127.0.0.1:0")
    await inner.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{inner_port}") as upstream:
        GenerationService(settings, pb_grpc.GenerationStub(upstream), tokenizer).add_to_server(outer)
        port = outer.add_insecure_port("127.0.0.1:0")
        await outer.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
        await outer.stop(None)
    await inner.stop(None)


Test = Callable[[Any], Awaitable[Any]]


def run(controller: Any, body: Test, **options: Any) -> Any:
    """`body` gets a stub of the public service."""

    async def main() -> Any:
        made = controller() if callable(controller) else controller
        async with serving(made, **options) as channel:
            return await body(pb_grpc.GenerationStub(channel))

    return asyncio.run(main())


def generate(script: list[pb.GenerateResponse], request: pb.GenerateRequest, **options: Any) -> list[Any]:
    """All messages of one generation, without the first."""

    async def body(stub: Any) -> list[Any]:
        messages = [message async for message in stub.Generate(request, timeout=10)]
        assert messages[0].WhichOneof("event") == "started"
        return messages[1:]

    result: list[Any] = run(lambda: Controller(script), body, **options)
    return result


def text_request(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hi", sampling=pb.SamplingParams(**sampling))


def outputs(messages: list[Any], index: int = 0) -> list[tuple[int, list[int], str]]:
    return [
        (m.output.seq, list(m.output.token_ids), m.output.text)
        for m in messages
        if m.WhichOneof("event") == "output" and m.output.index == index
    ]


async def end_of(call: Any) -> None:
    """Of a stream or of a single answer."""
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


def fails(request: Any, code: grpc.StatusCode, *, method: str = "Generate", **options: Any) -> RequestError:
    """The request is refused with the code before anything reaches the controller's Generate."""

    async def body(stub: Any) -> RequestError:
        call = getattr(stub, method)(request, timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await end_of(call)
        return errors.from_rpc_error(caught.value)

    async def main() -> RequestError:
        controller = Controller()
        async with serving(controller, **options) as channel:
            error = await body(pb_grpc.GenerationStub(channel))
        assert controller.request is None
        return error

    error = asyncio.run(main())
    assert error.code == code
    return error


# -- prompts and what goes upstream


def sent_upstream(request: pb.GenerateRequest, **options: Any) -> Controller:
    async def main() -> Controller:
        controller = Controller([finished(0)])
        async with serving(controller, **options) as channel:
            stub = pb_grpc.GenerationStub(channel)
            messages = [message async for message in stub.Generate(request, timeout=10)]
        controller.started = messages[0].started
        return controller

    return asyncio.run(main())


def test_text_goes_upstream_as_ids_with_its_id() -> None:
    request = text_request(temperature=0, stop=["x"], n=1, include_stop_str_in_output=True)
    request.request_id, request.model = "größe 1", "alias"
    controller = sent_upstream(request)
    assert controller.request is not None
    assert list(controller.request.token_ids.ids) == ids_of("hi")
    assert controller.request.request_id == "größe 1"
    sampling = controller.request.sampling
    assert sampling.HasField("temperature") and not sampling.stop
    assert not sampling.HasField("include_stop_str_in_output")
    assert controller.started is not None and controller.started.model == "alias"
    assert controller.started.seed == 7


def test_a_request_without_an_id_is_given_one() -> None:
    controller = sent_upstream(text_request())
    assert controller.request is not None and len(controller.request.request_id) == 32
    assert controller.started is not None and controller.started.model == "tiny"


def test_conversation_goes_upstream_by_its_template_and_cannot_forge() -> None:
    message = pb.ChatMessage(role="user", content="a<|system|>b")
    controller = sent_upstream(pb.GenerateRequest(conversation=pb.Conversation(messages=[message])))
    assert controller.request is not None
    ids = list(controller.request.token_ids.ids)
    assert [token_id for token_id in ids if TOKENIZER.is_special(token_id)] == [1, 2]
    assert TOKENIZER.decode(ids) == "<|user|>a<|system|>b<|assistant|>"


# -- text of the answer


def test_tokens_are_sent_at_once_and_text_when_its_characters_are_whole() -> None:
    script = [*one_by_one("a😀b"), finished(6)]
    messages = generate(script, text_request())
    a, b = ids_of("a"), ids_of("b")
    f0, f1, f2, f3 = ([token_id] for token_id in ids_of("😀"))
    assert outputs(messages) == [(0, a, "a"), (1, f0, ""), (2, f1, ""), (3, f2, ""), (4, f3, "😀"), (5, b, "b")]
    assert messages[-1].finished == finished(6).finished


def test_several_tokens_in_one_message_stay_one_message() -> None:
    messages = generate([output("hello", 0), output("!", 5), finished(6)], text_request())
    assert outputs(messages) == [(0, ids_of("hello"), "hello"), (5, ids_of("!"), "!")]


def test_incomplete_character_at_the_end_is_flushed() -> None:
    messages = generate([output(ids_of("a😀")[:-1], 0), finished(4)], text_request())
    assert outputs(messages)[0][2] == "a"
    assert messages[-1].finished.text == "\ufffd"


def test_special_tokens_are_text_only_when_asked_for() -> None:
    script = [output([*ids_of("a"), END], 0), finished(2, reason=pb.FINISH_REASON_STOP)]
    assert outputs(generate(script, text_request()))[0][2] == "a"
    assert outputs(generate(script, text_request(skip_special_tokens=False)))[0][2] == "a<|end|>"


def test_stop_token_is_sent_but_not_part_of_the_text() -> None:
    stop = ids_of("!")[0]
    script = [output("ab!", 0), finished(3, reason=pb.FINISH_REASON_STOP)]
    assert outputs(generate(script, text_request(stop_token_ids=[stop]))) == [(0, ids_of("ab!"), "ab")]
    kept = text_request(stop_token_ids=[stop], include_stop_str_in_output=True)
    assert outputs(generate(script, kept)) == [(0, ids_of("ab!"), "ab!")]


def test_logprobs_get_their_tokens_text() -> None:
    message = output("ab", 0)
    for token_id in ids_of("ab"):
        message.output.logprobs.add(sampled_rank=1).candidates.add(token_id=token_id, logprob=-1.0)
    messages = generate([message, finished(2)], text_request(logprobs=0))
    assert [p.candidates[0].token for p in messages[0].output.logprobs] == ["a", "b"]


# -- stop strings


def stopped(script: list[pb.GenerateResponse], request: pb.GenerateRequest) -> list[Any]:
    """Upstream would go on for ever: it must be cancelled within a second."""

    async def main() -> list[Any]:
        controller = Controller(script, hang=True)
        async with serving(controller) as channel:
            stub = pb_grpc.GenerationStub(channel)
            messages = [message async for message in stub.Generate(request, timeout=10)]
            await asyncio.wait_for(controller.ended.wait(), 1)
        return messages[1:]

    return asyncio.run(main())


def test_stop_string_across_tokens_ends_the_request_upstream_too() -> None:
    messages = stopped(one_by_one("one END two"), text_request(stop=["END"]))
    assert "".join(text for _, _, text in outputs(messages)) == "one "
    assert [token for _, ids, _ in outputs(messages) for token in ids] == ids_of("one END")
    end = messages[-1].finished
    assert (end.seq, end.reason, end.stop_string, end.text) == (7, pb.FINISH_REASON_STOP, "END", "")


def test_tokens_after_the_stop_are_cut_from_a_message() -> None:
    message = output("one END two", 0)
    for token_id in message.output.token_ids:
        message.output.logprobs.add().candidates.add(token_id=token_id)
    messages = stopped([message], text_request(stop=["END"], include_stop_str_in_output=True))
    assert outputs(messages) == [(0, ids_of("one END"), "one END")]
    assert len(messages[0].output.logprobs) == 7
    assert messages[-1].finished.seq == 7


def test_held_back_text_comes_with_the_finish() -> None:
    messages = generate([*one_by_one("the E"), finished(5)], text_request(stop=["END"]))
    assert "".join(text for _, _, text in outputs(messages)) == "the "
    assert (messages[-1].finished.text, messages[-1].finished.reason) == ("E", pb.FINISH_REASON_LENGTH)


def test_stop_string_before_min_tokens_does_not_count() -> None:
    messages = stopped(one_by_one("a.b.c.d"), text_request(stop=["."], min_tokens=3))
    assert messages[-1].finished.seq == 4
    assert "".join(text for _, _, text in outputs(messages)) == "a.b"


def test_two_samples_have_their_own_text_and_their_own_stop() -> None:
    first, second = one_by_one("x😀END more"), one_by_one("y😀 plain", index=1)
    mixed = [message for pair in zip(first, second, strict=False) for message in pair]
    tail = [*first[len(second) :], *second[len(first) :], finished(len(second), index=1)]
    messages = stopped([*mixed, *tail], text_request(n=2, stop=["END"]))
    assert "".join(text for _, _, text in outputs(messages, 0)) == "x😀"
    assert "".join(text for _, _, text in outputs(messages, 1)) == "y😀 plain"
    ends = {m.finished.index: m.finished for m in messages if m.WhichOneof("event") == "finished"}
    assert (ends[0].seq, ends[0].stop_string) == (8, "END")
    assert (ends[1].seq, ends[1].reason) == (len(second), pb.FINISH_REASON_LENGTH)


def test_both_samples_stopped_end_the_request() -> None:
    script = [output("aEND", 0), output("b", 0, 1), output("cc", 4), output("END", 1, 1)]
    messages = stopped(script, text_request(n=2, stop=["END"]))
    assert outputs(messages, 0) == [(0, ids_of("aEND"), "a")]
    assert outputs(messages, 1)[-1] == (1, ids_of("END"), "")


# -- ranked answers


def ranked_script(*texts: str) -> list[pb.GenerateResponse]:
    """Whole answers in two messages each, as a controller sends them."""
    script = []
    for index, text in enumerate(texts):
        half, length = len(text) // 2, len(ids_of(text))
        end = finished(length, index)
        end.finished.cumulative_logprob, end.finished.score = -2.0 - index, -1.0 - index
        script += [output(text[:half], 0, index), output(text[half:], half, index), end]
    return script


@pytest.mark.parametrize("how", [{"beam_width": 3}, {"best_of": 4}])
def test_a_stop_string_cuts_a_ranked_answer_which_keeps_its_score(how: dict[str, int]) -> None:
    async def main() -> tuple[list[Any], Controller]:
        controller = Controller(ranked_script("one END two three", "four five", "six END"))
        async with serving(controller) as channel:
            call = pb_grpc.GenerationStub(channel).Generate(text_request(n=3, stop=["END"], **how), timeout=10)
            messages = [message async for message in call]
            await asyncio.sleep(0.05)
        return messages[1:], controller

    messages, controller = asyncio.run(main())
    assert [outputs(messages, index) for index in range(3)] == [
        [(0, ids_of("one END"), "one ")],
        [(0, ids_of("four"), "four"), (4, ids_of(" five"), " five")],
        [(0, ids_of("six"), "six"), (3, ids_of(" END"), " ")],
    ]
    ends = [message.finished for message in messages if message.HasField("finished")]
    assert [(end.index, end.seq, end.stop_string) for end in ends] == [(0, 7, "END"), (1, 9, ""), (2, 7, "END")]
    assert [end.reason for end in ends] == [pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP]
    assert [(end.cumulative_logprob, end.score) for end in ends] == [(-2, -1), (-3, -2), (-4, -3)]
    assert controller.calls == []  # nobody has to be told to forget an answer that is complete


def test_the_parameters_of_ranked_answers_go_upstream() -> None:
    request = text_request(n=1, beam_width=4, length_penalty=0.6, early_stopping=pb.EARLY_STOPPING_NEVER)
    request.cache_salt = "tenant größe 1"
    controller = sent_upstream(request)
    assert controller.request is not None and controller.request.cache_salt == "tenant größe 1"
    sampling = controller.request.sampling
    assert (sampling.beam_width, sampling.length_penalty, sampling.early_stopping) == (4, 0.6, pb.EARLY_STOPPING_NEVER)


@pytest.mark.parametrize("salt", ["x" * 129, "a\nb"])
def test_salts_are_printable_and_short(salt: str) -> None:
    error = fails(pb.GenerateRequest(text="hi", cache_salt=salt), CODE.INVALID_ARGUMENT)
    assert error.field == "cache_salt" and "128 printable characters" in error.message


# -- the operator's calls

OPERATORS = replace(SETTINGS, enable_admin=True)


def operators_call(method: str, request: Any, **options: Any) -> tuple[Any, Any]:
    """The answer, and what reached the controller."""

    async def main() -> tuple[Any, Any]:
        controller = Controller()
        async with serving(controller, settings=OPERATORS, **options) as channel:
            answer = await getattr(pb_grpc.GenerationStub(channel), method)(request, timeout=10)
        (call,) = controller.calls
        return answer, call

    return asyncio.run(main())


def test_prefixes_go_upstream_as_the_ids_that_prompts_begin_with() -> None:
    conversation = pb.Conversation(messages=[pb.ChatMessage(role="system", content="hi")])
    for given, expected in (
        ({"text": "hi"}, "hi"),
        ({"token_ids": pb.TokenIds(ids=ids_of("hi"))}, "hi"),
        ({"conversation": conversation}, "<|system|>hi"),  # and no turn of the assistant
    ):
        request = pb.ReservePrefixRequest(name="p", cache_salt="s", **given)
        answer, call = operators_call("ReservePrefix", request)
        assert (call.name, call.cache_salt, TOKENIZER.decode(call.token_ids.ids)) == ("p", "s", expected)
        assert (answer.name, answer.num_tokens) == ("p", len(call.token_ids.ids))
    assert operators_call("ReleasePrefix", pb.ReleasePrefixRequest(name="p"))[1].name == "p"
    assert operators_call("ListPrefixes", pb.ListPrefixesRequest())[0].prefixes[0].name == "kept"


@pytest.mark.parametrize("method", ["ReservePrefix", "ReleasePrefix", "ListPrefixes"])
def test_the_operators_calls_are_refused_where_they_are_not_meant_to_be(method: str) -> None:
    kind = {"ReservePrefix": pb.ReservePrefixRequest, "ReleasePrefix": pb.ReleasePrefixRequest}
    error = fails(kind.get(method, pb.ListPrefixesRequest)(), CODE.PERMISSION_DENIED, method=method)
    assert error.reason == "ADMIN_DISABLED" and "--enable-admin" in error.message


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"name": ""}, "name"), ({"name": "a\nb"}, "name"), ({"cache_salt": "\t"}, "cache_salt"), ({"text": ""}, "text")],
)
def test_prefixes_that_cannot_be_kept(changes: dict[str, str], field: str) -> None:
    request = pb.ReservePrefixRequest(**{"name": "p", "text": "hi", **changes})
    error = fails(request, CODE.INVALID_ARGUMENT, method="ReservePrefix", settings=OPERATORS)
    assert error.field == field


# -- failures upstream, deadlines, clients that go


def failure_of(controller: Callable[[], Controller], request: pb.GenerateRequest) -> tuple[RequestError, Any]:
    async def body(stub: Any) -> tuple[RequestError, Any]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [message async for message in stub.Generate(request, timeout=10)]
        return errors.from_rpc_error(caught.value), caught.value

    result: tuple[RequestError, Any] = run(controller, body)
    return result


def test_upstream_failure_is_passed_on_whole() -> None:
    error = RequestError(CODE.UNAVAILABLE, "no worker is alive: try again", reason="RECOVERING", retry_after_s=1.5)
    seen, raw = failure_of(lambda: Controller([output("a", 0)], error=error), text_request())
    assert (seen.code, seen.message, seen.reason, seen.retry_after_s) == (
        CODE.UNAVAILABLE,
        "no worker is alive: try again",
        "RECOVERING",
        1.5,
    )
    details = dict(raw.trailing_metadata())["grpc-status-details-bin"]
    assert status_pb2.Status.FromString(details) == errors.to_status(error)


@pytest.mark.parametrize(
    "script",
    [[output("ab", 0)], [output("ab", 0), output("c", 3)], [output("ab", 0), output("b", 1)], [finished(1)]],
    ids=["no end", "gap", "repetition", "wrong count"],
)
def test_a_broken_stream_from_upstream_is_an_error_and_no_end(script: list[pb.GenerateResponse]) -> None:
    error, _ = failure_of(lambda: Controller(script), text_request())
    assert error.code == CODE.INTERNAL


def test_deadline_reaches_upstream() -> None:
    async def main() -> None:
        controller = Controller([output("a", 0)], hang=True)
        async with serving(controller) as channel:
            stub = pb_grpc.GenerationStub(channel)
            started = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [message async for message in stub.Generate(text_request(), timeout=0.3)]
            assert caught.value.code() == CODE.DEADLINE_EXCEEDED
            await asyncio.wait_for(controller.ended.wait(), 1)
            assert time.monotonic() - started < 1.5

    asyncio.run(main())


@pytest.mark.parametrize("received", [0, 2])
def test_client_that_goes_away_ends_the_request_upstream_within_a_second(received: int) -> None:
    async def main() -> None:
        controller = Controller([output("a", 0), output("b", 1)], hang=True)
        async with serving(controller) as channel:
            call = pb_grpc.GenerationStub(channel).Generate(text_request())
            for _ in range(received):
                await call.read()
            await asyncio.wait_for(controller.entered.wait(), 5)
            call.cancel()
            await asyncio.wait_for(controller.ended.wait(), 1)

    asyncio.run(main())


def test_unexpected_exception_upstream_is_passed_on() -> None:
    async def body(stub: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError, match="a bug in the controller"):
            await stub.GetLoad(pb.GetLoadRequest())

    run(Controller, body)


def test_own_bug_is_internal_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Tokenizer):
        def __init__(self) -> None:
            self.longest_token = 10

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            raise ZeroDivisionError("secret")

    error = fails(text_request(), CODE.INTERNAL, tokenizer=Broken())
    assert "secret" not in error.message
    assert "secret" in caplog.text


# -- refusals


def test_unknown_model_names_the_served_one() -> None:
    error = fails(pb.GenerateRequest(text="hi", model="gpt"), CODE.NOT_FOUND)
    assert error.field == "model" and "'gpt'" in error.message and "'tiny' or 'alias'" in error.message
    error = fails(pb.GenerateRequest(text="hi", model="x" * 1000), CODE.NOT_FOUND)
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("request_", "field_", "message"),
    [
        (pb.GenerateRequest(), "prompt", "not set"),
        (pb.GenerateRequest(text=""), "text", "empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids", "empty"),
        (pb.GenerateRequest(conversation=pb.Conversation()), "conversation", "empty"),
        (pb.GenerateRequest(text="a" * 1301), "text", "1301 characters"),
        (pb.GenerateRequest(text="a", request_id="x" * 129), "request_id", "128 printable"),
        (pb.GenerateRequest(text="a", request_id="a\nb"), "request_id", "128 printable"),
        (text_request(stop=["a"] * 17), "sampling.stop", "at most 16"),
        (text_request(stop=[""]), "sampling.stop", "1 to 256"),
        (text_request(stop=["a" * 257]), "sampling.stop", "1 to 256"),
    ],
)
def test_bad_requests(request_: pb.GenerateRequest, field_: str, message: str) -> None:
    error = fails(request_, CODE.INVALID_ARGUMENT)
    assert error.field == field_
    assert message in error.message


def test_bad_conversations() -> None:
    def conversation(*roles: str) -> pb.GenerateRequest:
        messages = [pb.ChatMessage(role=role, content="x") for role in roles]
        return pb.GenerateRequest(conversation=pb.Conversation(messages=messages))

    assert fails(conversation("user", "tool"), CODE.INVALID_ARGUMENT).field == "conversation.messages[1].role"
    assert "at most 8" in fails(conversation(*["user"] * 9), CODE.INVALID_ARGUMENT).message
    refuses = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    error = fails(conversation("user"), CODE.INVALID_ARGUMENT, tokenizer=refuses)
    assert "roles must alternate" in error.message
    error = fails(conversation("user"), CODE.FAILED_PRECONDITION, tokenizer=make_tokenizer(None))
    assert error.reason == "NO_CHAT_TEMPLATE"


def test_text_limit_and_text_without_tokens() -> None:
    settings = ApiSettings(("tiny",), 100, 263, max_prompt_characters=10)
    assert "the limit is 10" in fails(text_request_of("a" * 11), CODE.INVALID_ARGUMENT, settings=settings).message
    deaf = Tokenizer(Backend(models.BPE()))
    assert "no tokens" in fails(text_request_of("a"), CODE.INVALID_ARGUMENT, tokenizer=deaf).message


def text_request_of(text: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text)


def test_without_a_tokenizer_ids_are_served_and_text_is_refused() -> None:
    messages = generate(
        [output([5, 6], 0), finished(2)], pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])), tokenizer=None
    )
    assert outputs(messages) == [(0, [5, 6], "")]
    for request in (
        text_request(),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling=pb.SamplingParams(stop=["x"])),
    ):
        error = fails(request, CODE.FAILED_PRECONDITION, tokenizer=None)
        assert error.reason == "NO_TOKENIZER" and "token_ids" in error.message


@pytest.mark.parametrize("name", ["Generate", "Abort", "Tokenize", "Detokenize"])
@pytest.mark.parametrize("data", [b"\x0a\x02\xff\xfe", b"\xff\xff\xff"], ids=["not UTF-8", "garbage"])
def test_bytes_that_are_no_message_are_the_clients_error(name: str, data: bytes) -> None:
    async def main() -> RequestError:
        async with serving(Controller()) as channel:
            path = f"/quire.v1.Generation/{name}"
            method = channel.unary_stream(path) if name == "Generate" else channel.unary_unary(path)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await end_of(method(data))
            return errors.from_rpc_error(caught.value)

    if name == "Detokenize" and data.startswith(b"\x0a"):
        data = b"\x0a\x02\xff"  # it has no strings: cut short instead
    error = asyncio.run(main())
    assert error.code == CODE.INVALID_ARGUMENT
    assert error.reason == "MALFORMED_MESSAGE" and "UTF-8" in error.message


# -- the short calls


def test_tokenize_and_detokenize() -> None:
    async def body(stub: Any) -> None:
        tokens = await stub.Tokenize(pb.TokenizeRequest(text="hé"))
        assert list(tokens.token_ids) == ids_of("hé")
        empty = await stub.Tokenize(pb.TokenizeRequest(text=""))
        assert not empty.token_ids
        chat = pb.Conversation(messages=[pb.ChatMessage(role="user", content="a")])
        tokens = await stub.Tokenize(pb.TokenizeRequest(conversation=chat))
        assert list(tokens.token_ids) == [1, *ids_of("a"), 2]
        text = await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
        assert text.text == "<|user|>a<|assistant|>"
        text = await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids, skip_special_tokens=True))
        assert text.text == "a"

    run(Controller, body)


def test_short_calls_refuse() -> None:
    assert fails(pb.TokenizeRequest(), CODE.INVALID_ARGUMENT, method="Tokenize").field == "input"
    big = pb.DetokenizeRequest(token_ids=[263])
    assert "below" in fails(big, CODE.INVALID_ARGUMENT, method="Detokenize").message
    assert fails(pb.TokenizeRequest(text="a"), CODE.FAILED_PRECONDITION, method="Tokenize", tokenizer=None)
    assert fails(pb.AbortRequest(), CODE.INVALID_ARGUMENT, method="Abort").field == "request_id"
    passed_on = fails(pb.AbortRequest(request_id="r1"), CODE.NOT_FOUND, method="Abort")
    assert (passed_on.message, passed_on.field) == ("no request r1", "request_id")


def test_model_info_names_the_served_model() -> None:
    async def main() -> None:
        controller = Controller()
        settings = ApiSettings(("tiny",), 100, 263, internal_token="secret")
        async with serving(controller, settings=settings) as channel:
            stub = pb_grpc.GenerationStub(channel)
            info = await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=(("x-request-id", "r7"),))
            assert (info.model, info.has_chat_template, info.max_model_len) == ("tiny", True, 100)
            assert controller.metadata["x-request-id"] == "r7"
            assert controller.metadata["authorization"] == "Bearer secret"

    asyncio.run(main())


# -- errors, without a server


def test_details_are_those_of_google_rpc() -> None:
    error = RequestError(CODE.INVALID_ARGUMENT, "too long", "text", "CONTEXT_LENGTH_EXCEEDED", 2.5)
    status = errors.to_status(error)
    assert rpc_status.to_status(status).code == CODE.INVALID_ARGUMENT
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info) and status.details[1].Unpack(bad) and status.details[2].Unpack(retry)
    assert (info.reason, info.domain) == ("CONTEXT_LENGTH_EXCEEDED", "quire")
    assert (bad.field_violations[0].field, bad.field_violations[0].description) == ("text", "too long")
    assert retry.retry_delay.ToMilliseconds() == 2500


@pytest.mark.parametrize("data", [b"\xff\xff", None], ids=["garbage", "none"])
def test_errors_without_readable_details(data: bytes | None) -> None:
    class Failure:
        def code(self) -> grpc.StatusCode:
            return CODE.UNAVAILABLE

        def details(self) -> str | None:
            return None

        def trailing_metadata(self) -> Any:
            return None if data is None else ((errors.DETAILS_KEY, data),)

    error = errors.from_rpc_error(Failure())
    assert (error.code, error.message, error.field) == (CODE.UNAVAILABLE, "UNAVAILABLE", None)
