"""Online measurements: the arithmetic, arrivals, and the client that sends and reads, against servers made up here."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import arrivals, latency, load_client, plots, serve
from benchmarks.latency import Record
from quire.protos import generation_pb2 as pb
from quire.protos import generation_pb2_grpc as pb_grpc

# -- arithmetic


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values, percent):
    assert latency.percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-9)


def test_no_values_have_no_percentile():
    with pytest.raises(ValueError):
        latency.percentile([], 50)


def record(due: float, *times: float, tokens: int | None = None, late: float = 0.0, error: str = "") -> Record:
    end = times[-1] if times else due + 1
    return Record(due, due + late, list(times), len(times) if tokens is None else tokens, end, error)


def test_a_record_counts_from_when_it_was_due():
    seen = record(1.0, 1.5, 1.75, 2.5, late=0.25)
    assert (seen.ttft, seen.itls, seen.tpot, seen.e2e) == (0.5, [0.25, 0.75], 0.5, 1.5)
    assert record(0.0, 1.0).tpot is None


def test_several_tokens_in_one_message_are_one_gap():
    seen = record(0.0, 1.0, 2.0, tokens=5)
    assert (seen.itls, seen.tpot) == ([1.0], 0.25)


def test_summary():
    records = [record(0.0, 0.5, 1.0, 2.0), record(1.0, 1.25, 4.0, late=0.125), record(2.0, 2.1, error="UNAVAILABLE: x")]
    found: Any = latency.summarize(records, {"ttft": 0.5, "itl": 2.0})
    assert (found["requests"], found["failed"], found["errors"]) == (3, 1, {"UNAVAILABLE: x": 1})
    assert (found["seconds"], found["output_tokens"]) == (4.0, 5)
    assert (found["output_tokens_per_s"], found["requests_per_s"]) == (1.25, 0.5)
    assert (found["ttft_ms"]["p50"], found["ttft_ms"]["max"]) == (375.0, 500.0)
    assert (found["itl_ms"]["p50"], found["itl_ms"]["max"]) == (1000.0, 2750.0)
    assert found["client_late_ms"]["max"] == 125.0
    assert found["good_requests"] == 1 and found["goodput_requests_per_s"] == 0.25
    assert "good_requests" not in latency.summarize(records, {})


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 0.5}, True),
        ({"ttft": 0.49}, False),
        ({"itl": 1.0}, True),
        ({"itl": 0.9}, False),
        ({"tpot": 0.75}, True),
        ({"tpot": 0.7}, False),
        ({"e2e": 2.0}, True),
        ({"e2e": 1.9, "ttft": 9}, False),
        ({}, True),
    ],
)
def test_a_good_request_meets_every_limit(limits, good):
    assert record(0.0, 0.5, 1.0, 2.0).meets(limits) is good


def test_one_slow_gap_in_a_hundred_and_more_is_forgiven_and_a_failure_is_not():
    assert record(0.0, *np.cumsum([1.0] + [0.1] * 150 + [9.0])).meets({"itl": 0.5})
    assert not record(0.0, *np.cumsum([1.0] + [0.1] * 50 + [9.0])).meets({"itl": 0.5})
    assert not record(0.0, 0.1, error="x").meets({})


def test_limits():
    assert latency.parse_limits("ttft=500,itl=100") == {"ttft": 0.5, "itl": 0.1}
    assert latency.parse_limits("") == {}
    for wrong in ("ttft", "ttft=", "speed=3", "itl=-1", "itl=0", "itl=nan"):
        with pytest.raises(ValueError, match="is not a limit: write one of"):
            latency.parse_limits(wrong)


# -- arrivals and requests


def test_poisson_arrivals_are_a_function_of_the_seed_and_have_its_rate():
    times = arrivals.poisson(4.0, 4000, seed=3)
    assert times == arrivals.poisson(4.0, 4000, seed=3) != arrivals.poisson(4.0, 4000, seed=4)
    gaps = [after - before for before, after in pairwise([0.0, *times])]
    assert min(gaps) > 0
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert np.std(gaps) == pytest.approx(0.25, rel=0.08)  # of an exponential distribution: its mean
    with pytest.raises(ValueError):
        arrivals.poisson(0.0, 1, seed=0)


HEAD = "arrival_s,prompt_tokens,output_tokens,prefix_hashes\n"


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_trace(tmp_path, name):
    text = HEAD + "5.5,3,4,1 2\n4.0,7,1,\n"
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert arrivals.read_trace(file) == [arrivals.TraceRow(4.0, 7, 1), arrivals.TraceRow(5.5, 3, 4)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt_tokens,output_tokens\n1,2\n", "no column arrival_s"),
        (HEAD + "0,1,2,\n0,x,2,\n", "line 3"),
        (HEAD + "0,1\n", "line 2"),
        (HEAD + "0,0,2,\n", "at least 1 token"),
        (HEAD + "0,1,2,\n,1,2,\n", "in every row, or in none"),
    ],
)
def test_a_trace_that_is_none(tmp_path, text, words):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        arrivals.read_trace(file)


def arguments(*words: str) -> Any:
    return serve.parse(list(words))[0]


def made(*words: str, seed: int = 0) -> list[dict[str, Any]]:
    parsed = arguments(*words)
    return serve.make_requests(parsed, serve.parse_loads(parsed)[0], seed)


def test_random_requests_have_exact_lengths_and_no_prompt_in_common():
    requests = made("--concurrency", "3", "--workload", "random:16:5")
    assert [(len(request["prompt"]), request["output_tokens"]) for request in requests] == [(16, 5)] * 12
    assert requests == made("--concurrency", "3", "--workload", "random:16:5")
    others = made("--concurrency", "3", "--workload", "random:16:5", seed=1)
    assert len({tuple(request["prompt"]) for request in requests + others}) == 24
    warm = serve.warm_up(requests, serve.Load("closed", 3))
    assert len(warm) == 3 and not {tuple(r["prompt"]) for r in warm} & {tuple(r["prompt"]) for r in requests}


def test_open_loop_requests_are_due_as_poisson_says():
    requests = made("--rate", "2", "--duration", "10", "--workload", "chat", seed=5)
    assert [request["due"] for request in requests] == arrivals.poisson(2.0, 20, seed=5)
    assert len(made("--rate", "2", "--num-prompts", "7")) == 7


def test_trace_requests_keep_lengths_and_times(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(HEAD + "10,3,4,\n10.5,900,4,\n11,5,0,\n14,5,6,\n80,5,6,\n")
    words = ("--trace", str(file), "--time-scale", "2", "--max-tokens", "100", "--duration", "30")
    requests = made(*words)
    assert [(len(r["prompt"]), r["output_tokens"], r["due"]) for r in requests] == [(3, 4, 0.0), (5, 6, 2.0)]
    file.write_text(HEAD + ",3,4,\n")
    with pytest.raises(ValueError, match="no arrival times"):
        made(*words)


@pytest.mark.parametrize(
    "words",
    [("--concurrency", "0"), ("--concurrency", "1.5"), ("--rate", "x"), ("--rate", "1,-1"), ("--workload", "random:5")],
)
def test_loads_that_cannot_be(words):
    with pytest.raises(ValueError):
        made(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target", "openai"), "needs --address"),
        (("--target", "offline", "--rate", "1"), "closed loop only"),
        (("--address", "a:1", "--", "--seed", "3"), "runs already"),
        (("--rate", "1", "--concurrency", "1"), "not allowed with"),
    ],
)
def test_flags_that_do_not_go_together(words, said, capsys):
    with pytest.raises(SystemExit):
        serve.parse(list(words))
    assert said in capsys.readouterr().err


# -- sending


class Slow:
    """Answers after a time, and notes how many it has at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.open = self.most = 0

    async def generate(self, request: dict[str, Any], note: Callable[[int], None]) -> int:
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(self.seconds)
        note(1)
        self.open -= 1
        if request.get("fails"):
            raise RuntimeError("broken")
        return int(request["output_tokens"])


