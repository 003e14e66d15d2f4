"""Paged attention against its naive twin: ragged mixed batches, odd shapes, every element type, a poisoned pool."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import TOLERANCE, Case

from quire.kernels.attention import PagedRows, paged_attention
from quire.kernels.cpu import attention, threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ROWS = {
    "decodes": [(1, 1), (15, 1), (16, 1), (17, 1), (33, 1)],
    "prefills": [(3, 3), (16, 16), (37, 37)],
    "chunks with a prefix": [(30, 5), (17, 2), (48, 32), (33, 16)],
    "everything mixed": [(5, 1), (21, 21), (40, 7), (64, 1), (18, 17), (1, 1)],
}


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_equals_the_twin(rows: list[tuple[int, int]], window: int | None) -> None:
    Case(rows, window=window).check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=["mha", "gqa", "mqa"])
def test_head_groups_and_element_types(heads: tuple[int, int], dtype: torch.dtype) -> None:
    Case(ROWS["everything mixed"], heads=heads, size=20, dtype=dtype).check()


@pytest.mark.parametrize("block_size", [8, 32])
@pytest.mark.parametrize("size", [16, 64, 80])
def test_block_and_head_sizes(block_size: int, size: int) -> None:
    Case(ROWS["everything mixed"], size=size, block_size=block_size).check()


@given(
    rows=st.lists(
        st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=5
    ),
    window=st.none() | st.integers(1, 70),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_batch(rows: list[tuple[int, int]], window: int | None, seed: int) -> None:
    Case(rows, heads=(2, 1), size=8, block_size=8, window=window, seed=seed).check()


@pytest.mark.parametrize("window", [None, 700])
def test_contexts_of_several_splits(window: int | None) -> None:
    Case([(256, 1), (257, 1), (900, 1), (1025, 1), (2, 1)], heads=(2, 1), window=window).check()


def test_prefill_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_TILE", 8)
    for window in (None, 5, 20):
        Case([(37, 37), (50, 19)], window=window).check()


def test_a_row_does_not_depend_on_its_batch_or_the_threads() -> None:
    alone = Case([(900, 1)], heads=(2, 1)).run()
    case = Case([(900, 1), (40, 1), (1, 1)], heads=(2, 1))
    case.q[:1] = Case([(900, 1)], heads=(2, 1)).q
    whole = case.run()
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(case.run(), whole)
    one = Case([(900, 1)], heads=(2, 1))
    torch.set_num_threads(2)
    assert torch.equal(one.run(), alone)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, 20])
def test_the_form_for_any_device(dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_compiled_loops", lambda: None)
    for rows in (ROWS["decodes"], ROWS["everything mixed"]):
        Case(rows, heads=(6, 2), window=window, dtype=dtype).check()


@pytest.mark.parametrize(("num_slots", "sizes"), [(32, [1, 1, 1, 2, 1]), (64, [1, 2, 3]), (10**6, [6])])
def test_rows_are_gathered_in_groups_of_bounded_size(
    num_slots: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row longer than the bound goes alone, and the short ones are not padded to it."""
    case = Case([(15, 1), (90, 1), (1, 1), (17, 1), (16, 1), (18, 1)], heads=(6, 2), size=20)
    padded, groups = attention._decode_padded, []

    def count(q: torch.Tensor, *arguments: Any) -> torch.Tensor:
        groups.append(len(q))
        return padded(q, *arguments)

    monkeypatch.setattr(attention, "_compiled_loops", lambda: None)
    monkeypatch.setattr(attention, "_decode_padded", count)
    monkeypatch.setattr(attention, "GATHERED_BYTES", num_slots * 2 * 2 * 20 * 4)
    case.check()
    assert groups == sizes


def test_falls_back_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise AttributeError("no GOMP_parallel here")

    monkeypatch.setattr(threads, "check", missing)
    attention._compiled_loops.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            Case(ROWS["decodes"]).check()
            Case(ROWS["decodes"]).check()
        assert [record.message for record in caplog.records] == [
            "paged attention runs uncompiled, several times slower: no GOMP_parallel here"
        ]
    finally:
        attention._compiled_loops.cache_clear()


def test_queries_and_tables_may_be_strided_views() -> None:
    for rows in ROWS.values():
        case = Case(rows)
        want = case.run()
        tables = case.rows.block_tables
        case.rows.block_tables = tables.repeat(1, 2)[:, : tables.shape[1]]
        assert torch.equal(case.run(), want)
    wide = torch.randn(len(case.q), 9, case.q.shape[2])
    wide[:, 2:6] = case.q
    case.q = wide[:, 2:6]
    assert torch.equal(case.run(), want)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "any device"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_float8_pools(dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(attention, "_compiled_loops", lambda: None)
    case = Case(ROWS["everything mixed"], heads=(6, 2), dtype=dtype, float8=True)
    case.check()
    case.kv_scales = None
    case.check()


@pytest.mark.parametrize("window", [None, 20])
def test_alibi(window: int | None) -> None:
    for dtype in TOLERANCE:
        Case(ROWS["everything mixed"], heads=(6, 2), window=window, dtype=dtype, alibi=True).check()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "any device"])
def test_deterministic_results_depend_on_no_neighbour_and_no_cut(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(attention, "_compiled_loops", lambda: None)
    for window in (None, 100):
        whole = Case([(300, 300)], heads=(2, 1), window=window, deterministic=True)
        want = whole.run()
        for start, stop in ((0, 13), (13, 14), (14, 250), (250, 300)):
            tables = whole.rows.block_tables.repeat(2, 1)
            starts = np.array([0, stop - start, stop - start + 1], np.int32)
            rows = PagedRows(tables, starts, np.array([stop, 40], np.int32), deterministic=True)
            q = torch.cat([whole.q[start:stop], whole.q[39:40]])
            got = paged_attention(q, whole.kv_layer, rows, whole.scale, window)
            assert torch.equal(got, torch.cat([want[start:stop], want[39:40]]))
