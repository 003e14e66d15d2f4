"""Moving blocks with torch: every element type, odd sizes, and only the blocks that are named."""

from __future__ import annotations

import pytest
import torch
from block_moves import DTYPES, check_moves, noise, same

from quire.kernels import blocks


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 8, 2, 16), (5, 3), (1,)])
def test_equals_the_twin(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for num_moved in (1, 2, 7):
        check_moves(blocks, shape, dtype, num_moved)


@pytest.mark.parametrize("lead", [1, 2, 3])
def test_memory_that_is_not_aligned(lead: int) -> None:
    check_moves(blocks, (16,), torch.float16, 3, lead=lead)


def test_nothing_to_move() -> None:
    pool = noise((4, 16), torch.float16, "cpu")
    before = pool.clone()
    blocks.copy_blocks(pool, torch.empty(0, 2, dtype=torch.int64))
    blocks.gather_blocks(pool, torch.empty(0, dtype=torch.int64), torch.empty(0, 16, dtype=torch.float16))
    blocks.scatter_blocks(pool, torch.empty(0, dtype=torch.int64), torch.empty(0, 16, dtype=torch.float16))
    assert same(pool, before)


def test_words_are_as_wide_as_size_and_place_allow() -> None:
    def width(block_bytes: int, lead: int) -> int:
        (words,) = blocks.as_words(noise((2, block_bytes), torch.uint8, "cpu", lead))
        assert words.shape == (2, block_bytes // words.itemsize)
        return words.itemsize

    assert [width(size, 0) for size in (16, 24, 20, 18, 17, 1)] == [8, 8, 4, 2, 1, 1]
    assert [width(32, lead) for lead in (8, 4, 6, 3)] == [8, 4, 2, 1]
