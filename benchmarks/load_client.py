"""The client of benchmarks/serve.py: a process of its own that sends requests and notes when their tokens come.

Reads one JSON object from standard input, warms the server up, writes a line when the clock starts, and at the end one
JSON object with a record per request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import resource
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol
from urllib.parse import urlsplit

from benchmarks.latency import Record
from quire.cluster.cores import give_way

Note = Callable[[int], None]
"""Called with a number of tokens when they come."""
MAX_LINE = 1 << 20


class Target(Protocol):
    async def generate(self, request: dict[str, Any], note: Note) -> int:
        """Send it and read the whole answer; returns the number of tokens. Raises OSError or RuntimeError."""


# -- Quire, over gRPC


@contextlib.asynccontextmanager
async def quire_target(address: str, _model: str) -> AsyncIterator[Target]:
    import grpc

    from quire.protos import generation_pb2 as pb
    from quire.protos import generation_pb2_grpc
    from quire.protos.channel import PUBLIC_CHANNEL_OPTIONS

    async with grpc.aio.insecure_channel(address, options=PUBLIC_CHANNEL_OPTIONS) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)

        class Quire:
            async def generate(self, request: dict[str, Any], note: Note) -> int:
                sampling = pb.SamplingParams(max_tokens=request["output_tokens"], temperature=0, ignore_eos=True)
                message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=request["prompt"]), sampling=sampling)
                tokens = 0
                try:
                    async for response in stub.Generate(message):
                        if count := len(response.output.token_ids):
                            note(count)
                            tokens += count
                except grpc.aio.AioRpcError as error:
                    raise RuntimeError(f"{error.code().name}: {error.details()}") from error
                return tokens

        yield Quire()


# -- a server with OpenAI's completions API, over HTTP


@contextlib.asynccontextmanager
async def openai_target(address: str, model: str) -> AsyncIterator[Target]:
    parts = urlsplit(address)
    host, port, base = parts.hostname or "127.0.0.1", parts.port or 80, parts.path.rstrip("/")

    class OpenAI:
        async def generate(self, request: dict[str, Any], note: Note) -> int:
            body = {
                "model": model,
                "prompt": request["prompt"],
                "max_tokens": request["output_tokens"],
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            tokens = 0
            async with contextlib.aclosing(post_events(host, port, f"{base}/v1/completions", body)) as events:
                async for event in events:
                    if event.get("error"):
                        raise RuntimeError(str(event["error"]))
                    if event.get("choices"):
                        note(1)
                    if event.get("usage"):
                        tokens = event["usage"]["completion_tokens"]
            return tokens

    yield OpenAI()


async def post_events(host: str, port: int, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """Server-sent events, each a JSON object, up to [DONE]. Raises RuntimeError for another answer than 200."""
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, port, limit=MAX_LINE)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
        status = (await reader.readline()).split(None, 2)
        headers = {}
        while (line := (await reader.readline()).strip()) != b"":
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip().lower()
        if len(status) < 2 or status[1] != b"200":
            answer = await reader.read(4096)
            raise RuntimeError(f"HTTP {b' '.join(status[1:]).decode(errors='replace').strip()}: {answer[:200]!r}")
        lines = b""
        async for piece in _body(reader, chunked=headers.get(b"transfer-encoding") == b"chunked"):
            lines += piece
            *complete, lines = lines.split(b"\n")
            for line in complete:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)
        raise RuntimeError("the stream ended before [DONE]")
    except asyncio.IncompleteReadError as error:
        raise RuntimeError("the connection was closed in the middle of an answer") from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _body(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    if not chunked:
        while piece := await reader.read(1 << 16):
            yield piece
        return
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        yield (await reader.readexactly(size + 2))[:-2]


TARGETS = {"quire": quire_target, "openai": openai_target}


# -- sending


async def run_one(target: Target, request: dict[str, Any], record: Record, timeout: float) -> None:
    clock, times = time.perf_counter, record.times
    record.sent = clock()
    try:
        async with asyncio.timeout(timeout):
            record.tokens = await target.generate(request, lambda _count: times.append(clock()))
    except TimeoutError:
        record.error = f"not complete after {timeout:g} s"
    except (OSError, RuntimeError) as error:
        record.error = str(error)[:300] or type(error).__name__
    record.end = clock()
    expected = request["output_tokens"]
    if not record.error and record.tokens != expected:
        record.error = f"{record.tokens} tokens came where {expected} were asked for"


async def closed_loop(
    target: Target, requests: Sequence[dict[str, Any]], concurrency: int, timeout: float
) -> list[Record]:
    """`concurrency` users, each of whom sends the next request when the last one is answered."""
    records: list[Record] = []
    waiting = iter(requests)

    async def user() -> None:
        for request in waiting:
            records.append(record := Record(due=time.perf_counter()))
            await run_one(target, request, record, timeout)

    await asyncio.gather(*(user() for _ in range(concurrency)))
    return records


async def open_loop(target: Target, requests: Sequence[dict[str, Any]], timeout: float) -> list[Record]:
    """Every request at its own time, whatever has become of those before."""
    start = time.perf_counter()
    records, tasks = [], []
    for request in requests:
        due = start + request["due"]
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        records.append(record := Record(due))
        tasks.append(asyncio.create_task(run_one(target, request, record, timeout)))
    await asyncio.gather(*tasks)
    return records


async def run(job: dict[str, Any]) -> dict[str, Any]:
    async with TARGETS[job["target"]](job["address"], job["model"]) as target:
        warm_up = job["warm_up"]
        failed = [r.error for r in await closed_loop(target, warm_up, len(warm_up), job["timeout"]) if r.error]
        if failed:
            return {"error": f"a request to warm up failed: {failed[0]}"}
        gc.collect()
        gc.freeze()
        print(json.dumps({"started": True}), flush=True)
        cpu = _cpu_seconds()
        if job["concurrency"]:
            records = await closed_loop(target, job["requests"], job["concurrency"], job["timeout"])
        else:
            records = await open_loop(target, job["requests"], job["timeout"])
        return {"cpu_s": round(_cpu_seconds() - cpu, 3), "records": [asdict(record) for record in records]}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    give_way()  # on the server's own cores it would else interrupt it at every token, as no client elsewhere does
    print(json.dumps(asyncio.run(run(json.load(sys.stdin)))), flush=True)
