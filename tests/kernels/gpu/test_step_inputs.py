"""The kernels that feed a step, against a reading one token at a time: ragged and single, with padding, in tables whose
other entries are poison."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import step_inputs as public
from quire.kernels.gpu import step_inputs as gpu
from quire.kernels.step_inputs import COPY, SEGMENT, RowTensors, StepTensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = -(10**6)

FILE = "kernels/gpu/step_inputs.py"
BUGS = [
    ("tokens of the batch's row", FILE, "value = tl.load(token_table + wide * token_stride",
     "value = tl.load(token_table + owner * token_stride", "test_a_ragged_step"),
    ("the block before", FILE, "position // BLOCK_SIZE, mask", "(position - 1) // BLOCK_SIZE, mask",
     "test_a_ragged_step"),
    ("a row too far", FILE, "is_left = (begins <= token)", "is_left = (begins <= token + 1)", "test_a_ragged_step"),
    ("one halving too few", FILE, "len(step.rows).bit_length()", "len(step.rows).bit_length() - 2",
     "test_the_last_of_many_rows_is_found"),
    ("padding has a slot", FILE, "tl.where(is_real, slot, -1)", "slot", "test_single_tokens_with_padding"),
    ("padding has a length", FILE, "tl.where(own >= 0, length, 0)", "length", "test_single_tokens_with_padding"),
    ("the last block is not copied", FILE, "(length + BLOCK_SIZE - 1) // BLOCK_SIZE", "length // BLOCK_SIZE",
     "test_a_ragged_step"),
    ("slots of 32 bits", FILE, "block.to(tl.int64) * BLOCK_SIZE", "(block * BLOCK_SIZE)",
     "test_slots_of_a_large_pool"),
    ("the first token samples", FILE, "last = tl.load(query_starts + last + 1) - 1",
     "last = tl.load(query_starts + last)", "test_a_ragged_step"),
    ("tokens put on the last one", FILE, "row.to(tl.int64) * token_stride + length", "row.to(tl.int64) * token_stride +"
     " length - 1", "test_tokens_are_stored_behind_the_last"),
    ("padding stores", FILE, "mask=exists & (row >= 0)", "mask=exists", "test_padding_stores_nothing"),
    ("no token stored as it is", FILE, "tl.maximum(token, 0)", "token", "test_tokens_are_stored_behind_the_last"),
    ("results without a line", FILE, "tl.load(report).to(tl.int64) * result_stride + index", "index",
     "test_tokens_are_stored_behind_the_last"),
    ("results by row", FILE, "owner = tl.load(sampling + index, mask=exists, other=0)", "owner = index",
     "test_tokens_are_stored_behind_the_last"),
    ("a branch's token in its parent", FILE, "row = tl.load(sampling_rows + index,", "row = tl.load(rows + owner,",
     "test_tokens_are_stored_behind_the_last"),
    ("no more sample than compute", FILE, "max(num_rows, num_sampling)", "num_rows", "test_more_sample_than_compute"),
    ("a long row copied in part", FILE, "count = tl.load(copy + 2)", "count = tl.minimum(tl.load(copy + 2), WRITTEN)",
     "test_rows_are_copied"),
    ("a row copied the other way", FILE, "source = tl.load(copy).to", "source = tl.load(copy + 1).to",
     "test_rows_are_copied"),
    ("tables exchanged", FILE, "if table == 0:", "if table == 1:", "test_rows_are_written"),
    ("written from the row's start", FILE, "row * block_stride + column + at", "row * block_stride + at",
     "test_rows_are_written"),
    ("a longer segment cut off", FILE, "range(0, count, WRITTEN)", "range(0, tl.minimum(count, WRITTEN), WRITTEN)",
     "test_rows_are_written"),
]  # fmt: skip


def make_case(
    rows: list[int], starts: list[int], counts: list[int], sampling: list[int], block_size: int, num_rows: int = 9,
    first_block: int = 0,
) -> tuple[RowTensors, StepTensors]:  # fmt: skip
    """Tables of `num_rows` in which nothing but the named rows' own tokens and blocks can be followed."""
    longest = 3 * block_size + 11
    # A row before the first: what row -1 would reach.
    tokens = torch.full((1 + num_rows, longest + 1), POISON, dtype=torch.int32)
    guarded, tokens = tokens.to(DEVICE), tokens[1:]
    blocks = torch.full((num_rows, -(-longest // block_size)), POISON, dtype=torch.int32)
    for row, start, count in zip(rows, starts, counts, strict=True):
        if row >= 0:
            tokens[row, : start + count] = torch.arange(start + count, dtype=torch.int32) + 100 * row
            used = -(-(start + count) // block_size)
            blocks[row, :used] = first_block + torch.randperm(50, dtype=torch.int32)[:used] + 50 * row

    def here(values: list[int], length: int) -> torch.Tensor:
        out = torch.full((length,), POISON, dtype=torch.int32)
        out[: len(values)] = torch.tensor(values, dtype=torch.int32)
        return out.to(DEVICE)

    def derived(length: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full((length,), POISON, dtype=dtype, device=DEVICE)

    bounds = torch.tensor([0, *counts]).cumsum(0).tolist()
    step = StepTensors(
        report=here([1], 1),
        rows=here(rows, num_rows),
        starts=here(starts, num_rows),
        query_starts=here(bounds, num_rows + 1),
        sampling=here(sampling, num_rows),
        sampling_rows=here([rows[i] for i in sampling], num_rows),
        token_ids=derived(400),
        positions=derived(400),
        slots=derived(400),
        seq_lens=derived(num_rows, torch.int32),
        sample_index=derived(num_rows),
        block_tables=torch.full(blocks.shape, POISON, dtype=torch.int32, device=DEVICE),
        results=torch.full((3, num_rows), POISON, dtype=torch.int32, device=DEVICE),
    )
    guarded[1:] = tokens.to(DEVICE)
    return RowTensors(guarded[1:], blocks.to(DEVICE)), step


def naive(tables: RowTensors, step: StepTensors, counts: list[int], num_sampling: int, block_size: int) -> StepTensors:
    """What is derived, one token at a time; the rest as it was."""
    out = StepTensors(**{each.name: getattr(step, each.name).cpu().clone() for each in fields(step)})
    tokens, blocks = tables.token_ids.cpu(), tables.block_tables.cpu()
    at = 0
    ends = []
    for i, count in enumerate(counts):
        row, start = int(step.rows[i]), int(step.starts[i])
        for position in range(start, start + count):
            real = row >= 0
            out.token_ids[at] = int(tokens[row, position]) if real else 0
            out.positions[at] = position if real else 0
            block = int(blocks[row, position // block_size]) if real else 0
            out.slots[at] = block * block_size + position % block_size if real else -1
            at += 1
        ends.append(at - 1)
        out.seq_lens[i] = start + count if row >= 0 else 0
        used = -(-int(out.seq_lens[i]) // block_size)
        out.block_tables[i, :used] = blocks[row, :used]
    for i in range(num_sampling):
        out.sample_index[i] = ends[int(step.sampling[i])]
    return out


def check(form: Any, rows: list[int], starts: list[int], counts: list[int], sampling: list[int], **case: Any) -> None:
    block_size = case.setdefault("block_size", 4)
    tables, step = make_case(rows, starts, counts, sampling, **case)
    want = naive(tables, step, counts, len(sampling), block_size)
    form.derive_inputs(tables, step, len(rows), sum(counts), len(sampling), block_size)
    for each in fields(step):
        got, expected = getattr(step, each.name).cpu(), getattr(want, each.name)
        if each.name == "block_tables":  # what lies behind a row's last block is anybody's
            width = -(-want.seq_lens[: len(rows), None] // block_size)
            used = torch.arange(got.shape[1]) < width
            got, expected = got[: len(rows)][used], expected[: len(rows)][used]
        assert torch.equal(got, expected), each.name


FORMS = [pytest.param(gpu, id="gpu")] + ([] if DEVICE == "cuda" else [pytest.param(public, id="cpu")])


@pytest.mark.parametrize("form", FORMS)
def test_a_ragged_step(form: Any) -> None:
    check(form, [3, 0, 7, 1], [0, 4, 9, 2], [5, 1, 2, 9], [0, 2, 3])
    check(form, [2], [0], [1], [0])
    check(form, [2, 4], [0, 3], [7, 1], [])


@pytest.mark.parametrize("form", FORMS)
def test_single_tokens_with_padding(form: Any) -> None:
    check(form, [3, 0, 7], [0, 4, 9], [1, 1, 1], [])
    check(form, [3, 0, -1, 7, -1, -1], [0, 4, 0, 9, 0, 0], [1] * 6, [])
    check(form, [3, 0, 7], [0, 4, 9], [1, 1, 1], [0, 2])


@pytest.mark.parametrize("form", FORMS)
def test_the_last_of_many_rows_is_found(form: Any) -> None:
    check(form, list(range(8, -1, -1)), [0] * 9, [1] * 8 + [2], [8])


@pytest.mark.parametrize("form", FORMS)
def test_more_sample_than_compute(form: Any) -> None:
    check(form, [3, 0], [0, 4], [5, 1], [0, 1, 0, 0, 1])
    check(form, [6], [4], [1], [0, 0, 0])


@pytest.mark.parametrize("form", FORMS)
def test_slots_of_a_large_pool(form: Any) -> None:
    check(form, [0, 2], [0, 3], [2, 1], [], block_size=16, first_block=1 << 28)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    start=st.integers(0, 12),
    block_size=st.sampled_from([1, 2, 8, 16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_any_step(counts: list[int], start: int, block_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    rows = torch.randperm(9)[: len(counts)].tolist()
    starts = [(start * i) % (3 * block_size + 2) for i in range(len(counts))]
    for form in (gpu,) if DEVICE == "cuda" else (gpu, public):
        check(form, rows, starts, counts, list(range(0, len(counts), 2)), block_size=block_size)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_stored_behind_the_last(form: Any) -> None:
    tables, step = make_case([3, 0, 7], [2, 4, 9], [1, 1, 1], [], 4)
    form.derive_inputs(tables, step, 3, 3, 0, 4)
    before = tables.token_ids.cpu().clone()
    # Row 5 takes another token from the logits of row 7.
    step.sampling[:3] = torch.tensor([0, 2, 2], dtype=torch.int32)
    step.sampling_rows[:3] = torch.tensor([3, 7, 5], dtype=torch.int32)
    form.store_tokens(tables, step, torch.tensor([11, -1, 12], device=DEVICE), are_some=True)
    before[3, 3], before[7, 10], before[5, 10] = 11, 0, 12
    assert torch.equal(tables.token_ids.cpu(), before)
    assert step.results.cpu().tolist() == [[POISON] * 9, [11, -1, 12] + [POISON] * 6, [POISON] * 9]


@pytest.mark.parametrize("form", FORMS)
def test_padding_stores_nothing(form: Any) -> None:
    tables, step = make_case([3, -1, 7, -1], [2, 0, 9, 0], [1] * 4, [], 4)
    form.derive_inputs(tables, step, 4, 4, 0, 4)
    before = tables.token_ids.cpu().clone()
    form.store_tokens(tables, step, torch.tensor([11, 12, 13, 14], device=DEVICE), are_some=False)
    before[3, 3], before[7, 10] = 11, 13
    assert torch.equal(tables.token_ids.cpu(), before)
    stride = tables.token_ids.stride(0)
    row_before_the_first = tables.token_ids.as_strided((stride,), (1,), tables.token_ids.storage_offset() - stride)
    assert (row_before_the_first == POISON).all()
    assert step.results[1, :4].tolist() == [11, 12, 13, 14]


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_written(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WRITTEN", 4)
    tables, _ = make_case([], [], [], [], 4)
    tokens, blocks = tables.token_ids.cpu().clone(), tables.block_tables.cpu().clone()
    values = torch.arange(40, dtype=torch.int32, device=DEVICE)
    listed = [(0, 3, 0, 0, 11), (1, 3, 0, 11, 2), (1, 5, 2, 13, 1), (0, 8, 7, 14, 4), (1, 0, 4, 18, 1)]
    segments = torch.tensor([[*segment, *[POISON] * (SEGMENT - 5)] for segment in listed], dtype=torch.int32)
    for table, row, column, offset, count in listed:
        target = blocks if table else tokens
        target[row, column : column + count] = values[offset : offset + count].cpu()
    form.write_rows(tables, segments.to(DEVICE), values)
    assert torch.equal(tables.token_ids.cpu(), tokens) and torch.equal(tables.block_tables.cpu(), blocks)


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_copied(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WRITTEN", 2)
    monkeypatch.setattr(gpu, "COPIERS", 3)
    tables, _ = make_case([1, 4, 8], [0, 0, 0], [9, 1, 23], [], 4)
    tokens, blocks = tables.token_ids.cpu().clone(), tables.block_tables.cpu().clone()
    listed = [(1, 0, 9, 3), (1, 7, 8, 2), (8, 3, 23, 6), (4, 5, 1, 0)]
    for source, target, num_tokens, num_blocks in listed:
        tokens[target, :num_tokens] = tokens[source, :num_tokens]
        blocks[target, :num_blocks] = blocks[source, :num_blocks]
    form.copy_rows(tables, torch.tensor(listed, dtype=torch.int32, device=DEVICE))
    assert torch.equal(tables.token_ids.cpu(), tokens) and torch.equal(tables.block_tables.cpu(), blocks)


def test_nothing_is_launched_for_nothing() -> None:
    tables, step = make_case([], [], [], [], 4)
    gpu.write_rows(tables, torch.empty(0, SEGMENT, dtype=torch.int32, device=DEVICE), step.rows)
    gpu.derive_inputs(tables, step, 0, 0, 0, 4)
    gpu.copy_rows(tables, torch.empty(0, COPY, dtype=torch.int32, device=DEVICE))
    gpu.store_tokens(tables, step, torch.empty(0, dtype=torch.int64, device=DEVICE), are_some=False)
    assert (step.results == POISON).all() and (tables.token_ids == POISON).all()
