"""Swapping through pinned memory on a stream of its own, while the blocks are rewritten at once."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from quire.worker import swap
from quire.worker.swap import Chunk, CudaCopyStream, StagedSwap, SwapSpace, swap_for

GPU = torch.device("cuda")
SHAPE = (32, 2, 16, 8, 128)
"""A block of Llama 8B: 2 MiB of bfloat16."""


def move(space: SwapSpace, blocks: list[int], slots: list[int], is_out: bool) -> None:
    for start in range(0, len(slots), space.chunk):
        part = slice(start, start + space.chunk)
        ids = torch.tensor(blocks[part], dtype=torch.int32).to(GPU, non_blocking=True)
        chunk = Chunk(ids, np.array(slots[part]))
        space.out(chunk) if is_out else space.back(chunk)


@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_content_survives_whatever_is_written_meanwhile(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "_blocks_per_chunk", lambda _: chunk)
    rng = np.random.default_rng(chunk)
    num_blocks, num_slots = 64, 48
    pool = torch.empty(num_blocks, *SHAPE, dtype=dtype, device=GPU)
    rows = pool.view(torch.uint8).view(num_blocks, -1)
    space = swap_for(pool, num_slots)
    assert isinstance(space, StagedSwap)
    marks = torch.randint(0, 256, (1000, rows.shape[1]), dtype=torch.uint8, device=GPU)
    rows[:] = marks[:num_blocks]
    content = list(range(num_blocks))
    held: dict[int, int] = {}
    is_right = torch.ones((), dtype=torch.bool, device=GPU)
    next_mark = num_blocks
    for _ in range(30):
        free = rng.permutation(sorted(set(range(num_slots)) - set(held))).tolist()
        blocks = rng.permutation(num_blocks).tolist()
        count = int(rng.integers(0, len(free) + 1))
        leaving = rng.permutation(sorted(held)).tolist()[: int(rng.integers(0, len(held) + 1))]
        move(space, blocks[:count], free[:count], is_out=True)
        new = {slot: content[block] for block, slot in zip(blocks, free[:count], strict=False)}
        for block in blocks[:count]:
            rows[block] = marks[next_mark % 1000]
            content[block] = next_mark % 1000
            next_mark += 1
        targets = rng.permutation(num_blocks).tolist()[: len(leaving)]
        move(space, targets, leaving, is_out=False)
        for slot, block in zip(leaving, targets, strict=True):
            content[block] = held.pop(slot)
            is_right &= (rows[block] == marks[content[block]]).all()
        held |= new
    assert is_right.item() and torch.equal(rows, marks[content])


def test_pinned_memory_is_what_was_asked_for_and_is_given_back() -> None:
    pool = torch.randn(3, *SHAPE, device=GPU).bfloat16()
    space = StagedSwap(pool, 3, CudaCopyStream())
    assert space._slots.is_pinned() and space._slots.nbytes == pool.nbytes
    move(space, [0, 1, 2], [2, 1, 0], is_out=True)
    slots = space._slots
    del space
    gc.collect()
    assert not slots.is_pinned()
    assert torch.equal(slots.flip(0), pool.cpu())
