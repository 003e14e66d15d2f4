"""Who computes which piece of a step's attention: a list of work items, made on the device once per step and shared by
all layers that look alike.

A row's queries are cut into tiles and its context into chunks; an item is one tile against one chunk. The chunk's size
is chosen so that all items together fill the multiprocessors once or twice, whatever the mixture of lengths: one long
context beside many short ones is cut, and alone it is cut into as many pieces as there are places. Tiles whose
context was cut leave partial results in slots, which `merge` entries put together.

Chunks lie at multiples of their size from position 0. In the deterministic mode their size is fixed, so that where a
context is cut depends on nothing but positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from quire.kernels.gpu.device import Device, Variant

ITEM = 8
"""Integers per item: row (-1: no item), first query in its row, first key, end of keys, slot (-1: none)."""
MERGE = 4
"""Integers per merge: row, first query in its row, slots from here on (0: no merge)."""
COMPARED = 8192
"""Pairs of an item and a row that one program compares."""
FEWEST_ROWS = 256
"""That the kernel is compiled for: the usual batches share one form."""
ALIGNED_CHUNKS = 16
"""In the deterministic mode a row's first chunk is a multiple of this: the merge sums so many at once, and which of
them stand side by side must not depend on where a window begins."""


class Shape(NamedTuple):
    """How rows of one kind are cut; in tokens."""

    shortest: int
    """Rows with fewer new tokens are not of this kind."""
    longest: int
    queries: int
    """Of a tile."""
    keys: int
    """Of a tile."""
    window: int
    """0: none."""
    smallest_chunk: int
    chunk: int
    """0: chosen by the device."""
    places: int
    """Items per key-value head that fill the device."""


@triton.jit
def _row(
    query_starts, seq_lens, first_keys, row, known,
    SHORTEST: tl.constexpr, LONGEST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """New tokens, tokens in all, first key that any query sees, tiles of queries (0: not of our kind) and of keys."""
    start = tl.load(query_starts + row, mask=known, other=0)
    new = tl.load(query_starts + row + 1, mask=known, other=0) - start
    length = tl.load(seq_lens + row, mask=known, other=0)
    ours = known & (new >= SHORTEST) & (new <= LONGEST) & (length > 0)
    low = tl.zeros_like(length)
    if WINDOW > 0:
        low = tl.maximum(length - new - WINDOW + 1, 0)
    if first_keys is not None:
        low = tl.maximum(low, tl.load(first_keys + row, mask=known, other=0))
    return new, length, low, tl.where(ours, (new + QUERIES - 1) // QUERIES, 0), (length - low + KEYS - 1) // KEYS


@triton.jit
def _cut(length, low, tiles, chunk, ALIGNED: tl.constexpr, ELSEWHERE: tl.constexpr):
    """First chunk, number of chunks, and whether what they give is merged: with each other, or with what has been
    attended to elsewhere."""
    first_chunk = low // (chunk * ALIGNED) * ALIGNED
    splits = tl.where(tiles > 0, (length + chunk - 1) // chunk - first_chunk, 0)
    is_merged = splits > 1
    if ELSEWHERE:
        is_merged = is_merged | (low > 0)
    return first_chunk, splits, is_merged


# What changes from step to step must not make the compiler start again.
@triton.jit(do_not_specialize=["num_rows", "num_items", "num_slots"])
def list_work(
    query_starts,
    seq_lens,
    first_keys,  # [B] or None: keys before this position are attended to elsewhere
    items,  # [num_items, ITEM]
    merges,  # [num_slots, MERGE]
    num_rows,
    num_items,
    num_slots,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SMALLEST_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACES: tl.constexpr,
    ALIGNED: tl.constexpr,  # chunks
    ROWS: tl.constexpr,  # a power of two, at least num_rows
    PROGRAM: tl.constexpr,
    ITEM: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Each program works out how all rows are cut, which is little, and writes its own part of the lists."""
    row = tl.arange(0, ROWS)
    new, length, low, tiles, span = _row(
        query_starts, seq_lens, first_keys, row, row < num_rows, SHORTEST, LONGEST, QUERIES, KEYS, WINDOW
    )
    chunk = CHUNK
    if CHUNK == 0:
        share = (tl.sum(tiles * span, 0) + PLACES - 1) // PLACES * KEYS
        # In round sizes: contexts are often round too, and a leftover is an item like any other.
        chunk = tl.maximum((share + SMALLEST_CHUNK - 1) // SMALLEST_CHUNK, 1) * SMALLEST_CHUNK
    first_chunk, splits, is_merged = _cut(length, low, tiles, chunk, ALIGNED, first_keys is not None)
    count = tiles * splits
    slots = tl.where(is_merged, count, 0)
    end = tl.cumsum(count, 0)
    all_slots = tl.sum(slots, 0)

    index = tl.program_id(0) * PROGRAM + tl.arange(0, PROGRAM)
    # The row of item i is the number of rows whose items end at or before it.
    before = end[None, :] <= index[:, None]
    owner = tl.sum(before.to(tl.int32), 1)
    place = index - tl.sum(tl.where(before, count[None, :], 0), 1)
    slot = tl.sum(tl.where(before, slots[None, :], 0), 1) + place
    exists = owner < num_rows
    new, length, low, tiles, span = _row(
        query_starts, seq_lens, first_keys, owner, exists, SHORTEST, LONGEST, QUERIES, KEYS, WINDOW
    )
    first_chunk, splits, is_merged = _cut(length, low, tiles, chunk, ALIGNED, first_keys is not None)
    splits = tl.maximum(splits, 1)
    split = place % splits

    # The last queries see the most keys: they go first.
    first_query = (tiles - 1 - place // splits) * QUERIES
    past = length - new
    first_key = tl.maximum(low, (first_chunk + split) * chunk)
    if WINDOW > 0:
        first_key = tl.maximum(first_key, past + first_query - WINDOW + 1)
    end_key = tl.minimum(past + tl.minimum(first_query + QUERIES, new), (first_chunk + split + 1) * chunk)
    item = items + index * ITEM
    inside = index < num_items
    tl.store(item, tl.where(exists, owner, -1), mask=inside)
    tl.store(item + 1, first_query, mask=inside)
    tl.store(item + 2, first_key, mask=inside)
    tl.store(item + 3, end_key, mask=inside)
    tl.store(item + 4, tl.where(is_merged, slot, -1), mask=inside)

    merge = merges + slot * MERGE
    leads = exists & inside & is_merged & (slot < num_slots)
    tl.store(merge, owner, mask=leads)
    tl.store(merge + 1, first_query, mask=leads)
    tl.store(merge + 2, tl.where(split == 0, splits, 0), mask=leads)
    unused = (index >= all_slots) & (index < num_slots)
    tl.store(merges + index * MERGE + 2, tl.zeros([PROGRAM], tl.int32), mask=unused)


def count_work(
    query_starts: np.ndarray, seq_lens: np.ndarray, first_keys: np.ndarray | None, shape: Shape, aligned: int
) -> tuple[int, int]:
    """How many items and slots `list_work` will fill: the same sums on the host."""
    new, length = np.diff(query_starts), seq_lens.astype(np.int64)
    ours = (new >= shape.shortest) & (new <= shape.longest) & (length > 0)
    new, length = new[ours], length[ours]
    low = np.maximum(length - new - shape.window + 1, 0) if shape.window else np.zeros_like(length)
    if first_keys is not None:
        low = np.maximum(low, first_keys[ours])
    tiles = -(-new // shape.queries)
    chunk = shape.chunk
    if not chunk:
        total = int((tiles * -(-(length - low) // shape.keys)).sum())
        share = -(-total // shape.places) * shape.keys
        chunk = max(-(-share // shape.smallest_chunk), 1) * shape.smallest_chunk
    splits = -(-length // chunk) - low // (chunk * aligned) * aligned
    merged = (splits > 1) | (low > 0 if first_keys is not None else False)
    return int((tiles * splits).sum()), int((tiles * splits)[merged].sum())


@dataclass(frozen=True, slots=True)
class WorkList:
    shape: Shape
    aligned: int
    """Chunks that a row's first chunk is a multiple of."""
    items: torch.Tensor
    """[num_items, ITEM] int32."""
    merges: torch.Tensor
    """[num_slots, MERGE] int32."""


def make_work(
    query_starts: torch.Tensor,  # [B + 1] int32, on the device
    seq_lens: torch.Tensor,  # [B] int32
    first_keys: torch.Tensor | None,  # [B] int32
    shape: Shape,
    aligned: int,
    num_items: int,
    num_slots: int,
) -> WorkList:
    items = torch.empty(num_items, ITEM, dtype=torch.int32, device=seq_lens.device)
    merges = torch.empty(num_slots, MERGE, dtype=torch.int32, device=seq_lens.device)
    work = WorkList(shape, aligned, items, merges)
    fill_work(work, query_starts, seq_lens, first_keys)
    return work


def fill_work(
    work: WorkList, query_starts: torch.Tensor, seq_lens: torch.Tensor, first_keys: torch.Tensor | None
) -> None:
    """In place; what a recorded graph does again at each replay."""
    num_items, num_slots = len(work.items), len(work.merges)
    padded = max(FEWEST_ROWS, triton.next_power_of_2(len(seq_lens)))
    program = max(1, min(32, COMPARED // padded))
    list_work[(triton.cdiv(max(num_items, num_slots), program),)](
        query_starts, seq_lens, first_keys, work.items, work.merges, len(seq_lens), num_items, num_slots,
        *work.shape, work.aligned, padded, program, ITEM, MERGE, num_warps=8,
    )  # fmt: skip


def variants(device: Device) -> list[Variant]:  # noqa: ARG001
    def variant(name: str, shape: Shape, rows: int, first_keys: torch.dtype | None = None) -> Variant:
        i32 = torch.int32
        program = min(32, COMPARED // rows)
        arguments = (i32, i32, first_keys, i32, i32, rows, 500, 300, *shape, 1, rows, program, ITEM, MERGE)
        names = list_work.arg_names
        return Variant(f"work list: {name}", list_work, dict(zip(names, arguments, strict=True)), num_warps=8)

    decode = Shape(1, 1, 1, 64, 0, 256, 0, 66)
    prefill = Shape(2, 1 << 30, 32, 64, 4096, 512, 0, 33)
    return [
        variant("decode, 256 rows", decode, 256),
        variant("decode, 256 rows, cascade", decode, 256, torch.int32),
        variant("prefill, window, 256 rows", prefill, 256),
        variant("1,024 rows", decode, 1024),
    ]
