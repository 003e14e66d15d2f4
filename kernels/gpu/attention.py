"""Paged attention in Triton: FlashAttention's online softmax over block tables, one kernel in three specialisations.

All query heads of a key-value head stand in one tile beside each other, so that keys and values are read once for the
group and the products run on the matrix units even when each row brings a single token.

- decode: a tile is the group of one token; 16 rows. Contexts are cut into chunks (gpu/work.py) and merged.
- prefill: a tile is as many tokens as fill 128 rows, which makes Hopper use its own matrix instructions. Cut only when
  there are too few tiles to fill the device.
- shared prefix: a tile is the groups of several rows of one token each that begin with the same blocks; what it finds
  is merged with what each row finds in the rest of its context (cascade).

Tiles of keys are independent of the block size: each key's block is looked up by itself, a 64-bit base per key, offsets
inside a block in 32 bits. Where every query of a tile sees every key of a tile no mask is computed. Exponentials are to
base 2, the logarithm's factor folded into the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from quire.kernels.attention import PagedRows
from quire.kernels.gpu import tuning
from quire.kernels.gpu.device import Device, Variant, device_for
from quire.kernels.gpu.float8 import E4M3_SCALE, decode_e4m3
from quire.kernels.gpu.tuning import Tile
from quire.kernels.gpu.work import ALIGNED_CHUNKS, ITEM, MERGE, Shape, WorkList, count_work, make_work
from quire.kernels.gpu.work import variants as work_variants
from quire.kernels.shared_prefix import FEWEST_ROWS, FEWEST_TOKENS

LOG2_E = tl.constexpr(math.log2(math.e))
E4M3_FACTOR = tl.constexpr(E4M3_SCALE)
EVERYTHING = 1 << 30
"""More tokens than any row has."""
MERGED = 16
"""Partial results that a merge sums at once."""
assert MERGED == ALIGNED_CHUNKS

LARGEST_GROUP = 128
"""Query heads of a key-value head: a tile holds them all."""


@triton.jit
def _load(element, inside, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, MASKED: tl.constexpr):
    """[KEYS, DIMS] from the pool, with no mask where none is needed: nothing then stands between load and product."""
    is_dim = (tl.arange(0, DIMS) < HEAD_DIM)[None, :]
    if MASKED and HEAD_DIM < DIMS:
        return tl.load(element, mask=inside[:, None] & is_dim, other=0)
    elif MASKED:
        return tl.load(element, mask=inside[:, None], other=0)
    elif HEAD_DIM < DIMS:
        return tl.load(element, mask=is_dim, other=0)
    else:
        return tl.load(element)


@triton.jit
def _tile(
    acc, top, total, q, kv, block, slope, start, low, high, position, scale,
    block_stride, half_stride, token_stride,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    FLOAT8: tl.constexpr, NATIVE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys start <= key < start + KEYS, which lie in blocks `block` [KEYS]. Masked: only those with
    low <= key < high are read, and each query sees those that are not after it and inside its window."""
    key = start + tl.arange(0, KEYS)
    dim = tl.arange(0, DIMS)
    inside = (key >= low) & (key < high)
    slot = kv + block.to(tl.int64) * block_stride + (key % BLOCK) * token_stride
    element = slot[:, None] + dim[None, :]
    k = _load(element, inside, HEAD_DIM, DIMS, MASKED)
    if FLOAT8:
        k = decode_e4m3(k, NATIVE)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if slope is not None:
        # The scale may come first: with slopes it cannot be folded into the exponent.
        score = score * scale + slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        scale = 1.0
    if MASKED:
        seen = inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        score = tl.where(seen, score, float("-inf"))
    highest = tl.maximum(top, tl.max(score, 1) * scale)
    base = highest
    if MASKED:
        # A query that has seen nothing yet: its weights are zeros, not 0 / 0.
        base = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(score * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weight, 1)
    acc = acc * shrink[:, None]
    element += half_stride
    v = _load(element, inside, HEAD_DIM, DIMS, MASKED)
    if FLOAT8:
        v = decode_e4m3(v, NATIVE)
    acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
    return acc, highest, total