def test_an_open_loop_does_not_wait_for_answers():
    target = Slow(0.3)
    requests = [{"prompt": [1], "output_tokens": 1, "due": 0.01 * number} for number in range(20)]
    records = asyncio.run(load_client.open_loop(target, requests, 10))
    assert target.most > 10  # 30 answers' time lies between the first and the last
    assert [round(seen.due - records[0].due, 6) for seen in records] == [request["due"] for request in requests]
    assert all(seen.sent >= seen.due and not seen.error for seen in records)


def test_a_closed_loop_has_so_many_at_once_and_no_more():
    target = Slow(0.01)
    requests = [{"prompt": [1], "output_tokens": 1, "fails": number == 4} for number in range(10)]
    records = asyncio.run(load_client.closed_loop(target, requests, 3, 10))
    assert (len(records), target.most) == (10, 3)
    assert [seen.error for seen in records if seen.error] == ["broken"]


def test_what_is_too_late_or_too_short_has_failed():
    async def seen(request: dict[str, Any], timeout: float) -> str:
        found = Record(0.0)
        await load_client.run_one(Counts(), request, found, timeout)
        return found.error

    class Counts(Slow):
        def __init__(self) -> None:
            super().__init__(0.05)

        async def generate(self, request: dict[str, Any], note: Callable[[int], None]) -> int:
            return await super().generate(request, note) - 1

    assert asyncio.run(seen({"output_tokens": 3}, 10)) == "2 tokens came where 3 were asked for"
    assert asyncio.run(seen({"output_tokens": 3}, 0.01)) == "not complete after 0.01 s"


