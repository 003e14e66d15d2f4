"""Blocks that leave the pool and come back, bit for bit, whatever has been written in their place meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from late_copies import LateCopies
from worker_plans import plan

from quire.kernels.blocks import scatter_blocks
from quire.worker import swap
from quire.worker.checks import PlanError
from quire.worker.moves import BlockMover, Loaded, Moves
from quire.worker.swap import CHUNKS, DirectSwap, NoSwap, StagedSwap, SwapSpace, staging_bytes, swap_for

SHAPE = (3, 2, 4, 2, 8)
NUM_BLOCKS, NUM_SLOTS = 12, 9
Make = Callable[[torch.Tensor], SwapSpace]


def direct(pool: torch.Tensor) -> SwapSpace:
    return DirectSwap(pool, NUM_SLOTS)


def watched(pool: torch.Tensor, stream: LateCopies, patch: pytest.MonkeyPatch) -> SwapSpace:
    """Copies are late, and what is scattered is known to be read."""

    def scatter(pool: torch.Tensor, ids: torch.Tensor, source: torch.Tensor) -> None:
        stream.read(source)
        scatter_blocks(pool, ids, source)

    patch.setattr(swap, "scatter_blocks", scatter)
    return StagedSwap(pool, NUM_SLOTS, stream)


@pytest.fixture(params=["direct", 1, 2, 100])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Of the staged form, by the blocks that move together."""
    if request.param == "direct":
        return direct
    monkeypatch.setattr(swap, "_blocks_per_chunk", lambda _: request.param)
    return lambda pool: watched(pool, LateCopies(), monkeypatch)