@triton.jit
def _blocks(table, start, low, high, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Block of each key from `start` on; 0 for those outside low <= key < high, whose entries may be anything."""
    key = start + tl.arange(0, KEYS)
    return tl.load(table + key // BLOCK, mask=(key >= low) & (key < high), other=0)


@triton.jit(do_not_specialize=["table_stride"])
def attend(
    q,  # [T, Hq, D]
    kv,  # [N, 2, block, Hkv, D]
    out,  # [T, Hq, D], contiguous
    partial,  # [num_slots, Hkv, ROWS, D] float32
    partial_log,  # [num_slots, Hkv, ROWS] float32: base-2 logarithm of the sum of the weights
    block_tables,  # [B, M]
    query_starts,  # [B + 1]
    seq_lens,  # [B]
    items,  # [num_items, ITEM]
    members,  # [n] or None: rows of one token, by group; an item's row is then an index into them
    slopes,  # [Hq] or None
    kv_scales,  # [2, Hkv] or None
    scale,
    q_token_stride,
    q_head_stride,
    block_stride,
    half_stride,
    token_stride,
    head_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per key-value head
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # the power of two from HEAD_DIM on
    BLOCK: tl.constexpr,  # tokens
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile
    KEYS: tl.constexpr,  # of a tile
    QUERIES: tl.constexpr,  # tokens of a tile
    FLOAT8: tl.constexpr,
    NATIVE: tl.constexpr,  # the GPU converts float8 itself
    ALWAYS_MASKED: tl.constexpr,
    ITEM: tl.constexpr,
):
    head = tl.program_id(0) % KV_HEADS
    item = items + tl.program_id(0) // KV_HEADS * ITEM
    row = tl.load(item)
    if row < 0:
        return
    first_query = tl.load(item + 1)
    first_key = tl.load(item + 2)
    end_key = tl.load(item + 3)
    slot = tl.load(item + 4)

    index = tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    if members is not None:
        # `first_query` is the place of the tile's first member, and the item's sixth field the number of members.
        count = tl.load(item + 5)
        filled = index < tl.minimum(count, QUERIES) * GROUP
        member = tl.load(members + first_query + index // GROUP, mask=filled, other=0)
        token = tl.load(query_starts + member, mask=filled, other=0)
        position = tl.load(seq_lens + member, mask=filled, other=1) - 1
        free_end = end_key
        free_start = first_key
    else:
        token_start = tl.load(query_starts + row)
        new = tl.load(query_starts + row + 1) - token_start
        past = tl.load(seq_lens + row) - new
        last_query = tl.minimum(first_query + QUERIES, new) - 1
        query = tl.minimum(first_query + index // GROUP, last_query)
        filled = (index < QUERIES * GROUP) & (first_query + index // GROUP < new)
        token = token_start + query
        position = past + query
        free_end = tl.minimum(end_key, past + first_query + 1)
        free_start = first_key
        if WINDOW > 0:
            free_start = tl.maximum(first_key, past + last_query - WINDOW + 1)
    q_head = head * GROUP + index % GROUP
    table = block_tables + row.to(tl.int64) * table_stride
    base = kv + head * head_stride
    element = token.to(tl.int64) * q_token_stride + q_head * q_head_stride
    queries = tl.load(q + element[:, None] + dim[None, :], mask=filled[:, None] & (dim < HEAD_DIM)[None, :], other=0)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + q_head, mask=filled, other=0.0) * LOG2_E
    v_scale = 1.0
    if FLOAT8:
        queries = queries.to(tl.float16)
        scale = scale * E4M3_FACTOR
        v_scale = E4M3_FACTOR
    if kv_scales is not None:
        scale = scale * tl.load(kv_scales + head)
        v_scale = v_scale * tl.load(kv_scales + KV_HEADS + head)

    acc = tl.zeros([ROWS, DIMS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    start = first_key
    if WINDOW > 0 or ALWAYS_MASKED:
        start = first_key // KEYS * KEYS
    if ALWAYS_MASKED:
        block = _blocks(table, start, first_key, end_key, KEYS, BLOCK)
        for at in tl.range(start, end_key, KEYS):
            following = _blocks(table, at + KEYS, first_key, end_key, KEYS, BLOCK)
            acc, top, total = _tile(
                acc, top, total, queries, base, block, slope, at, first_key, end_key, position, scale,
                block_stride, half_stride, token_stride, HEAD_DIM, DIMS, KEYS, BLOCK, WINDOW, FLOAT8, NATIVE, True,
            )  # fmt: skip
            block = following
    else:
        free_start = start + (free_start - start + KEYS - 1) // KEYS * KEYS
        free_stop = free_start + tl.maximum(free_end - free_start, 0) // KEYS * KEYS
        if WINDOW > 0:
            for at in tl.range(start, tl.minimum(free_start, end_key), KEYS, num_stages=1):
                block = _blocks(table, at, first_key, end_key, KEYS, BLOCK)
                acc, top, total = _tile(
                    acc, top, total, queries, base, block, slope, at, first_key, end_key, position, scale,
                    block_stride, half_stride, token_stride, HEAD_DIM, DIMS, KEYS, BLOCK, WINDOW, FLOAT8, NATIVE, True,
                )  # fmt: skip
        block = _blocks(table, free_start, first_key, end_key, KEYS, BLOCK)
        for at in tl.range(free_start, free_stop, KEYS):
            following = _blocks(table, at + KEYS, first_key, end_key, KEYS, BLOCK)
            acc, top, total = _tile(
                acc, top, total, queries, base, block, slope, at, first_key, end_key, position, scale,
                block_stride, half_stride, token_stride, HEAD_DIM, DIMS, KEYS, BLOCK, WINDOW, FLOAT8, NATIVE, False,
            )  # fmt: skip
            block = following
        for at in tl.range(free_stop, end_key, KEYS, num_stages=1):
            block = _blocks(table, at, first_key, end_key, KEYS, BLOCK)
            acc, top, total = _tile(
                acc, top, total, queries, base, block, slope, at, first_key, end_key, position, scale,
                block_stride, half_stride, token_stride, HEAD_DIM, DIMS, KEYS, BLOCK, WINDOW, FLOAT8, NATIVE, True,
            )  # fmt: skip

    divisor = tl.where(total == 0.0, 1.0, total)
    acc = acc * (v_scale / divisor)[:, None]
    stored = filled[:, None] & (dim < HEAD_DIM)[None, :]
    if slot < 0:
        place = (token.to(tl.int64) * (KV_HEADS * GROUP) + q_head) * HEAD_DIM
        tl.store(out + place[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=stored)
    else:
        part = (slot.to(tl.int64) * KV_HEADS + head) * ROWS + index
        tl.store(partial + (part * HEAD_DIM)[:, None] + dim[None, :], acc, mask=stored)
        # Where nothing was seen, `top` is minus infinity: the merge gives it no weight.
        tl.store(partial_log + part, top + tl.log2(divisor), mask=filled)


@triton.jit
def _add_partials(
    acc, top, total, partial, partial_log, first, count, head, row,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, DIMS)
    for at in tl.range(0, count, MERGED):
        index = at + tl.arange(0, MERGED)
        exists = index < count
        part = ((first + index).to(tl.int64) * KV_HEADS + head) * ROWS + row
        log = tl.load(partial_log + part, mask=exists, other=float("-inf"))
        value = tl.load(
            partial + (part * HEAD_DIM)[:, None] + dim[None, :],
            mask=exists[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        highest = tl.maximum(top, tl.max(log, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(log - base)
        shrink = tl.exp2(top - base)
        acc = acc * shrink + tl.sum(weight[:, None] * value, 0)
        total = total * shrink + tl.sum(weight, 0)
        top = highest
    return acc, top, total


@triton.jit
def merge(
    out,  # [T, Hq, D], contiguous
    partial,  # [num_slots, Hkv, ROWS, D]
    partial_log,
    shared,  # the same of shared prefixes, or None
    shared_log,
    merges,  # [num_slots, MERGE]
    shared_parts,  # [B, 3] or None: per row its first slot, slots and place in the tile of its group
    query_starts,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    MERGED: tl.constexpr,
    MERGE: tl.constexpr,
):
    """One head of one token: the sum of its partial results, weighted, in the order of the context."""
    slot = tl.program_id(0)
    splits = tl.load(merges + slot * MERGE + 2)
    if splits == 0:
        return
    row = tl.load(merges + slot * MERGE)
    query = tl.load(merges + slot * MERGE + 1) + tl.program_id(1) // (KV_HEADS * GROUP)
    token = tl.load(query_starts + row) + query
    if token >= tl.load(query_starts + row + 1):
        return
    q_head = tl.program_id(1) % (KV_HEADS * GROUP)
    head = q_head // GROUP
    dim = tl.arange(0, DIMS)
    acc = tl.zeros([DIMS], tl.float32)
    top = float("-inf")
    total = 0.0
    if shared_parts is not None:
        first = tl.load(shared_parts + row * 3)
        count = tl.load(shared_parts + row * 3 + 1)
        place = tl.load(shared_parts + row * 3 + 2) * GROUP + q_head % GROUP
        acc, top, total = _add_partials(
            acc, top, total, shared, shared_log, first, count, head, place,
            KV_HEADS, HEAD_DIM, DIMS, SHARED_ROWS, MERGED,
        )  # fmt: skip
    place = tl.program_id(1) // (KV_HEADS * GROUP) * GROUP + q_head % GROUP
    acc, top, total = _add_partials(
        acc, top, total, partial, partial_log, slot, splits, head, place, KV_HEADS, HEAD_DIM, DIMS, ROWS, MERGED
    )
    where = (token.to(tl.int64) * (KV_HEADS * GROUP) + q_head) * HEAD_DIM + dim
    tl.store(out + where, (acc / total).to(out.dtype.element_ty), mask=dim < HEAD_DIM)


def padded_dim(head_dim: int) -> int:
    """Of a head in a tile: a power of two, and no less than the matrix units take."""
    return int(max(16, triton.next_power_of_2(head_dim)))


@dataclass(frozen=True, slots=True)
class Geometry:
    """What work lists depend on, beside the rows; equal for all layers that share one."""

    kv_heads: int
    group: int
    head_dim: int
    itemsize: int
    """Of what the products are computed in."""
    window: int


@dataclass(frozen=True, slots=True)
class Phase:
    """Rows of one kind, cut and ready to launch."""

    tile: Tile
    queries: int
    work: WorkList
    shared: SharedWork | None = None


@dataclass(frozen=True, slots=True)
class SharedWork:
    tile: Tile
    queries: int
    items: torch.Tensor
    members: torch.Tensor
    parts: torch.Tensor
    """[B, 3] int32, see `merge`."""
    first_keys: torch.Tensor
    """[B] int32: where the keys begin that each row attends to by itself."""
    num_slots: int


def paged_attention(
    q: torch.Tensor,  # [T, Hq, D]
    kv_layer: torch.Tensor,  # [N, 2, block, Hkv, D]
    rows: PagedRows,
    scale: float,
    window: int | None = None,
    slopes: torch.Tensor | None = None,  # [Hq]
    kv_scales: torch.Tensor | None = None,  # [2, Hkv]
) -> torch.Tensor:  # [T, Hq, D]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    kv_heads = kv_layer.shape[3]
    float8 = kv_layer.dtype == torch.float8_e4m3fn
    itemsize = 2 if float8 else q.element_size()
    geometry = Geometry(kv_heads, q.shape[1] // kv_heads, q.shape[2], itemsize, window or 0)
    phases = rows.derived.get(geometry)
    if phases is None:
        phases = rows.derived[geometry] = _plan(rows, geometry, device_for(q))
    if float8:
        kv_layer = kv_layer.view(torch.uint8)
    for phase in phases:
        _launch(phase, q, kv_layer, out, rows, geometry, scale, slopes, kv_scales)
    return out


def _device_lengths(rows: PagedRows) -> tuple[torch.Tensor, torch.Tensor]:
    if rows.on_device is None:
        assert not rows.static, "a graph's lengths must lie on the device"
        starts, lengths = _upload(rows.block_tables.device, rows.query_starts, rows.seq_lens)
        rows.on_device = starts, lengths
    return rows.on_device


def _upload(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """As int32, by one copy. Each begins at a multiple of 16 bytes: kernels are compiled anew for other alignments."""
    padded = [np.pad(array.astype(np.int32).ravel(), (0, -array.size % 4)) for array in arrays]
    parts = torch.from_numpy(np.concatenate(padded)).to(device, non_blocking=True).split([len(p) for p in padded])
    return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _plan(rows: PagedRows, geometry: Geometry, device: Device) -> list[Phase]:
    sizes = geometry.group, geometry.head_dim, geometry.itemsize
    new = np.diff(rows.query_starts)
    decode, prefill = tuning.decode_tile(device, *sizes), tuning.prefill_tile(device, *sizes)
    if geometry.group > LARGEST_GROUP:
        raise ValueError(f"{geometry.group} query heads share a key-value head; at most {LARGEST_GROUP} can")
    if rows.deterministic:
        # One form for all rows: a token computes the same in a prompt and alone.
        tile = tuning.deterministic_tile(device, *sizes)
        return [_phase(rows, geometry, device, tile, 1, EVERYTHING, tuning.FIXED_CHUNK)]
    phases = []
    if rows.static or (new == 1).any():
        phases.append(_phase(rows, geometry, device, decode, 1, 1, tuning.DECODE_CHUNK))
    if not rows.static and (new > 1).any():
        phases.append(_phase(rows, geometry, device, prefill, 2, EVERYTHING, tuning.PREFILL_CHUNK))
    return phases


def _phase(
    rows: PagedRows, geometry: Geometry, device: Device, tile: Tile, shortest: int, longest: int, chunk: int
) -> Phase:
    starts, lengths = _device_lengths(rows)
    queries = 1 if longest == 1 else tile.rows // geometry.group
    per_sm = tuning.programs_per_sm(device, tile, geometry.head_dim, geometry.itemsize)
    places = triton.cdiv(tuning.WAVES * per_sm * device.num_sms, geometry.kv_heads)
    fixed = chunk if rows.deterministic else 0
    shape = Shape(shortest, longest, queries, tile.keys, geometry.window, chunk, fixed, places)
    aligned = ALIGNED_CHUNKS if rows.deterministic else 1
    shared = first_keys = None
    if longest == 1 and not geometry.window and not rows.static:
        shared, first_keys = _shared_work(rows, geometry, device)
    if rows.static and not fixed:
        # Of any lengths: each row ends in one chunk that is not full, and the full ones fill the places.
        num_items = places + len(rows.seq_lens) * (2 if geometry.window else 1)
        num_slots = num_items if geometry.window else min(num_items, 2 * places)
    else:
        num_items, num_slots = count_work(rows.query_starts, rows.seq_lens, first_keys, shape, aligned)
    own = None if shared is None else shared.first_keys
    work = make_work(starts, lengths, own, shape, aligned, num_items, num_slots)
    return Phase(tile, queries, work, shared)


def _shared_work(
    rows: PagedRows, geometry: Geometry, device: Device
) -> tuple[SharedWork, np.ndarray] | tuple[None, None]:
    """The groups that are worth it: items for their prefixes, and its `first_keys` on the host."""
    groups = rows.shared
    if groups is None:
        return None, None
    first_keys = np.zeros(len(rows.seq_lens), np.int32)
    parts = np.zeros((len(rows.seq_lens), 3), np.int32)
    sizes = np.diff(groups.starts)
    worth = np.flatnonzero((sizes >= FEWEST_ROWS) & (groups.lengths >= FEWEST_TOKENS))
    if not worth.size:
        return None, None
    tile = tuning.prefill_tile(device, geometry.group, geometry.head_dim, geometry.itemsize)
    queries = tile.rows // geometry.group
    tiles = -(-sizes[worth] // queries)
    total = int((tiles * -(-groups.lengths[worth] // tile.keys)).sum())
    places = triton.cdiv(tuning.WAVES * device.num_sms, geometry.kv_heads)
    chunk = max(-(-total // places) * tile.keys, tuning.PREFILL_CHUNK)
    items, slot = [], 0
    for g in worth:
        members = groups.rows[groups.starts[g] : groups.starts[g + 1]]
        length = int(groups.lengths[g])
        first_keys[members] = length
        for at in range(0, len(members), queries):
            count = min(queries, len(members) - at)
            splits = -(-length // chunk)
            some = members[at : at + count]
            parts[some] = np.stack([np.full(count, slot), np.full(count, splits), np.arange(count)], 1)
            for split in range(splits):
                first, end = split * chunk, min(length, (split + 1) * chunk)
                items.append([members[0], groups.starts[g] + at, first, end, slot + split, count, 0, 0])
            slot += splits
    arrays = np.array(items), groups.rows, parts, first_keys
    items_, members_, parts_, first_keys_ = _upload(rows.block_tables.device, *arrays)
    return SharedWork(tile, queries, items_, members_, parts_, first_keys_, slot), first_keys


def _launch(
    phase: Phase, q: torch.Tensor, kv_layer: torch.Tensor, out: torch.Tensor, rows: PagedRows, geometry: Geometry,
    scale: float, slopes: torch.Tensor | None, kv_scales: torch.Tensor | None,
) -> None:  # fmt: skip
    starts, lengths = _device_lengths(rows)
    kv_heads, group, head_dim = geometry.kv_heads, geometry.group, geometry.head_dim
    assert kv_layer.stride(4) == q.stride(2) == rows.block_tables.stride(1) == 1

    def run(
        tile: Tile, queries: int, items: torch.Tensor, members: torch.Tensor | None, num_slots: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        partial = torch.empty(num_slots, kv_heads, tile.rows, head_dim, dtype=torch.float32, device=q.device)
        log = torch.empty(num_slots, kv_heads, tile.rows, dtype=torch.float32, device=q.device)
        if len(items):
            attend[(len(items) * kv_heads,)](
                q, kv_layer, out, partial, log, rows.block_tables, starts, lengths, items, members, slopes, kv_scales,
                scale * LOG2_E.value, q.stride(0), q.stride(1), *kv_layer.stride()[:4], rows.block_tables.stride(0),
                kv_heads, group, head_dim, padded_dim(head_dim), kv_layer.shape[2], geometry.window,
                tile.rows, tile.keys, queries, kv_layer.dtype == torch.uint8, device_for(q).has_float8,
                rows.deterministic, ITEM,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        return partial, log

    shared = phase.shared
    prefix: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if shared is not None:
        prefix = run(shared.tile, shared.queries, shared.items, shared.members, shared.num_slots)
    num_slots = len(phase.work.merges)
    partial, log = run(phase.tile, phase.queries, phase.work.items, None, num_slots)
    if num_slots:
        merge[(num_slots, phase.queries * kv_heads * group)](
            out, partial, log, *prefix, phase.work.merges, None if shared is None else shared.parts, starts,
            kv_heads, group, head_dim, padded_dim(head_dim), phase.tile.rows,
            1 if shared is None else shared.tile.rows, MERGED, MERGE, num_warps=2, num_stages=1,
        )  # fmt: skip


def variants(device: Device) -> list[Variant]:
    """The shapes of well-known models, and one of every option."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    found = []

    def add(
        name: str, phase: str, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, **options: Any
    ) -> None:
        float8, slopes = options.get("float8", False), options.get("slopes", False)
        itemsize = 2 if float8 else dtype.itemsize
        sizes = device, group, head_dim, itemsize
        choose = {"decode": tuning.decode_tile, "deterministic": tuning.deterministic_tile}
        tile = choose.get(phase, tuning.prefill_tile)(*sizes)
        queries = 1 if phase == "decode" else tile.rows // group
        i32, dims = torch.int32, padded_dim(head_dim)
        heads = kv_heads * group
        half = 16 * kv_heads * head_dim
        arguments = (
            dtype, torch.uint8 if float8 else dtype, dtype, f32, f32, i32, i32, i32, i32,
            i32 if phase == "shared" else None, f32 if slopes else None, f32 if float8 else None,
            0.1, (heads + 2 * kv_heads) * head_dim, head_dim, 32 * 2 * half, half, kv_heads * head_dim, head_dim, 512,
            kv_heads, group, head_dim, dims, 16, options.get("window", 0), tile.rows, tile.keys, queries, float8,
            device.has_float8, phase == "deterministic", ITEM,
        )  # fmt: skip
        kind = str(dtype).removeprefix("torch.")
        found.append(
            Variant(
                f"attention {phase}: {name}, {kind}, {kv_heads} x {group} x {head_dim}",
                attend,
                dict(zip(attend.arg_names, arguments, strict=True)),
                tile.num_warps,
                tile.num_stages,
                hot=dtype is not f32 and phase != "deterministic" and device.has_float8 >= float8,
                matrix=itemsize == 2 and phase in ("prefill", "shared"),
            )
        )

    for phase in ("decode", "prefill"):
        add("Llama 8B", phase, bf16, 8, 4, 128)
        add("OPT 13B", phase, f16, 40, 1, 128)
        add("multi-query", phase, bf16, 1, 32, 128)
        add("Llama 1B", phase, bf16, 8, 4, 64)
        add("Qwen2.5 7B", phase, bf16, 4, 7, 128)
        add("Gemma", phase, bf16, 4, 2, 256)
        for head_dim in (80, 96, 112):
            add("odd head", phase, bf16, 8, 4, head_dim)
        add("window", phase, bf16, 8, 4, 128, window=4096)
        add("ALiBi", phase, bf16, 32, 1, 128, slopes=True)
        add("float8", phase, bf16, 8, 4, 128, float8=True)
        add("Llama 8B", phase, f32, 8, 4, 128)
    add("Llama 8B", "shared", bf16, 8, 4, 128)
    add("Llama 8B", "deterministic", bf16, 8, 4, 128)
    add("Llama 8B", "deterministic", f32, 8, 4, 128)
    for shared in (False, True):
        part = f32 if shared else None
        arguments = (
            bf16, f32, f32, part, part, torch.int32, torch.int32 if shared else None, torch.int32,
            8, 4, 128, 128, 16, 128 if shared else 1, MERGED, MERGE,
        )  # fmt: skip
        name = "attention merge" + (": shared prefix" if shared else "")
        found.append(Variant(name, merge, dict(zip(merge.arg_names, arguments, strict=True)), 2, 1, hot=True))
    return found + work_variants(device)
