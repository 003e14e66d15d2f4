"""The Triton form of paged attention against its naive twin, over a poisoned pool; and the work lists it runs by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NOWHERE, Case

from quire.kernels import reference
from quire.kernels.attention import PagedRows, SharedPrefixes
from quire.kernels.gpu import attention, tuning
from quire.kernels.gpu.device import DEVICES
from quire.kernels.gpu.work import ITEM, MERGE, Shape, count_work, fill_work, make_work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ELEMENTS = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""The interpreter's products of bfloat16 are wrong, so those wait for a GPU."""

FILE = "kernels/gpu/attention.py"
WORK = "kernels/gpu/work.py"
BUGS = [
    (
        "tail mask off by one", FILE,
        "inside = (key >= low) & (key < high)",
        "inside = (key >= low) & (key <= high)",
        "test_equals_the_twin",
    ),
    (
        "a query sees the next key", FILE,
        "(key[None, :] <= position[:, None])",
        "(key[None, :] <= position[:, None] + 1)",
        "test_equals_the_twin",
    ),
    (
        "window off by one", FILE,
        "key[None, :] > position[:, None] - WINDOW",
        "key[None, :] >= position[:, None] - WINDOW",
        "test_equals_the_twin",
    ),
    (
        "stale block", FILE,
        "tl.range(free_start, free_stop, KEYS):\n            following = _blocks(table, at + KEYS,",
        "tl.range(free_start, free_stop, KEYS):\n            following = _blocks(table, at,",
        "test_long_contexts_are_cut",
    ),
    (
        "blocks before the window are read", FILE,
        "inside = (key >= low) & (key < high)",
        "inside = key < high",
        "test_blocks_before_the_window_are_not_read",
    ),
    (
        "wrong head map", FILE,
        "q_head = head * GROUP + index % GROUP",
        "q_head = head + index % GROUP * KV_HEADS",
        "test_equals_the_twin",
    ),
    (
        "the scale of K is missing", FILE,
        "scale = scale * tl.load(kv_scales + head)",
        "scale = scale * 1.0",
        "test_float8_pools",
    ),
    (
        "the scale of V is missing", FILE,
        "v_scale = v_scale * tl.load(kv_scales + KV_HEADS + head)",
        "v_scale = v_scale * 1.0",
        "test_float8_pools",
    ),
    (
        "splits are merged unweighted", FILE,
        "weight = tl.exp2(log - base)",
        "weight = tl.where(exists, 1.0, 0.0)",
        "test_long_contexts_are_cut",
    ),
    (
        "earlier splits are not shrunk", FILE,
        "acc = acc * shrink + tl.sum(weight[:, None] * value, 0)",
        "acc = acc + tl.sum(weight[:, None] * value, 0)",
        "test_more_splits_than_are_merged_at_once",
    ),
    (
        "a cascade's rows are mixed up", FILE,
        "place = tl.load(shared_parts + row * 3 + 2) * GROUP + q_head % GROUP",
        "place = q_head % GROUP",
        "test_rows_that_share_a_prefix",
    ),
    (
        "slope of the wrong head", FILE,
        "tl.load(slopes + q_head,",
        "tl.load(slopes + q_head % GROUP,",
        "test_alibi",
    ),
    (
        "an item ends a key early", WORK,
        "past + tl.minimum(first_query + QUERIES, new), (first",
        "past + tl.minimum(first_query + QUERIES, new) - 1, (first",
        "test_equals_the_twin",
    ),
    (
        "a merge forgets its last split", WORK,
        "tl.where(split == 0, splits, 0)",
        "tl.where(split == 0, splits - 1, 0)",
        "test_long_contexts_are_cut",
    ),
    (
        "a graph replays old merges", WORK,
        "tl.store(merges + index * MERGE + 2, tl.zeros([PROGRAM], tl.int32), mask=unused)",
        "pass",
        "test_a_work_list_covers_every_visible_key_once",
    ),
]  # fmt: skip

