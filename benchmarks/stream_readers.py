"""Clients of a controller in a process of their own: each keeps one request after another open, and times its messages.

    python -m benchmarks.stream_readers HOST:PORT --streams 32 --prompt 128 --output 512 --seconds 5

Prints one JSON object: tokens and messages received in the last `--seconds`, and the gaps between a stream's messages.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

import grpc

from quire.protos import generation_pb2 as pb
from quire.protos import generation_pb2_grpc
from quire.protos.channel import WORKER_CHANNEL_OPTIONS

WARM_UP_S = 2.0


class Readers:
    def __init__(self, stub: generation_pb2_grpc.GenerationStub, prompt: int, output: int) -> None:
        self._stub = stub
        self._prompt, self._output = prompt, output
        self._starts_at = time.perf_counter() + WARM_UP_S
        self.num_tokens = self.num_messages = 0
        self.gaps: list[float] = []

    async def read(self, number: int, count: int) -> None:
        """One request after another; the first is shorter, so that they do not all end at once."""
        length = max(2, self._output * (number + 1) // count)
        while True:
            await self._read_one(length)
            length = self._output

    async def _read_one(self, length: int) -> None:
        sampling = pb.SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
        prompt = pb.TokenIds(ids=range(3, 3 + self._prompt))
        before = None
        async for message in self._stub.Generate(pb.GenerateRequest(token_ids=prompt, sampling=sampling)):
            now = time.perf_counter()
            if message.WhichOneof("event") != "output":
                continue
            if now >= self._starts_at:
                self.num_tokens += len(message.output.token_ids)
                self.num_messages += 1
                if before is not None:
                    self.gaps.append(now - before)
            before = now


async def run(arguments: argparse.Namespace) -> dict[str, float]:
    async with grpc.aio.insecure_channel(arguments.target, options=WORKER_CHANNEL_OPTIONS) as channel:
        readers = Readers(generation_pb2_grpc.GenerationStub(channel), arguments.prompt, arguments.output)
        tasks = [asyncio.ensure_future(readers.read(i, arguments.streams)) for i in range(arguments.streams)]
        await asyncio.wait(tasks, timeout=WARM_UP_S + arguments.seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
    gaps = sorted(readers.gaps)
    return {
        "tokens": readers.num_tokens,
        "messages": readers.num_messages,
        "gap_p50_ms": gaps[len(gaps) // 2] * 1e3,
        "gap_p99_ms": gaps[int(len(gaps) * 0.99)] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0)
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
