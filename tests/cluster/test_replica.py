"""A replica with two worker processes, over Ray and real gRPC: many streams, cancellations, deadlines, bad input."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import ray

from quire.cluster.client import Client, ServerError
from quire.cluster.llm import LLM, SamplingParams
from quire.protos import generation_pb2 as pb
from quire.protos import generation_pb2_grpc as pb_grpc
from quire.protos.channel import PUBLIC_CHANNEL_OPTIONS

PROMPTS = [
    f"Once upon a time there was a fox named {name}. " * (1 + i % 5) for i, name in enumerate(["Mia", "Tom"] * 32)
]
STREAMS = 64
LONG = {"max_tokens": 900, "ignore_eos": True, "temperature": 0.0}


@pytest.fixture(scope="module")
def replica(start_replica: Any) -> tuple[Any, Client]:
    return start_replica(tensor_parallel_size=2, max_model_len=1024, max_num_seqs=64, num_gpu_blocks_override=600)


@pytest.fixture
def client(replica: tuple[Any, Client]) -> Iterator[Client]:
    """Every test finds all blocks free and leaves them so, with balanced books."""
    handle, client = replica
    yield client
    assert_all_free(client)
    ray.get(handle.controller.audit.remote(), timeout=30)


def assert_all_free(client: Client, timeout: float = 10.0) -> pb.Load:
    deadline = time.monotonic() + timeout
    while (load := client.load()).open_requests or load.blocks_used or load.num_running or load.num_waiting:
        assert time.monotonic() < deadline, load
        time.sleep(0.02)
    assert load.blocks_free + load.blocks_cached == load.blocks_total
    return load


def collect(responses: Iterator[pb.GenerateResponse]) -> tuple[list[int], str, pb.Finished]:
    """Tokens, text and end of a single sample; checks that nothing is missing, repeated or out of order."""
    tokens: list[int] = []
    text, finished, started = "", None, 0
    for response in responses:
        assert finished is None, "something came after the end"
        match response.WhichOneof("event"):
            case "started":
                started += 1
            case "output":
                assert response.output.seq == len(tokens)
                tokens.extend(response.output.token_ids)
                text += response.output.text
            case "finished":
                finished = response.finished
                text += finished.text
    assert started == 1 and finished is not None and finished.seq == len(tokens)
    return tokens, text, finished


@pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies are Linux's")
def test_delivery_gives_way_to_computation(replica):
    handle, _ = replica

    def policy(actor: Any) -> int:
        return ray.get(actor.__ray_call__.remote(lambda _self: os.sched_getscheduler(0)), timeout=30)

    assert policy(handle.controller) == policy(handle._gateway) == os.SCHED_BATCH
    assert [policy(worker) for worker in handle.workers] == [os.SCHED_OTHER] * 2


def test_64_concurrent_streams_get_the_offline_answers(client):
    with LLM(device="cpu", max_model_len=1024) as llm:
        params = SamplingParams(temperature=0, max_tokens=40)
        expected = llm.generate(PROMPTS, params, use_tqdm=False)
    before = client.load()
    with ThreadPoolExecutor(STREAMS) as pool:
        answers = list(pool.map(lambda p: collect(client.generate(p, temperature=0.0, max_tokens=40)), PROMPTS))
    for (tokens, text, finished), offline in zip(answers, expected, strict=True):
        assert tokens == offline.outputs[0].token_ids
        assert text == offline.outputs[0].text
        reason = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}[offline.outputs[0].finish_reason]
        assert finished.reason == reason
    load = assert_all_free(client)
    assert load.num_finished - before.num_finished == STREAMS
    # They ran together: far fewer steps than tokens.
    assert load.num_steps - before.num_steps < sum(len(tokens) for tokens, _, _ in answers) / 8


def test_sampled_answers_repeat_by_their_seed_whatever_else_is_served(client):
    def ask(seed: int) -> list[int]:
        return collect(client.generate(PROMPTS[0], temperature=1.0, seed=seed, max_tokens=24))[0]

    alone = ask(7)
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(ask, [1, 2, 7, 3, 7, 4, 5, 6]))
    assert crowd[2] == crowd[4] == alone
    assert len({tuple(tokens) for tokens in crowd}) == 7


def test_the_pool_preempts_and_every_answer_is_still_complete(client):
    """64 sequences of up to 300 tokens do not fit into 600 blocks at once."""
    before = client.load().num_preemptions
    with ThreadPoolExecutor(STREAMS) as pool:
        params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 260}
        answers = list(pool.map(lambda p: collect(client.generate(p, **params)), PROMPTS))
    assert [len(tokens) for tokens, _, _ in answers] == [260] * STREAMS
    assert client.load().num_preemptions > before


def test_cancelling_half_of_64_streams_frees_their_blocks_and_the_rest_goes_on(client):
    stub = pb_grpc.GenerationStub(grpc.insecure_channel(client.target, options=PUBLIC_CHANNEL_OPTIONS))
    sampling = pb.SamplingParams(**{**LONG, "max_tokens": 140})
    calls = [stub.Generate(pb.GenerateRequest(text="A fox", sampling=sampling)) for _ in range(STREAMS)]
    for call in calls:
        next(call)
    before = client.load()
    for call in calls[::2]:
        call.cancel()
    assert [collect_rest(call) for call in calls[1::2]] == [140] * (STREAMS // 2)
    after = assert_all_free(client)
    assert after.num_cancelled - before.num_cancelled == STREAMS // 2
    # Had the cancelled ones gone on, twice as many tokens would have been made.
    assert after.generation_tokens - before.generation_tokens < 1.5 * 140 * STREAMS // 2


def collect_rest(call: Iterator[pb.GenerateResponse]) -> int:
    """Tokens of the whole answer, as its end counts them."""
    for response in call:
        if response.WhichOneof("event") == "finished":
            return response.finished.seq
    raise AssertionError("no end")


def test_a_deadline_frees_its_blocks(client):
    start = time.monotonic()
    with pytest.raises(ServerError) as failure:
        collect(client.generate("A fox", timeout=0.7, **LONG))
    assert failure.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - start < 3
    assert_all_free(client, timeout=2)


def test_a_reader_that_stops_reading_does_not_slow_the_others(client):
    stub = pb_grpc.GenerationStub(grpc.insecure_channel(client.target, options=PUBLIC_CHANNEL_OPTIONS))
    sampling = pb.SamplingParams(**LONG, logprobs=20)
    stalled = [stub.Generate(pb.GenerateRequest(text="A fox", sampling=sampling)) for _ in range(4)]
    for call in stalled:
        next(call)  # and no more
    tokens, _, _ = collect(client.generate("A fox", temperature=0.0, max_tokens=200, ignore_eos=True))
    assert len(tokens) == 200
    # The stalled ones were computed all the same, and their answers are whole once somebody reads them.
    deadline = time.monotonic() + 60
    while client.load().num_running:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [collect_rest(call) for call in stalled] == [900] * 4


def test_workers_do_not_yield_to_other_processes(replica):
    handle, _ = replica
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert [os.getpriority(os.PRIO_PROCESS, address.pid) for address in handle.addresses] == [ours, ours]


def test_n_samples_interleave_in_one_stream(client):
    ends: dict[int, int] = {}
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for response in client.generate("A fox", n=3, max_tokens=12, seed=5, ignore_eos=True):
        if response.WhichOneof("event") == "output":
            assert response.output.seq == len(tokens[response.output.index])
            tokens[response.output.index].extend(response.output.token_ids)
        elif response.WhichOneof("event") == "finished":
            ends[response.finished.index] = response.finished.seq
    assert ends == {0: 12, 1: 12, 2: 12}
    assert len({tuple(t) for t in tokens.values()}) > 1


def test_abort_ends_a_request_from_another_connection(client):
    ended: list[ServerError] = []

    def read() -> None:
        try:
            collect(client.generate("A fox", request_id="mine", **LONG))
        except ServerError as error:
            ended.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    while not client.load().num_running:
        time.sleep(0.01)
    with Client(client.target) as other:
        other.abort("mine")
        reader.join(timeout=10)
        assert ended[0].code is grpc.StatusCode.CANCELLED
        with pytest.raises(ServerError) as failure:
            other.abort("mine")
    assert failure.value.code is grpc.StatusCode.NOT_FOUND


def test_an_id_in_use_is_refused_and_its_owner_undisturbed(client):
    stream = client.generate("A fox", request_id="twice", max_tokens=200, ignore_eos=True, temperature=0.0)
    next(stream)
    with pytest.raises(ServerError, match="in progress already") as failure:
        collect(client.generate("A fox", request_id="twice"))
    assert failure.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert collect_rest(stream) == 200


INVALID = grpc.StatusCode.INVALID_ARGUMENT
BAD = {
    "no prompt": ([], {}, INVALID, "prompt is empty"),
    "empty text": ("", {}, INVALID, "prompt is empty"),
    "too long": ([5] * 1024, {}, INVALID, "1024 tokens, but at most 1023 fit"),
    "token id out of range": ([5, 10**6], {}, INVALID, "token id 1000000 is outside"),
    "negative max_tokens": ("A fox", {"max_tokens": -1}, INVALID, "max_tokens must be at least 1"),
    "max_tokens 0": ("A fox", {"max_tokens": 0}, INVALID, "max_tokens must be at least 1"),
    "huge max_tokens": ("A fox", {"max_tokens": 2**31 - 1}, INVALID, "leave room for"),
    "unknown model": ("A fox", {"model": "gpt-5"}, grpc.StatusCode.NOT_FOUND, "no model 'gpt-5'"),
    "temperature below 0": ("A fox", {"temperature": -0.5}, INVALID, "temperature must be between 0"),
    "temperature not a number": ("A fox", {"temperature": float("nan")}, INVALID, "temperature must be between 0"),
    "top_p 0": ("A fox", {"top_p": 0.0}, INVALID, "top_p must be above 0"),
    "top_p above 1": ("A fox", {"top_p": 1.5}, INVALID, "top_p must be between 0 and 1"),
    "n 0": ("A fox", {"n": 0}, INVALID, "n must be between 1 and 128"),
    "n huge": ("A fox", {"n": 10**6}, INVALID, "n must be between 1 and 128"),
    "stop empty": ("A fox", {"stop": [""]}, INVALID, "stop string"),
    "bias out of range": ("A fox", {"logit_bias": {10**6: 1.0}}, INVALID, "outside the vocabulary"),
    "10 MB prompt": ("x" * 10_000_000, {}, grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
    "7 MB prompt": ("x" * 7_000_000, {}, INVALID, "characters"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_touches_nobody_else(client, case):
    prompt, options, code, sentence = BAD[case]
    neighbour = client.generate("A fox", temperature=0.0, max_tokens=30, ignore_eos=True)
    next(neighbour)
    with pytest.raises(ServerError, match=sentence) as failure:
        collect(client.generate(prompt, timeout=30, **options))
    assert failure.value.code is code
    if "max_tokens" in options:
        assert failure.value.field == "sampling.max_tokens"
    assert collect_rest(neighbour) == 30


def test_bytes_that_are_no_utf8_are_the_clients_mistake(client):
    raw = grpc.insecure_channel(client.target).unary_stream("/quire.v1.Generation/Generate")
    text = b"\xff\xfe fox"
    with pytest.raises(grpc.RpcError) as failure:
        next(raw(b"\x1a" + bytes([len(text)]) + text))
    assert failure.value.code() is INVALID and "UTF-8" in failure.value.details()


def test_what_is_served_and_how_busy_it_is(client):
    info = client.model_info()
    assert (info.model, info.tensor_parallel_size, info.num_blocks) == ("quire-demo", 2, 600)
    assert info.max_model_len == 1024 and info.has_chat_template
    text = "".join(client.chat([{"role": "user", "content": "Tell me a story."}], max_tokens=20, temperature=0.0))
    assert text.strip()
