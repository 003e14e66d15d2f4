"""Which rows begin with the same blocks: samples and beams of one prompt, requests behind one system prompt."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from quire.kernels.attention import SharedPrefixes

FEWEST_ROWS, FEWEST_TOKENS = 4, 256
"""Below these a shared prefix costs more in launches and merging than it saves in reading."""


def find_shared_prefixes(
    block_tables: np.ndarray,  # [B, M] int32
    seq_lens: np.ndarray,  # [B]
    num_new: np.ndarray,  # [B]: only rows of one new token take part
    block_size: int,
) -> SharedPrefixes | None:
    """Groups of rows and what all members of a group have in common. A block belongs to a row's prefix only if the
    row's newest token lies behind it. Rows with the same block at one place have the same blocks before it."""
    depth = -(-FEWEST_TOKENS // block_size)
    rows = np.flatnonzero((num_new == 1) & (seq_lens > depth * block_size))
    members, starts, lengths = [], [0], []
    for group in _alike(block_tables, rows, depth):
        group, length = _deepest(block_tables, seq_lens, group, block_size)
        members.append(group)
        starts.append(starts[-1] + len(group))
        lengths.append(length * block_size)
    if not members:
        return None
    return SharedPrefixes(
        np.concatenate(members).astype(np.int32), np.array(starts, np.int32), np.array(lengths, np.int32)
    )


def _alike(block_tables: np.ndarray, rows: np.ndarray, depth: int) -> list[np.ndarray]:
    """Groups, large enough, of the rows that have the same first `depth` blocks."""
    if len(rows) < FEWEST_ROWS:
        return []
    last = block_tables[rows, depth - 1]
    order = np.argsort(last, kind="stable")
    bounds = np.flatnonzero(np.diff(last[order], prepend=-1, append=-1))
    large = np.flatnonzero(np.diff(bounds) >= FEWEST_ROWS)
    pairs = list(pairwise(bounds.tolist())) if large.size else []
    return [rows[order[slice(*pairs[i])]] for i in large]


def _deepest(
    block_tables: np.ndarray, seq_lens: np.ndarray, group: np.ndarray, block_size: int
) -> tuple[np.ndarray, int]:
    """The group, or the part of it that shares twice as many blocks and more, while that saves more reading."""
    while True:
        limit = (int(seq_lens[group].min()) - 1) // block_size
        tables = block_tables[group, :limit]
        equal = (tables == tables[0]).all(0)
        length = limit if equal.all() else int(equal.argmin())
        longer = group[seq_lens[group] > 2 * length * block_size]
        parts = _alike(block_tables, longer, 2 * length)
        best = max(parts, key=len, default=group[:0])
        if (len(best) - 1) * 2 <= len(group) - 1:
            return group, length
        group = best
