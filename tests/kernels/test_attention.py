"""Paged attention against its naive twin: ragged mixed batches, odd shapes, every element type, a poisoned pool."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import attention, attention_cpu, reference

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case:
    """Arguments of paged attention for rows (tokens in the KV, of which new). Slots that nothing may read are NaN, and
    table entries that nothing may follow are out of range."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        heads: tuple[int, int] = (4, 2),
        size: int = 24,
        block_size: int = 16,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        seq_lens, new = zip(*rows, strict=True)
        self.seq_lens = np.array(seq_lens, np.int32)
        self.query_starts = np.cumsum([0, *new]).astype(np.int32)
        self.scale, self.window = size**-0.5, window
        self.q = torch.randn(sum(new), heads[0], size, generator=generator).to(dtype)
        counts = [-(-n // block_size) for n in seq_lens]
        order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        pool = torch.full((len(order), 3, 2, block_size, heads[1], size), torch.nan, dtype=dtype)
        self.block_tables = torch.full((len(rows), max(counts) + 2), 10**8, dtype=torch.int32)
        for row, (seq_len, num_new) in enumerate(rows):
            first = 0 if window is None else max(0, seq_len - num_new - window + 1)
            for position in range(first, seq_len):
                index = position // block_size
                if self.block_tables[row, index] == 10**8:
                    self.block_tables[row, index] = order.pop()
                slot = pool[self.block_tables[row, index], 1, :, position % block_size]
                slot.copy_(torch.randn(2, heads[1], size, generator=generator))
        self.kv_layer = pool[:, 1]

    def run(self, function: Callable[..., torch.Tensor] = attention.paged_attention) -> torch.Tensor:
        return function(
            self.q, self.kv_layer, self.block_tables, self.query_starts, self.seq_lens, self.scale, self.window
        )

    def check(self) -> None:
        got, want = self.run(), self.run(reference.paged_attention)
        assert got.dtype == self.q.dtype
        torch.testing.assert_close(got, want, atol=TOLERANCE[self.q.dtype], rtol=0)


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
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(case.run(), whole)
    one = Case([(900, 1)], heads=(2, 1))
    torch.set_num_threads(2)
    assert torch.equal(one.run(), alone)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, 20])
def test_the_form_for_any_device(dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_compiled_decode", lambda: None)
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

    monkeypatch.setattr(attention, "_compiled_decode", lambda: None)
    monkeypatch.setattr(attention, "_decode_padded", count)
    monkeypatch.setattr(attention, "GATHERED_BYTES", num_slots * 2 * 2 * 20 * 4)
    case.check()
    assert groups == sizes


def test_falls_back_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise AttributeError("no GOMP_parallel here")

    monkeypatch.setattr(attention_cpu, "check", missing)
    attention._compiled_decode.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            Case(ROWS["decodes"]).check()
            Case(ROWS["decodes"]).check()
        assert [record.message for record in caplog.records] == [
            "paged attention runs uncompiled, several times slower: no GOMP_parallel here"
        ]
    finally:
        attention._compiled_decode.cache_clear()


def test_queries_and_tables_may_be_strided_views() -> None:
    for rows in ROWS.values():
        case = Case(rows)
        want = case.run()
        case.block_tables = case.block_tables.repeat(1, 2)[:, : case.block_tables.shape[1]]
        assert torch.equal(case.run(), want)
    wide = torch.randn(len(case.q), 9, case.q.shape[2])
    wide[:, 2:6] = case.q
    case.q = wide[:, 2:6]
    assert torch.equal(case.run(), want)