ROWS = {
    "decodes": [(1, 1), (15, 1), (16, 1), (17, 1), (33, 1), (128, 1)],
    "prefills": [(3, 3), (16, 16), (37, 37), (70, 70)],
    "chunks with a prefix": [(30, 5), (17, 2), (90, 32), (133, 16)],
    "everything mixed": [(5, 1), (21, 21), (40, 7), (64, 1), (150, 17), (1, 1)],
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN, or a number that no list holds."""

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        return torch.full(shape, torch.nan if dtype.is_floating_point else NOWHERE, dtype=dtype, device=device)

    def empty_like(x: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full(x.shape, torch.nan, dtype=x.dtype, device=x.device)

    monkeypatch.setattr(attention.torch, "empty", empty)
    monkeypatch.setattr(attention.torch, "empty_like", empty_like)


def check(rows: list[tuple[int, int]], **settings: Any) -> Case:
    case = Case(rows, device=DEVICE, **settings)
    case.check(attention.paged_attention, TOLERANCE[case.q.dtype])
    return case


def num_merged(case: Case) -> int:
    return sum(len(phase.work.merges) for phases in case.rows.derived.values() for phase in phases)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_equals_the_twin(rows: list[tuple[int, int]], window: int | None) -> None:
    check(rows, window=window)


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1), (20, 1)], ids=["mha", "gqa", "group of 7", "mqa"])
def test_head_groups_and_element_types(heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(ROWS["everything mixed"], heads=heads, size=16, dtype=dtype)


@pytest.mark.parametrize(("size", "block_size"), [(64, 8), (80, 16), (96, 32), (112, 16), (128, 64), (256, 16)])
def test_head_and_block_sizes(size: int, block_size: int) -> None:
    check([(40, 1), (75, 30), (9, 9)], heads=(2, 1), size=size, block_size=block_size, dtype=torch.float16)


@given(
    rows=st.lists(
        st.integers(1, 160).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, min(n, 50)))), min_size=1, max_size=4
    ),
    window=st.sampled_from([None, 1, 37, 120]),
    seed=st.integers(0, 99),
    deterministic=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_any_batch(rows: list[tuple[int, int]], window: int | None, seed: int, deterministic: bool) -> None:
    check(rows, heads=(2, 1), size=8, block_size=8, window=window, seed=seed, deterministic=deterministic)


@pytest.mark.parametrize("rows", [[(700, 1)], [(700, 9)], [(1300, 1), (20, 1), (270, 1)], [(700, 3), (5, 1), (300, 1)]])
@pytest.mark.parametrize("window", [None, 600])
def test_long_contexts_are_cut(
    rows: list[tuple[int, int]], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 128)
    assert num_merged(check(rows, heads=(2, 1), size=8, window=window)) > 1


def test_more_splits_than_are_merged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "DECODE_CHUNK", 32)
    assert num_merged(check([(32 * 37 + 5, 1)], heads=(2, 1), size=8)) == 38


def test_alibi() -> None:
    for rows in (ROWS["everything mixed"], [(600, 1), (90, 20)]):
        check(rows, heads=(6, 2), alibi=True)


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_float8_pools(dtype: torch.dtype) -> None:
    case = Case(ROWS["everything mixed"], heads=(6, 2), size=32, dtype=dtype, float8=True, device=DEVICE)
    case.check(attention.paged_attention, {torch.bfloat16: 3e-2}.get(dtype, 4e-3))
    case.kv_scales = None
    case.check(attention.paged_attention, {torch.bfloat16: 3e-2}.get(dtype, 4e-3))


def test_blocks_before_the_window_are_not_read() -> None:
    """They may be anybody's by now: here they are NaN, which no mask on a score would silence."""
    for deterministic in (False, True):
        case = Case(
            [(200, 1), (150, 3), (90, 1)], heads=(1, 1), size=8, window=20, deterministic=deterministic, device=DEVICE
        )
        case.rows.block_tables[case.rows.block_tables == NOWHERE] = case.poisoned
        case.check(attention.paged_attention, 1e-5)


def test_queries_and_tables_may_be_strided_views() -> None:
    case = Case(ROWS["everything mixed"], device=DEVICE)
    want = case.run(attention.paged_attention)
    case.rows.block_tables = case.rows.block_tables.repeat(1, 2)[:, : case.rows.block_tables.shape[1]]
    wide = torch.full((len(case.q), 9, case.q.shape[2]), torch.nan, device=DEVICE)
    wide[:, 2:6] = case.q
    case.q = wide[:, 2:6]
    case.rows.derived.clear()
    assert torch.equal(case.run(attention.paged_attention), want)


def test_a_group_may_not_exceed_a_tile() -> None:
    with pytest.raises(ValueError, match="300 query heads share a key-value head; at most 128 can"):
        check([(3, 1)], heads=(300, 1), size=8)


def test_layers_share_a_list_and_windows_have_their_own() -> None:
    case = Case([(70, 1), (30, 4)], window=16, device=DEVICE)
    case.run(attention.paged_attention)
    (first,) = case.rows.derived.values()
    case.run(attention.paged_attention)
    assert list(case.rows.derived.values()) == [first]
    case.window = 20
    case.run(attention.paged_attention)
    assert len(case.rows.derived) == 2


@pytest.mark.parametrize(("shared", "prefix"), [(4, 256), (6, 304), (40, 512)])
def test_rows_that_share_a_prefix(shared: int, prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile holds 32 rows in float32, so forty take two; three more rows share nothing."""
    rows = [(prefix + 1 + 7 * i, 1) for i in range(shared)] + [(20, 1), (300, 1), (40, 9)]
    case = Case(rows, heads=(4, 2), size=8, shared=shared, prefix=prefix, device=DEVICE)
    members = np.random.default_rng(0).permutation(shared).astype(np.int32)
    case.rows.shared = SharedPrefixes(members, np.array([0, shared], np.int32), np.array([prefix], np.int32))
    case.check(attention.paged_attention, 1e-5)
    decode = next(iter(case.rows.derived.values()))[0]
    assert decode.shared is not None and len(decode.work.merges) >= shared
    # What is shared is read once for all: nobody's own items begin before it.
    own = decode.work.items.cpu()[:, :ITEM]
    assert all(item[2] >= prefix for item in own if item[0] < shared)


def test_a_prefix_that_does_not_pay_is_not_attended_to_together() -> None:
    rows = [(260, 1)] * 3 + [(80, 1)] * 5
    case = Case(rows, size=8, shared=3, prefix=256, device=DEVICE)
    case.rows.shared = SharedPrefixes(np.array([0, 1, 2], np.int32), np.array([0, 3]), np.array([256]))
    case.check(attention.paged_attention, 1e-5)
    assert next(iter(case.rows.derived.values()))[0].shared is None


@pytest.mark.usefixtures("steady_products")
def test_deterministic_results_depend_on_no_neighbour_and_no_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "FIXED_CHUNK", 64)
    for window in (None, 100):
        whole = Case([(200, 200)], heads=(2, 1), size=8, window=window, deterministic=True, device=DEVICE)
        want = whole.run(attention.paged_attention)
        for start, stop in ((0, 13), (13, 14), (14, 150), (150, 199), (199, 200)):
            part = PagedRows(
                whole.rows.block_tables.repeat(2, 1),
                np.array([0, stop - start, stop - start + 1], np.int32),
                np.array([stop, 40], np.int32),
                deterministic=True,
            )
            q = torch.cat([whole.q[start:stop], whole.q[39:40]])
            got = attention.paged_attention(q, whole.kv_layer, part, whole.scale, window)
            assert torch.equal(got[:-1], want[start:stop])
            assert torch.equal(got[-1], want[39])


SHAPES = [
    Shape(1, 1, 1, 32, 0, 64, 0, 6),
    Shape(2, 1000, 4, 16, 0, 32, 0, 3),
    Shape(1, 1000, 8, 16, 50, 32, 0, 9),
    Shape(1, 1000, 8, 16, 50, 32, 48, 9),
]


@given(
    rows=st.lists(
        st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, min(n, 40)))), min_size=1, max_size=9
    ),
    shape=st.sampled_from(SHAPES),
    aligned=st.sampled_from([1, 4]),
    begun=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_work_list_covers_every_visible_key_once(
    rows: list[tuple[int, int]], shape: Shape, aligned: int, begun: bool
) -> None:
    lengths = np.array([n for n, _ in rows], np.int32)
    new = np.array([n for _, n in rows], np.int32)
    starts = np.cumsum([0, *new]).astype(np.int32)
    first_keys = (lengths // 3 * (np.arange(len(rows)) % 2)).astype(np.int32) if begun and not shape.window else None
    num_items, num_slots = count_work(starts, lengths, first_keys, shape, aligned)
    arrays = [None if a is None else torch.from_numpy(a).to(DEVICE) for a in (starts, lengths, first_keys)]
    work = make_work(*arrays, shape, aligned, num_items + 2, num_slots + 2)  # type: ignore[arg-type]
    items, merges = work.items.cpu().numpy(), work.merges.cpu().numpy()
    assert (items[num_items:, 0] == -1).all() and (merges[num_slots:, 2] == 0).all()
    covered: dict[tuple[int, int], list[int]] = {}
    slots: dict[tuple[int, int], list[int]] = {}
    for row, query, first, end, slot in items[:num_items, :5].tolist():
        covered.setdefault((row, query), []).extend(range(first, end))
        slots.setdefault((row, query), []).append(slot)
    expected = {}
    for row, (length, count) in enumerate(rows):
        if shape.shortest <= count <= shape.longest:
            for query in range(0, count, shape.queries):
                past = length - count
                low = max(0, past + query - shape.window + 1) if shape.window else 0
                low = max(low, 0 if first_keys is None else int(first_keys[row]))
                expected[row, query] = list(range(low, past + min(query + shape.queries, count)))
    assert covered == expected
    led = {(row, query): (first, count) for first, (row, query, count, _) in enumerate(merges.tolist()) if count}
    used = []
    for tile, own in slots.items():
        if own == [-1]:
            assert tile not in led
        else:
            first, count = led.pop(tile)
            assert own == list(range(first, first + count))
            used += own
    assert not led and sorted(used) == list(range(num_slots))


def test_one_long_context_beside_many_short_ones_is_cut() -> None:
    """Chunks are equal, whatever the mixture: nobody waits for the long one."""
    lengths = np.array([65536] + [4096] * 15, np.int32)
    starts = np.arange(17, dtype=np.int32)
    shape = Shape(1, 1, 1, 64, 0, 256, 0, 66)
    num_items, num_slots = count_work(starts, lengths, None, shape, 1)
    work = make_work(
        torch.from_numpy(starts).to(DEVICE), torch.from_numpy(lengths).to(DEVICE), None, shape, 1, num_items, num_slots
    )
    keys = (work.items[:, 3] - work.items[:, 2]).cpu()
    assert 60 <= num_items <= 66 + 16
    assert keys.max() == 2048 and (keys == 2048).float().mean() > 0.9


@pytest.mark.parametrize("window", [None, 100])
def test_a_static_list_follows_the_lengths_on_the_device(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a recorded graph does: the list is filled again, from other lengths. On a device of one multiprocessor there
    is room for few chunks beside the rows' own."""
    monkeypatch.setattr(tuning, "DECODE_CHUNK", 64)
    monkeypatch.setattr(attention, "device_for", lambda x: replace(DEVICES["sm_90"], num_sms=1))
    case = Case([(700, 1), (300, 1), (40, 1), (90, 1)], heads=(2, 1), size=16, device=DEVICE)
    case.window = window
    rows = case.rows
    lengths = torch.tensor([700, 300, 40, 90], dtype=torch.int32, device=DEVICE)
    starts = torch.arange(5, dtype=torch.int32, device=DEVICE)
    case.rows = PagedRows(rows.block_tables, rows.query_starts, rows.seq_lens, on_device=(starts, lengths), static=True)
    case.check(attention.paged_attention, 1e-5)
    ((phase,),) = case.rows.derived.values()
    for changed in ([1, 300, 40, 90], [64, 1, 1, 1], [700, 7, 7, 7], [650, 300, 0, 0], [65, 65, 33, 65]):
        lengths.copy_(torch.tensor(changed))
        fill_work(phase.work, starts, lengths, None)
        got = case.run(attention.paged_attention)
        active = [i for i, n in enumerate(changed) if n]
        naive = PagedRows(rows.block_tables, rows.query_starts, np.maximum(np.array(changed, np.int32), 1))
        want = reference.paged_attention(case.q, case.kv_layer, naive, case.scale, window)
        torch.testing.assert_close(got.cpu()[active], want[active], atol=1e-5, rtol=0)


def test_merge_fields_fit_their_records() -> None:
    assert (ITEM, MERGE) == (8, 4)
