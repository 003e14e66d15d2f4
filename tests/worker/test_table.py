"""The rows of a worker, plan by plan, and the batch that is built from them."""

import numpy as np
import pytest
import torch
from row_tables import SIZE, compute, counts, state
from worker_plans import admit, plan

from quire.worker.batch import StepInputs
from quire.worker.checks import PlanError
from quire.worker.table import RowTable
from quire.worker.transfer import DirectTransfer
from quire.worker.work import Work


@pytest.fixture
def table() -> RowTable:
    return RowTable(SIZE, "cpu")


def test_a_row_lives(table):
    work = table.apply(plan([2], [6], [admit(2, [5, 6, 7, 8, 9, 10], [3, 1])]))
    assert (work.rows.tolist(), work.num_tokens.tolist(), work.starts.tolist()) == ([2], [6], [0])
    assert (work.sampling.tolist(), work.sampling_rows.tolist()) == ([0], [2])
    assert table.token_ids[2, :6].tolist() == [5, 6, 7, 8, 9, 10]
    assert table.block_table[2, :2].tolist() == [3, 1]
    assert counts(table, 2) == (6, 0, 6, 2)
    compute(table, work, 42)
    assert counts(table, 2) == (7, 6, 6, 2)
    assert table.token_ids[2, 6] == 42

    for token in (43, 44):
        compute(table, table.apply(plan([2])), token)
    assert counts(table, 2) == (9, 8, 6, 2)
    work = table.apply(plan([2], extend=[(2, 7)]))
    assert table.block_table[2, :3].tolist() == [3, 1, 7]
    compute(table, work, 45)
    assert counts(table, 2) == (10, 9, 6, 3)

    table.apply(plan(retire=[2]))
    assert counts(table, 2) == (0, 0, 0, 0)


def test_only_rows_that_reach_their_last_token_sample(table):
    work = table.apply(plan([1, 0], [4, 3], [admit(0, [1, 2, 3], [0]), admit(1, [1] * 9, [1, 2, 3])]))
    assert work.sampling_rows.tolist() == [0]
    compute(table, work, 9)
    assert counts(table, 1) == (9, 4, 9, 3)
    work = table.apply(plan([1, 0], [5, 1]))
    assert work.sampling_rows.tolist() == [1, 0]


def test_a_plan_may_retire_admit_and_extend_a_row_at_once(table):
    table.apply(plan(admits=[admit(1, [1, 2], [0])]))
    work = table.apply(plan([1], [9], [admit(1, [7] * 9, [4])], retire=[1], extend=[(1, 5), (1, 6)]))
    assert table.block_table[1, :3].tolist() == [4, 5, 6]
    assert work.sampling.tolist() == [0]


def test_extensions_of_several_rows_interleave(table):
    table.apply(plan(admits=[admit(0, [1], [0]), admit(3, [1], [1, 2])]))
    table.apply(plan(extend=[(3, 3), (0, 4), (3, 5), (0, 6), (0, 7)]))
    assert table.block_table[0, :4].tolist() == [0, 4, 6, 7]
    assert table.block_table[3, :4].tolist() == [1, 2, 3, 5]
    assert table.counts.num_blocks.tolist() == [4, 0, 0, 4]


def test_a_token_that_could_not_be_sampled_is_still_a_token(table):
    work = table.apply(plan([0], [2], [admit(0, [1, 2], [0])]))
    compute(table, work, -1)
    assert table.token_ids[0, 2] == 0


def test_the_longest_sequence_may_sample_one_token_more(table):
    work = table.apply(plan([0], [20], [admit(0, [1] * 20, [0, 1, 2, 3, 4])]))
    compute(table, work, 5)
    assert counts(table, 0) == (21, 20, 20, 5)
    with pytest.raises(PlanError, match="computes 1 tokens after 20"):
        table.apply(plan([0]))


def test_clear_empties_every_row(table):
    table.apply(plan(admits=[admit(0, [1], [0], bias_token_ids=[1], bias_values=[1.0]), admit(3, [1], [1])]))
    table.clear()
    assert table.counts.num_known.tolist() == [0] * 4
    table.apply(plan(admits=[admit(0, [1], [0])]))


