"""The kernel that moves blocks against the naive twins: odd sizes, several chunks, a pool past 2^31 words."""

from __future__ import annotations

import pytest
import torch
from block_moves import DTYPES, check_moves, noise, same
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import blocks as public
from quire.kernels import dispatch
from quire.kernels.gpu import blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FILE = "kernels/gpu/blocks.py"
BUGS = [
    ("last word missing", FILE, "inside = at < WORDS", "inside = at < WORDS - 1", "test_sizes_around_a_chunk"),
    ("written past the block", FILE, "inside = at < WORDS", "inside = at < WORDS + 1", "test_sizes_around_a_chunk"),
    ("chunks overlap", FILE, "% CHUNKS * CHUNK", "% CHUNKS * (CHUNK - 1)", "test_sizes_around_a_chunk"),
    ("source and destination exchanged", FILE, "pairs[:, 1], pairs[:, 0]", "pairs[:, 0], pairs[:, 1]",
     "test_equals_the_twin"),
    ("pairs taken for ids", FILE, "source_ids + index * ID_STRIDE", "source_ids + index", "test_equals_the_twin"),
    ("always the first destination", FILE, "target_ids + index * ID_STRIDE", "target_ids", "test_equals_the_twin"),
    ("unmasked chunk not stored", FILE, "tl.store(target + to * WORDS + at, tl.load(source + origin * WORDS + at))",
     "pass", "test_sizes_around_a_chunk"),
    ("offsets of 32 bits", FILE, "origin = tl.load(source_ids + index * ID_STRIDE).to(tl.int64)",
     "origin = tl.load(source_ids + index * ID_STRIDE).to(tl.int32)", "test_blocks_past_two_gigabytes"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 8, 2, 16), (5, 3), (1,)])
def test_equals_the_twin(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for num_moved in (1, 2, 7):
        check_moves(blocks, shape, dtype, num_moved, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_sizes_around_a_chunk(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 256)
    chunk = 256 // dtype.itemsize
    for size in (chunk - 1, chunk, chunk + 1, 3 * chunk, 3 * chunk + 8):
        check_moves(blocks, (size,), dtype, 2, DEVICE)


@given(size=st.integers(1, 300), num_moved=st.integers(1, 4), lead=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_any_size_and_place(size: int, num_moved: int, lead: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CHUNK_BYTES", 64)
        check_moves(blocks, (size,), torch.uint8, num_moved, DEVICE, lead)


def test_chunks_as_shipped() -> None:
    check_moves(blocks, (2, 2, 16, 2, 64), torch.float32, 1, DEVICE)


def test_nothing_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "move_kernel", None)
    pool = torch.zeros(4, 16, device=DEVICE)
    ids, staging = torch.empty(0, dtype=torch.int64, device=DEVICE), torch.empty(0, 16, device=DEVICE)
    blocks.copy_blocks(pool, ids.view(0, 2))
    blocks.gather_blocks(pool, ids, staging)
    blocks.scatter_blocks(pool, ids, staging)


def test_blocks_past_two_gigabytes() -> None:
    """In the upper half of memory twice as large, so that an offset that turns negative finds zeros. Only the pages
    that are touched are really there."""
    size = 65537
    count = (1 << 31) // size + 3
    pool = torch.empty(2 * count, size, dtype=torch.uint8, device=DEVICE)[count:]
    pool[-1] = pattern = noise((size,), torch.uint8, DEVICE)
    pool[:2] = 0
    blocks.copy_blocks(pool, torch.tensor([[count - 1, 1]], device=DEVICE))
    assert same(pool[1], pattern) and not pool[0].any()
    staging = torch.zeros(1, size, dtype=torch.uint8, device=DEVICE)
    blocks.scatter_blocks(pool, torch.tensor([count - 1], device=DEVICE), staging)
    assert not pool[-1].any() and same(pool[1], pattern)


@pytest.mark.parametrize("name", ["copy_blocks", "gather_blocks", "scatter_blocks"])
def test_what_is_on_a_gpu_is_moved_by_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[torch.Tensor, ...]] = []
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    monkeypatch.setattr(blocks, name, lambda *arguments: calls.append(arguments))
    arguments = [torch.zeros(1), torch.zeros(1), torch.zeros(1)][: 2 if name == "copy_blocks" else 3]
    getattr(public, name)(*arguments)
    (got,) = calls
    assert len(got) == len(arguments) and all(a is b for a, b in zip(got, arguments, strict=True))
