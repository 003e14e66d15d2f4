"""The pool's free list and reference counts, with exact block numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.scheduler.blocks import AuditError, BlockPool


def test_the_block_freed_last_is_taken_first():
    pool = BlockPool(4)
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, 3]
    for block in (2, 0, 3):
        pool.release(block)
    assert pool.free_blocks() == [3, 0, 2]
    assert [pool.allocate() for _ in range(3)] == [3, 0, 2]
    assert pool.num_free == 0


def test_a_shared_block_is_free_only_after_its_last_reference():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.share(block)
    assert pool.ref_count(block) == 2
    pool.release(block)
    assert pool.num_free == 1 and pool.free_blocks() == [1]
    pool.audit([[block]])
    pool.release(block)
    assert pool.free_blocks() == [0, 1]


def test_misuse_is_named():
    pool = BlockPool(1)
    with pytest.raises(AuditError, match="block 0 is free and cannot be shared"):
        pool.share(0)
    pool.allocate()
    with pytest.raises(AuditError, match="no free block"):
        pool.allocate()
    pool.release(0)
    with pytest.raises(AuditError, match="block 0 is free already"):
        pool.release(0)


@pytest.mark.parametrize("tables, complaint", [([], "is not 3 blocks"), ([[0], [0]], "reference count 1 but 2")])
def test_audit_finds_a_lost_and_a_doubly_held_block(tables, complaint):
    pool = BlockPool(3)
    pool.allocate()
    with pytest.raises(AuditError, match=complaint):
        pool.audit(tables)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), max_size=200))
def test_any_walk_keeps_the_books_balanced(actions):
    pool, held = BlockPool(8), []
    for action, pick in actions:
        if action == 0 and pool.num_free:
            held.append(pool.allocate())
        elif action == 1 and held:
            block = held[pick % len(held)]
            pool.share(block)
            held.append(block)
        elif action == 2 and held:
            pool.release(held.pop(pick % len(held)))
        pool.audit([held])
    assert set(held).isdisjoint(pool.free_blocks())


def test_content_is_found_until_its_block_is_taken_the_longest_unused_first():
    pool = BlockPool(4)
    blocks = [pool.allocate() for _ in range(4)]
    for block in blocks[:3]:
        pool.remember(block, bytes([block]))
    pool.remember(3, bytes([0]))  # held already
    for block in (1, 3, 0, 2):
        pool.release(block)
    assert pool.free_blocks() == [3, 1, 0, 2] and (pool.num_free, pool.num_cached) == (4, 3)
    assert pool.find(bytes([0])) == 0
    pool.refer(0)  # out of the middle, with its content
    assert pool.free_blocks() == [3, 1, 2] and pool.find(bytes([0])) == 0 and pool.num_cached == 2
    assert [pool.allocate(), pool.allocate()] == [3, 1] and pool.find(bytes([1])) is None
    pool.audit([[0], [3], [1]])
    pool.refer(0)
    assert pool.ref_count(0) == 2 and pool.num_cached == 1


def test_what_is_forgotten_is_taken_first():
    pool = BlockPool(4)
    for block in (pool.allocate(), pool.allocate()):
        pool.remember(block, bytes([block]))
        pool.release(block)
    assert pool.free_blocks() == [2, 3, 0, 1]
    assert pool.forget_free() == 2 and pool.num_cached == 0
    assert pool.free_blocks() == [1, 0, 2, 3] and pool.find(bytes([0])) is None
    pool.audit([])
