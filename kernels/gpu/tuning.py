"""Sizes of tiles by device and shape. Chosen by hand from what compiles without spilling; nothing is tuned while
serving, where a change would recompile under a request."""

from __future__ import annotations

from typing import NamedTuple

import triton

from quire.kernels.gpu.device import Device


class Tile(NamedTuple):
    """Of attention."""

    rows: int
    """Queries times the heads of a group, a power of two."""
    keys: int
    num_warps: int
    num_stages: int


DECODE_CHUNK = 256
"""Tokens of context that are worth a work item of their own."""
PREFILL_CHUNK = 512
FIXED_CHUNK = 8192
"""Of the deterministic mode: long, as each tile of queries keeps a partial result for every chunk of its row."""

WAVES = 2
"""Items per place of the device: enough that uneven ends do not matter."""


def decode_tile(device: Device, group: int, head_dim: int, itemsize: int) -> Tile:
    """`itemsize` is in bytes of what the products are computed in. Sixteen rows are the least that the matrix units
    take; a context is read as fast as loads can be in flight, so two programs share a multiprocessor."""
    rows = max(16, triton.next_power_of_2(group))
    keys = 64 if head_dim <= 128 else 32
    if itemsize == 4:
        keys = 32 if head_dim <= 128 else 16
    stages = 2 if device.backend == "hip" else 3
    return Tile(rows, keys, 4 if rows <= 32 else 8, stages)


def prefill_tile(device: Device, group: int, head_dim: int, itemsize: int) -> Tile:
    """Hopper's matrix instructions take 64 rows per group of four warps; 128 rows amortise a tile of keys."""
    group = triton.next_power_of_2(group)
    wide = head_dim > 128
    if itemsize == 4:
        return Tile(max(32, group), 16 if wide else 32, 4, 1)
    if device.backend == "hip":
        return Tile(max(128, group), 32 if wide else 64, 8, 1)
    if device.arch < 90:
        return Tile(max(64, group), 32, 8 if wide or group > 64 else 4, 3)
    if wide:
        return Tile(max(128, group), 64 if device.is_hopper else 32, 8, 2)
    return Tile(max(128, group), 64, 8, 3)


def deterministic_tile(device: Device, group: int, head_dim: int, itemsize: int) -> Tile:
    """One form for prompts and single tokens alike: small enough not to waste much on the latter."""
    decode = decode_tile(device, group, head_dim, itemsize)
    return decode._replace(rows=max(decode.rows, 32 if itemsize == 4 else 64), num_stages=min(decode.num_stages, 2))


def programs_per_sm(device: Device, tile: Tile, head_dim: int, itemsize: int) -> int:
    """How many programs run on a multiprocessor at once. A tile of many rows fills the registers by itself; small ones
    are limited by the shared memory that their stages take."""
    if tile.rows >= 64:
        return 1
    in_flight = 2 * tile.keys * triton.next_power_of_2(head_dim) * itemsize * max(1, tile.num_stages - 1)
    return int(max(1, min(3, device.shared_bytes // in_flight)))