NAN = float("nan")
IMPOSSIBLE = [
    (plan(retire=[4]), "row 4 is not in 0 to 3"),
    (plan(retire=[-1]), "row -1 is not in"),
    (plan(retire=[2]), "row 2 is retired but empty"),
    (plan(retire=[0, 0]), "row 0 is retired 2 times"),
    (plan(admits=[admit(4, [1], [1])]), "row 4 is not in"),
    (plan(admits=[admit(0, [1], [1])]), "row 0 is admitted but occupied"),
    (plan(admits=[admit(2, [1], [1]), admit(2, [1], [1])]), "row 2 is admitted but occupied"),
    (plan(admits=[admit(2, [], [1], num_prompt=1)]), "with 0 tokens; 1 to 20 fit"),
    (plan(admits=[admit(2, [1] * 21, [1])]), "with 21 tokens"),
    (plan(admits=[admit(2, [1], [1], num_prompt=2)]), "2 prompt and 0 computed of 1"),
    (plan(admits=[admit(2, [1], [1], num_prompt=0)]), "0 prompt"),
    (plan(admits=[admit(2, [1], [1], num_computed=2)]), "2 computed of 1"),
    (plan(admits=[admit(2, [1, 2], [1], num_computed=-1)]), "-1 computed"),
    (plan(admits=[admit(2, [1, 100], [1])]), "row 2: token id 100 is not in 0 to 99"),
    (plan(admits=[admit(2, [-1], [1])]), "token id -1"),
    (plan(admits=[admit(2, [1], [10])]), "block id 10 is not in 0 to 9"),
    (plan(admits=[admit(2, [1] * 5, [1], num_computed=5)]), "1 blocks for 5 computed tokens"),
    (plan(admits=[admit(2, [1], [1, 2, 3, 4, 5, 6])]), "at most 5 fit"),
    (plan(extend=[(2, 1)]), "row 2 is extended but empty"),
    (plan(extend=[(0, 10)]), "block id 10"),
    (plan(extend=[(0, 1), (1, 1), (0, 2), (0, 3)]), "row 0 has 6 blocks; 5 at most"),
    (plan([2]), "row 2 is computed but empty"),
    (plan([0, 0]), "row 0 is computed 2 times"),
    (plan([0], [1, 1]), "1 rows but 2 num_tokens"),
    (plan([0], [0]), "row 0 computes 0 tokens"),
    (plan([0], [-3]), "row 0 computes -3 tokens"),
    (plan([0], [11]), "computes 11 tokens after 0, with 10 known"),
    (plan([1], [9]), "with 10 known, 2 blocks of 4"),
    (plan([0, 3], [10, 15], [admit(3, [1] * 15, [6, 7, 8, 9])]), "a step of 25 tokens; 24 at most"),
    (plan([0], retire=[0]), "row 0 is computed but empty"),
]
IMPOSSIBLE += [
    (plan(admits=[admit(2, [1], [1], **{name: value})]), f"row 2: {name} is .*out of range")
    for name, value in [
        ("temperature", -1),
        ("temperature", NAN),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", NAN),
        ("repetition_penalty", 0),
        ("presence_penalty", np.inf),
        ("frequency_penalty", NAN),
        ("min_tokens", -1),
        ("logprobs", -1),
    ]
]
IMPOSSIBLE += [
    (plan(admits=[admit(2, [1], [1], stop_token_ids=[100])]), "stop_token_ids holds an id outside"),
    (plan(admits=[admit(2, [1], [1], bias_token_ids=[-1], bias_values=[1])]), "bias_token_ids holds"),
    (plan(admits=[admit(2, [1], [1], bias_token_ids=[1])]), "1 bias_token_ids need"),
    (plan(admits=[admit(2, [1], [1], bias_token_ids=[1], bias_values=[NAN])]), "finite bias_values"),
]


@pytest.mark.parametrize(("impossible", "message"), IMPOSSIBLE)
def test_an_impossible_plan_is_refused_and_leaves_no_trace(table, impossible, message):
    table.apply(plan(admits=[admit(0, [1] * 10, [0, 1, 2]), admit(1, [1] * 10, [3, 4])]))
    before = state(table)
    good_start = admit(3, [9], [9]) if 3 not in [a.row for a in impossible.admits] else None
    if good_start is not None:  # what comes before the fault must not be applied either
        impossible.admits.insert(0, good_start)
    with pytest.raises(PlanError, match=message):
        table.apply(impossible)
    assert state(table) == before


def test_bytes_that_are_no_integers_are_refused(table):
    torn = plan()
    torn.rows = b"\0\0\0"
    with pytest.raises(PlanError, match="3 bytes are no array"):
        table.apply(torn)


