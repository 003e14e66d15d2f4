"""A rank that serves the hash model, as a process: prints address and incarnation, ends with its standard input."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hash_model import load_hash_decoder

from quire.worker.config import WorkerConfig
from quire.worker.service import WorkerServer


def main(rank: str) -> None:
    # Of a group of one: hash ranks need no collectives, so each can be made to fail alone.
    config = WorkerConfig(
        "", block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64, num_threads=1,
        num_gpu_blocks_override=32,
    )  # fmt: skip
    server = WorkerServer(config, loader=load_hash_decoder)
    server.load()
    server.allocate(server.measure())
    print(server.serve(), server.describe().incarnation, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
