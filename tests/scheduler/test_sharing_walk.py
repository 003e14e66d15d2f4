"""Everything mixed, at random, audited after every operation; at full length by `make soak`."""

import pytest
from sharing_walk import walk

OPERATIONS = 6_000
KINDS = (
    "one", "n", "best_of", "beam", "cancelled", "reserved", "released", "forks", "blocks copied", "tokens found",
    "preempted by recompute", "preempted by swap", "tokens discarded",
)  # fmt: skip


@pytest.mark.parametrize("first_seed", [1_000, 2_000, 3_000, 4_000])
def test_books_balance_and_every_token_is_right_whatever_is_mixed(first_seed):
    met = walk(OPERATIONS, first_seed)
    assert all(met[kind] for kind in KINDS), met
