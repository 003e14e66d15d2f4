"""Rows that begin with the same blocks are found on the host."""

import numpy as np
import pytest

from quire.kernels.shared_prefix import find_shared_prefixes

BLOCK_SIZE = 64
"""Four of them are the fewest tokens worth sharing."""


def tables(*rows: tuple[int, int]) -> np.ndarray:
    """Each row: how many blocks it shares with whoever shares with the same owner, and the owner."""
    found = np.full((len(rows), 40), 10**6, np.int32) + np.arange(len(rows), dtype=np.int32)[:, None] * 100
    for row, (shared, owner) in enumerate(rows):
        found[row, :shared] = owner * 1000 + np.arange(shared)
    return found


def found(table: np.ndarray, lengths: list[int], num_new: list[int] | None = None) -> list[tuple[list[int], int]]:
    new = np.array(num_new or [1] * len(lengths))
    groups = find_shared_prefixes(table, np.array(lengths), new, BLOCK_SIZE)
    if groups is None:
        return []
    parts = np.split(groups.rows, groups.starts[1:-1])
    return [(part.tolist(), int(length)) for part, length in zip(parts, groups.lengths, strict=True)]


def test_groups_have_in_common_what_all_members_have():
    table = tables((6, 1), (5, 2), (7, 1), (5, 2), (6, 1), (5, 2), (9, 1), (5, 2), (0, 3))
    assert found(table, [900] * 9) == [([0, 2, 4, 6], 6 * 64), ([1, 3, 5, 7], 5 * 64)]


def test_few_rows_and_few_tokens_are_left_alone():
    assert found(tables((9, 1), (9, 1), (9, 1), (0, 2)), [900] * 4) == []
    assert found(tables(*[(3, 1)] * 9), [900] * 9) == []
    assert found(tables((0, 1), (0, 2)), [5, 6]) == []


def test_rows_of_more_tokens_take_no_part():
    table = tables(*[(6, 1)] * 5)
    assert found(table, [900] * 5, [1, 1, 3, 1, 1]) == [([0, 1, 3, 4], 6 * 64)]
    assert found(table, [900] * 5, [1, 1, 3, 2, 1]) == []


@pytest.mark.parametrize(("length", "shared"), [(400, 6), (385, 6), (384, 5), (257, 4)])
def test_the_newest_token_is_never_shared(length, shared):
    assert found(tables(*[(6, 1)] * 4), [900, 900, 900, length]) == [([0, 1, 2, 3], shared * 64)]


def test_short_rows_and_those_that_leave_early_do_not_spoil_it_for_the_others():
    table = tables(*[(30, 1)] * 7, (5, 1), (30, 1))
    lengths = [2000] * 8 + [100]
    assert found(table, lengths) == [(list(range(7)), 30 * 64)]


def test_few_that_share_more_do_not_spoil_it_for_the_many():
    table = tables(*[(6, 1)] * 20, *[(13, 1)] * 4)
    assert found(table, [2000] * 24) == [(list(range(24)), 6 * 64)]
