"""How fast this rank moves blocks and computes prompts: measured once, at the start, for whoever has to choose between
the two. Neither leaves a trace in the pool."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from quire.worker.moves import BlockMover, Moves
from quire.worker.parallel import TensorParallel
from quire.worker.pool import KVPool

LINK_BYTES = 32 << 20
"""Moved each way, unless the swap space is smaller."""

FEWEST_TOKENS, MOST_TOKENS = 32, 512
"""Of the prompts that are timed."""

LONG_S, TOO_LONG_S = 0.05, 0.5
"""A prompt that takes so long says enough, if there was a shorter one; and in any case."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """0: not measured."""

    link_bytes_per_s: float = 0.0
    """Between pool and swap space, either way."""
    prefill_tokens_per_s: float = 0.0


def measure_link(mover: BlockMover, pool: KVPool) -> float:
    """Bytes per second, out and back; there is a swap space. The second time counts: memory has been taken by then."""
    count = min(mover.swap.num_slots, max(1, LINK_BYTES // pool.shape.num_bytes))
    pairs = np.repeat(np.arange(count)[:, None], 2, axis=1)
    moves, device = Moves(pairs, pairs, pairs[:0]), pool.tensor.device
    loaded = mover.load(moves, lambda ids: torch.from_numpy(ids.ravel()).to(device))
    taken = 0.0
    for _ in range(2):
        _synchronize(device)
        started = time.perf_counter()
        mover.run(loaded)
        _synchronize(device)
        taken = time.perf_counter() - started
    return 2 * count * pool.shape.num_bytes / taken


def measure_prefill(compute: Callable[[int], None], most: int, tp: TensorParallel, device: torch.device) -> float:
    """Tokens per second of a prompt, beyond what any step takes: from the two longest of some prompts, each twice as
    long as the one before, until one takes a while; `compute` runs one of so many tokens. On several ranks: on all of
    them at once."""
    lengths = [min(FEWEST_TOKENS, most)]
    times = [_time_of(compute, lengths[0])]

    def is_below(limit: float) -> bool:
        """Alike on all ranks."""
        return bool(tp.least(times[-1] < limit, device))

    while lengths[-1] < min(MOST_TOKENS, most) and is_below(LONG_S if len(times) > 1 else TOO_LONG_S):
        lengths.append(min(2 * lengths[-1], most))
        times.append(_time_of(compute, lengths[-1]))
    if is_below(LONG_S):
        # Whatever the first prompt of a length has to wait for is no part of it.
        times[-2:] = [_time_of(compute, length) for length in lengths[-2:]]
    if len(times) == 1:
        return lengths[0] / times[0]
    # Of a device that is not busy with either, the difference says nothing.
    return (lengths[-1] - lengths[-2]) / max(times[-1] - times[-2], times[-1] / 4)


def _time_of(compute: Callable[[int], None], num_tokens: int) -> float:
    started = time.perf_counter()
    compute(num_tokens)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