class Generation(pb_grpc.GenerationServicer):
    """Two tokens a message."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        count = request.sampling.max_tokens
        assert request.sampling.ignore_eos and request.sampling.temperature == 0
        if list(request.token_ids.ids) == [13]:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        yield pb.GenerateResponse(started=pb.Started(prompt_tokens=len(request.token_ids.ids)))
        for seq in range(0, count, 2):
            yield pb.GenerateResponse(output=pb.Output(seq=seq, token_ids=[1] * min(2, count - seq)))
        yield pb.GenerateResponse(finished=pb.Finished(seq=count))


def job(target: str, address: str, requests: list[dict[str, Any]]) -> dict[str, Any]:
    warm = [{"prompt": [1], "output_tokens": 2}]
    return {
        "target": target, "address": address, "model": "m", "concurrency": 2, "timeout": 10, "warm_up": warm,
        "requests": requests,
    }  # fmt: skip


REQUESTS = [{"prompt": [5, 6], "output_tokens": 5}, {"prompt": [13], "output_tokens": 5}]


def test_the_client_over_grpc(capsys):
    async def main() -> dict[str, Any]:
        server = grpc.aio.server()
        pb_grpc.add_GenerationServicer_to_server(Generation(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        answer = await load_client.run(job("quire", f"127.0.0.1:{port}", REQUESTS))
        await server.stop(None)
        return answer

    good, bad = sorted((Record(**seen) for seen in asyncio.run(main())["records"]), key=lambda seen: seen.error)
    assert (good.tokens, len(good.times), good.error) == (5, 3, "")
    assert good.due <= good.sent <= good.times[0] <= good.times[-1] <= good.end
    assert bad.error == "RESOURCE_EXHAUSTED: full"
    assert json.loads(capsys.readouterr().out) == {"started": True}


@contextlib.asynccontextmanager
async def http_server(answer: Callable[[dict[str, Any]], list[bytes]]) -> AsyncIterator[str]:
    """Sends these pieces after the request, each by itself."""

    handling = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling.add(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        with contextlib.suppress(OSError):  # a client may have seen enough
            for piece in answer(json.loads(await reader.readexactly(length))):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.002)
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*handling)


def chunks(*texts: str) -> list[bytes]:
    return [b"%x\r\n%s\r\n" % (len(text.encode()), text.encode()) for text in (*texts, "")]


def completion(body: dict[str, Any]) -> list[bytes]:
    if body["prompt"] == [13]:
        return [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 4\r\n\r\nfull"]
    assert body["stream"] and body["ignore_eos"] and body["max_tokens"]
    event = 'data: {"choices": [{"text": "é"}]}\n\n'
    usage = 'data: {"choices": [], "usage": {"completion_tokens": ' + str(body["max_tokens"]) + "}}\n\n"
    parts = [event] * (body["max_tokens"] - 2) + [event + event[:9], event[9:], usage, "data: [DONE]\n\n"]
    return [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *chunks(*parts)]


def test_the_client_over_http():
    async def main() -> dict[str, Any]:
        async with http_server(completion) as address:
            return await load_client.run(job("openai", address, REQUESTS))

    good, bad = sorted((Record(**seen) for seen in asyncio.run(main())["records"]), key=lambda seen: seen.error)
    assert (good.tokens, len(good.times), good.error) == (5, 5, "")
    assert bad.error.startswith("HTTP 400 Bad Request: b'full'")


def test_an_answer_that_is_cut_short_is_a_failure():
    def cut(body: dict[str, Any]) -> list[bytes]:
        return completion(body)[:-3] if body["prompt"] != [1] else completion(body)

    async def main() -> dict[str, Any]:
        async with http_server(cut) as address:
            return await load_client.run(job("openai", address, REQUESTS[:1]))

    (seen,) = asyncio.run(main())["records"]
    assert seen["error"]


def test_a_server_that_refuses_the_warm_up_is_told():
    async def main() -> dict[str, Any]:
        async with http_server(lambda _body: completion({"prompt": [13]})) as address:
            return await load_client.run(job("openai", address, REQUESTS))

    assert "failed: HTTP 400" in asyncio.run(main())["error"]


# -- results


def point(load: float, speed: float) -> dict[str, Any]:
    records = [record(0.0, 0.1, 0.2, 1 / speed)]
    return {"load": load, **latency.summarize(records, {"ttft": 1.0})}


def test_of_several_runs_the_one_of_median_throughput_is_drawn():
    result = {"points": [point(2, 5), point(1, 3), point(2, 9), point(2, 7)]}
    assert [(seen["load"], seen["seconds"]) for seen in plots.median_points(result)] == [(1, 0.333), (2, 0.143)]


def test_plots(tmp_path: Path):
    pytest.importorskip("matplotlib")
    result = {
        "name": "quire", "model": "m", "workload": "w", "load_unit": "requests per second",
        "points": [point(1, 3), point(2, 5)],
    }  # fmt: skip
    files = plots.draw([result, {**result, "name": "peer"}], tmp_path / "drawn")
    assert [file.name for file in files] == ["drawn.svg", "drawn.png"]
    assert all(file.stat().st_size > 1000 for file in files)


def test_a_line_shows_failures_and_cpu_time():
    found = {**point(8, 2), "run": 0, "cpu_s": {"client": 0.5, "idle": 0.0}, "errors": {"UNAVAILABLE: gone": 2}}
    text = serve.line(found)
    assert "2 failed: UNAVAILABLE: gone" in text and "client 166.667" in text and "idle" not in text
    assert len(text.splitlines()[0]) == len(serve.head({"ttft": 1.0}).splitlines()[1])
