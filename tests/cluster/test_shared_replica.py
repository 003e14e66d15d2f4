"""A replica over Ray and real gRPC: prefixes reserved from the start and by call, and ranked answers in text."""

from __future__ import annotations

import sys
import time
from typing import Any

import grpc
import pytest

from quire.cluster.client import Client, ServerError, texts
from quire.cluster.config import EngineConfig, ServeConfig, resolve
from quire.cluster.llm import LLM, SamplingParams
from quire.cluster.prefixes import Prefix
from quire.cluster.progress import Progress

STORY = "Once upon a time there was a fox named Mia. Mia had a red key and a blue cup, and she lived near the old mill."
SYSTEM = [{"role": "system", "content": "You tell stories of foxes, and of the old mill where they live."}]
SETTINGS: dict[str, Any] = dict(dtype="float32", max_model_len=256, num_gpu_blocks_override=100)


@pytest.fixture(scope="module")
def client(start_replica: Any) -> Client:
    reserved = (Prefix("story", STORY), Prefix("system", SYSTEM, "tenant"))
    _, client = start_replica(**SETTINGS, reserved_prefixes=reserved, max_num_seqs=16)
    return client


def wait_ready(client: Client) -> None:
    deadline = time.monotonic() + 20
    while not all(kept.is_ready for kept in client.prefixes()):
        assert time.monotonic() < deadline, client.prefixes()
        time.sleep(0.02)


def hits(client: Client, prompt: Any, **options: Any) -> int:
    before = client.load().prefix_hit_tokens
    client.complete(prompt, max_tokens=1, **options)
    return client.load().prefix_hit_tokens - before


def test_what_was_reserved_at_the_start_is_found(client: Client) -> None:
    wait_ready(client)
    story, system = client.prefixes()
    assert (story.name, story.num_tokens) == ("story", len(client.tokenize(STORY)))
    assert client.load().blocks_reserved_prefix == story.num_blocks + system.num_blocks
    # The first token of what follows may have joined the prefix's last one: whole blocks are found whatever follows.
    assert hits(client, f"{STORY} One day she") >= story.num_tokens // 16 * 16 > 0
    conversation = [*SYSTEM, {"role": "user", "content": "Tell me one."}]
    assert hits(client, conversation) == 0
    assert hits(client, conversation, cache_salt="tenant") >= system.num_tokens // 16 * 16 > 0


def test_prefixes_come_and_go_by_call(client: Client) -> None:
    wait_ready(client)
    used = client.load().blocks_used
    assert client.reserve_prefix("ids", [5, 6, 7] * 7).num_tokens == 21
    wait_ready(client)
    assert client.load().blocks_used == used + 2
    assert hits(client, [*([5, 6, 7] * 7), 8]) == 21
    with pytest.raises(ServerError, match="already") as refused:
        client.reserve_prefix("ids", "something else")
    assert (refused.value.code, refused.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "name")
    with pytest.raises(ServerError, match="the prompt has 300 tokens"):
        client.reserve_prefix("long", [5] * 300)
    client.release_prefix("ids")
    assert client.load().blocks_used == used and [kept.name for kept in client.prefixes()] == ["story", "system"]
    with pytest.raises(ServerError, match="no prefix 'ids'"):
        client.release_prefix("ids")


@pytest.mark.parametrize("how", [{"beam_width": 4, "length_penalty": 0.5}, {"best_of": 5, "seed": 3}])
def test_ranked_answers_are_those_of_the_offline_engine(how: dict[str, Any], client: Client) -> None:
    common: dict[str, Any] = {"n": 2, "max_tokens": 24, **how}
    with LLM(device="cpu", **SETTINGS) as llm:
        whole = llm.generate(STORY, SamplingParams(**common), use_tqdm=False)[0].outputs
        stop = whole[0].text[9:13]
        cut = llm.generate(STORY, SamplingParams(**common, stop=[stop]), use_tqdm=False)[0].outputs
    for expected, extra in ((whole, {}), (cut, {"stop": [stop]})):
        responses = list(client.generate(STORY, **common, **extra))
        found = {0: "", 1: ""}
        for index, text in texts(iter(responses)):
            found[index] += text
        ends = [response.finished for response in responses if response.HasField("finished")]
        assert found == {answer.index: answer.text for answer in expected}
        assert [end.seq for end in ends] == [len(answer.token_ids) for answer in expected]
        assert [end.score for end in ends] == pytest.approx([answer.score for answer in expected], rel=1e-4)
        assert [end.stop_string for end in ends] == [
            answer.stop_reason if isinstance(answer.stop_reason, str) else "" for answer in expected
        ]


def test_a_prefix_that_does_not_fit_ends_the_start_with_a_sentence(ray_cluster: None) -> None:
    from quire.cluster import launch

    config = ServeConfig(
        engine=EngineConfig(device="cpu", **SETTINGS), grpc_port=0, reserved_prefixes=(Prefix("long", [5] * 300),)
    )
    replica = launch.Replica(config, resolve(config.engine), Progress(sys.stderr))
    try:
        with pytest.raises(ValueError, match="the prefix 'long' cannot be reserved: the prompt has 300 tokens"):
            replica.start(lambda: False)
    finally:
        replica.stop()