def naive_batch(table: RowTable, work) -> dict:
    """One token at a time."""
    ids, positions, slots, ends, sample_index = [], [], [], [0], []
    for i, row in enumerate(work.rows):
        for position in range(work.starts[i], work.starts[i] + work.num_tokens[i]):
            ids.append(int(table.token_ids[row, position]))
            positions.append(int(position))
            block = int(table.block_table[row, position // SIZE.block_size])
            slots.append(block * SIZE.block_size + int(position) % SIZE.block_size)
        ends.append(len(ids))
        if i in work.sampling:
            sample_index.append(len(ids) - 1)
    return dict(token_ids=ids, positions=positions, slots=slots, query_starts=ends, sample_index=sample_index)


@pytest.mark.parametrize(
    ("rows", "num_tokens"),
    [([0, 1, 2], []), ([2, 0], [1, 1]), ([1], [5]), ([2, 1, 0], [7, 1, 10]), ([0, 1], [9, 10]), ([1, 2], [1, 7])],
)
def test_a_batch_equals_one_built_token_by_token(table, rows, num_tokens):
    admits = [
        admit(0, range(10, 20), [9, 0, 8]),
        admit(1, range(20, 30), [1, 7, 2]),
        admit(2, range(30, 45), [6, 3, 5, 4], num_computed=8),
    ]
    table.apply(plan(admits=admits))
    work = table.apply(plan(rows, num_tokens))
    naive = naive_batch(table, work)
    batch = compute(table, work, *range(len(work.sampling)))
    if work.is_decode:
        assert batch.sample_index is None and naive.pop("sample_index") == list(range(len(rows)))
    assert batch.rows.query_starts.tolist() == naive.pop("query_starts")
    for name, wanted in naive.items():
        assert getattr(batch, name).tolist() == wanted, name
        assert getattr(batch, name).dtype is torch.int64, name
    ends = work.starts + work.num_tokens
    assert batch.rows.seq_lens.tolist() == ends.tolist()
    width = -(-max(ends) // SIZE.block_size)
    assert batch.rows.block_tables.tolist() == table.block_table[work.rows, :width].tolist()
    assert batch.rows.block_tables.dtype is torch.int32
    assert batch.rows.query_starts.dtype == batch.rows.seq_lens.dtype == np.int32


def test_as_many_rows_as_before_are_not_the_same_rows(table):
    compute(table, table.apply(plan([0, 1], [2, 2], [admit(0, [1, 2], [0]), admit(1, [3, 4], [1])])), 5, 6)
    for rows in ([0, 1], [0, 1], [1, 0]):
        work = table.apply(plan(rows))
        assert work.rows.tolist() == work.sampling_rows.tolist() == rows and work.is_decode
    with pytest.raises(PlanError, match="row 2 is computed but empty"):
        table.apply(plan([0, 2]))
    table.apply(plan(retire=[1]))
    with pytest.raises(PlanError, match="row 1 is computed but empty"):
        table.apply(plan([0, 1]))


def test_a_step_is_filled_with_padding_whatever_was_there_before(table):
    admits = [admit(row, [7 + row] * 3, [row]) for row in range(4)]
    inputs = StepInputs(table, DirectTransfer())

    def load(work: Work, padded: int) -> tuple[list[int], list[int], list[int], list[int]]:
        inputs.send(inputs.load(0, work, padded), work.changes)
        batch = inputs.static_batch(max(padded, len(work.rows)), False)
        table.advance(work)
        assert batch.rows.static and batch.sample_index is None and (batch.rows.seq_lens == SIZE.max_model_len).all()
        tensors = (inputs.step.rows[:4], batch.token_ids, batch.positions, batch.slots)
        return tuple(tensor.tolist() for tensor in tensors)

    compute(table, table.apply(plan(range(4), [3] * 4, admits)), 30, 31, 32, 33)
    assert load(table.apply(plan([3, 0, 1, 2])), 4) == ([3, 0, 1, 2], [33, 30, 31, 32], [3] * 4, [15, 3, 7, 11])
    table.apply(plan(extend=[(2, 9)]))
    assert load(table.apply(plan([2])), 4) == ([2, -1, -1, -1], [0] * 4, [4, 0, 0, 0], [36, -1, -1, -1])
    assert inputs.step.seq_lens.tolist() == [5, 0, 0, 0]