def any_bits(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(shape)


def bits(x: torch.Tensor) -> list[int]:
    return x.contiguous().view(torch.uint8).flatten().tolist()


def load(mover: BlockMover, out: list = [], back: list = [], copies: list = []) -> Loaded:
    moves = mover.check(plan(swap_out=out, swap_in=back, copies=copies))
    assert isinstance(moves, Moves)
    return mover.load(moves, lambda ids: torch.from_numpy(ids.flatten()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_content_comes_back_into_other_blocks(make: Make, dtype: torch.dtype) -> None:
    pool = any_bits(NUM_BLOCKS, *SHAPE, dtype=dtype)
    before = pool.clone()
    mover = BlockMover(pool, make(pool))
    mover.run(load(mover, out=[(0, 4), (7, 5), (3, 6), (9, 0), (11, 8)]))
    pool.view(torch.uint8).fill_(77)  # rewritten at once
    mover.run(load(mover, back=[(6, 1), (0, 2), (8, 3)]))
    mover.run(load(mover, back=[(4, 11), (5, 0)]))
    for origin, now in ((3, 1), (9, 2), (11, 3), (0, 11), (7, 0)):
        assert bits(pool[now]) == bits(before[origin])
    assert (pool[4:11].view(torch.uint8) == 77).all()


def test_out_then_in_then_copies(make: Make) -> None:
    """In one step a block may leave, take another's content, and be copied."""
    pool = any_bits(NUM_BLOCKS, *SHAPE)
    mover = BlockMover(pool, make(pool))
    mover.run(load(mover, out=[(5, 3)]))
    fifth, second = pool[5].clone(), pool[2].clone()
    pool[5] = 0
    mover.run(load(mover, out=[(2, 7), (1, 8)], back=[(3, 2)], copies=[(2, 4), (2, 6), (1, 0)]))
    assert all(bits(pool[i]) == bits(fifth) for i in (2, 4, 6)) and bits(pool[0]) == bits(pool[1])
    mover.run(load(mover, back=[(7, 9)]))
    assert bits(pool[9]) == bits(second)


@pytest.mark.parametrize("seed", range(4))
def test_a_long_life(make: Make, seed: int) -> None:
    """Blocks are rewritten as soon as they have left, slots are taken again, and copies lag."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    pool = any_bits(NUM_BLOCKS, *SHAPE)
    mover = BlockMover(pool, make(pool))
    held: dict[int, torch.Tensor] = {}
    num_back = 0
    for _ in range(60):
        free = rng.permutation(sorted(set(range(NUM_SLOTS)) - set(held)))
        blocks = rng.permutation(NUM_BLOCKS)
        count = int(rng.integers(0, len(free) + 1))
        out = list(zip(blocks[:count].tolist(), free[:count].tolist(), strict=True))
        leaving = rng.permutation(sorted(held))[: int(rng.integers(0, len(held) + 1))].tolist()
        back = list(zip(leaving, rng.permutation(NUM_BLOCKS)[: len(leaving)].tolist(), strict=True))
        contents = {slot: pool[block].clone() for block, slot in out}
        mover.run(load(mover, out=out, back=back))
        for slot, block in back:
            assert bits(pool[block]) == bits(held.pop(slot))
            num_back += 1
        held |= contents
        for block in rng.permutation(NUM_BLOCKS)[:6].tolist():
            pool[block] = any_bits(*SHAPE)
    assert num_back > 40


@pytest.mark.parametrize("missing", ["copies before gather or scatter", "gathered before a copy", "scattered before"])
def test_the_late_stream_notices(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the check: without one kind of fence the same life fails."""
    monkeypatch.setattr(swap, "_blocks_per_chunk", lambda _: 1)

    class Careless(LateCopies):
        def compute_after(self, fence: tuple[str, int]) -> None:
            if missing != "copies before gather or scatter":
                super().compute_after(fence)

        def copy_after(self, fence: tuple[str, int]) -> None:
            is_newest = fence[1] == self._clock
            if missing != ("gathered before a copy" if is_newest else "scattered before"):
                super().copy_after(fence)

    with pytest.raises(AssertionError):
        for seed in range(4):
            test_a_long_life(lambda pool: watched(pool, Careless(), monkeypatch), seed)


def test_consecutive_slots_are_one_copy() -> None:
    pool = any_bits(NUM_BLOCKS, *SHAPE)
    stream = LateCopies()
    mover = BlockMover(pool, StagedSwap(pool, NUM_SLOTS, stream))
    mover.run(load(mover, out=[(8, 2), (1, 3), (5, 4), (6, 7), (2, 0)]))
    assert stream.num_copies == 3


def test_staging_is_bounded() -> None:
    assert staging_bytes(1 << 20) == 64 << 20
    assert staging_bytes(100 << 20) == CHUNKS * (100 << 20)
    assert staging_bytes(3_000_001) == CHUNKS * 5 * 3_000_001


def test_the_form_follows_the_device() -> None:
    pool = any_bits(2, *SHAPE)
    assert isinstance(swap_for(pool, 2), DirectSwap) and isinstance(swap_for(pool, 0), NoSwap)


IMPOSSIBLE = [
    (dict(swap_out=[(12, 0)]), "block id 12 is not in 0 to 11"),
    (dict(swap_out=[(-1, 0)]), "block id -1"),
    (dict(swap_out=[(0, 9)]), "swap slot 9 is not in 0 to 8"),
    (dict(swap_out=[(0, 1), (2, 1)]), "swap slot 1 is written 2 times"),
    (dict(swap_in=[(0, 12)]), "block id 12"),
    (dict(swap_in=[(-1, 0)]), "swap slot -1"),
    (dict(swap_in=[(5, 1)]), "swap slot 5 is read but holds nothing"),
    (dict(swap_in=[(4, 1), (4, 2)]), "swap slot 4 is read 2 times"),
    (dict(swap_in=[(4, 1), (3, 1)]), "block 1 is swapped in 2 times"),
    (dict(copies=[(0, 12)]), "block id 12"),
    (dict(copies=[(0, 1), (2, 1)]), "block 1 is a copy's destination 2 times"),
    (dict(copies=[(0, 1), (1, 2)]), "block 1 is both source and destination"),
    (dict(copies=[(3, 3)]), "block 3 is both source and destination"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_impossible_moves_are_refused(change: dict, message: str) -> None:
    pool = any_bits(NUM_BLOCKS, *SHAPE)
    before = pool.clone()
    mover = BlockMover(pool, direct(pool))
    mover.run(load(mover, out=[(0, 3), (1, 4)]))
    with pytest.raises(PlanError, match=message):
        mover.check(plan(**change))
    assert bits(pool) == bits(before)


def test_a_slot_is_read_once_and_forgotten_by_the_next_controller() -> None:
    pool = any_bits(NUM_BLOCKS, *SHAPE)
    mover = BlockMover(pool, direct(pool))
    mover.run(load(mover, out=[(0, 3), (1, 4)]))
    mover.run(load(mover, back=[(3, 7)]))
    with pytest.raises(PlanError, match="swap slot 3 is read but holds nothing"):
        load(mover, back=[(3, 7)])
    mover.clear()
    with pytest.raises(PlanError, match="swap slot 4 is read but holds nothing"):
        load(mover, back=[(4, 7)])


def test_what_two_groups_share_goes_to_a_slot_of_each() -> None:
    pool = any_bits(NUM_BLOCKS, *SHAPE)
    mover = BlockMover(pool, direct(pool))
    mover.run(load(mover, out=[(5, 0), (5, 1)]))
    mover.run(load(mover, back=[(0, 2), (1, 3)]))
    assert bits(pool[2]) == bits(pool[3]) == bits(pool[5])


def test_without_a_swap_space_nothing_can_be_swapped() -> None:
    pool = any_bits(NUM_BLOCKS, *SHAPE)
    mover = BlockMover(pool, NoSwap())
    for change in (dict(swap_out=[(0, 0)]), dict(swap_in=[(0, 0)])):
        with pytest.raises(PlanError, match="this worker has no swap space"):
            mover.check(plan(**change))
    mover.run(load(mover, copies=[(0, 1)]))
    assert bits(pool[1]) == bits(pool[0])
