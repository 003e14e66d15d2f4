"""One rank of a worker group, as a process: serves until its standard input ends.

Arguments: model folder, rank, size, rendezvous file. Prints its address.
"""

from __future__ import annotations

import sys

from quire.worker.config import WorkerConfig
from quire.worker.service import WorkerServer


def main(model: str, rank: str, size: str, rendezvous: str) -> None:
    config = WorkerConfig(
        model,
        rank=int(rank),
        tensor_parallel_size=int(size),
        block_size=4,
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_threads=1,
        num_gpu_blocks_override=40,
    )
    server = WorkerServer(config)
    server.connect(f"file://{rendezvous}")
    server.load()
    server.allocate(server.measure())
    print(server.serve(), flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
