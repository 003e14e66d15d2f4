"""Rows that become copies of others, are told what to go on with, and get blocks in place of those they share: on the
host, and as a device is told of it."""

from __future__ import annotations

import pytest
from row_tables import SIZE, compute, counts, state
from worker_plans import admit, packed, plan

from quire.kernels import dispatch
from quire.protos import worker_pb2
from quire.worker.checks import PlanError
from quire.worker.table import RowTable


@pytest.fixture(params=["host", "device"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RowTable:
    if request.param == "device":
        pytest.importorskip("triton")
        monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    return RowTable(SIZE, "cpu")


def tokens(table: RowTable, row: int) -> list[int]:
    return table.token_ids[row, : counts(table, row)[0]].tolist()


def blocks(table: RowTable, row: int) -> list[int]:
    count = counts(table, row)[3]
    assert table.host_blocks[row, :count].tolist() == table.block_table[row, :count].tolist()
    return table.block_table[row, :count].tolist()


def test_samples_of_one_prompt(table: RowTable) -> None:
    prompt = [5, 6, 7, 8, 9, 10]
    first = admit(1, prompt, [3, 4], temperature=1.0, seed=7, bias_token_ids=[2], bias_values=[1.0])
    work = table.apply(plan([1], [6], [first, admit(2, [1, 2, 3], [5])], branches=[(1, 3, 8), (1, 0, 2**63)]))
    assert (work.sampling.tolist(), work.sampling_rows.tolist()) == ([0, 0, 0], [1, 3, 0])
    assert work.num_branches == 2 and not work.is_decode
    batch = compute(table, work, 40, 41, 42)
    assert batch.sample_index is not None and batch.sample_index.tolist() == [5, 5, 5]
    for row, token in ((1, 40), (3, 41), (0, 42)):
        assert counts(table, row) == (7, 6, 6, 2)
        assert tokens(table, row) == [*prompt, token] and blocks(table, row) == [3, 4]
    settings = table.sampler._settings
    assert settings["seed"].tolist() == [2**63, 7, 0, 8]
    assert settings["temperature"].tolist() == [1, 1, 0, 1] and sorted(table.sampler._lists) == [0, 1, 3]

    # Two of the three get a copy of the last block, which the third may then write.
    work = table.apply(plan([1, 3, 0], replaced=[(1, 1, 6), (0, 1, 7)]))
    assert work.is_decode
    batch = compute(table, work, 50, 51, 52)
    assert batch.slots.tolist() == [4 * 6 + 2, 4 * 4 + 2, 4 * 7 + 2]
    assert batch.token_ids.tolist() == [40, 41, 42]
    assert [blocks(table, row) for row in (1, 3, 0)] == [[3, 6], [3, 4], [3, 7]]


def test_a_prompt_of_one_token_branches(table: RowTable) -> None:
    work = table.apply(plan([0], [], [admit(0, [5], [3])], branches=[(0, 2, 1)]))
    assert not work.is_decode
    compute(table, work, 8, 9)
    assert tokens(table, 0) == [5, 8] and tokens(table, 2) == [5, 9]
    assert counts(table, 2) == (2, 1, 1, 1)


def test_branches_beside_rows_that_go_on(table: RowTable) -> None:
    compute(table, table.apply(plan([2], [2], [admit(2, [1, 2], [0])])), 3)
    work = table.apply(plan([2, 1], [1, 4], [admit(1, [5] * 5, [1, 2], num_computed=1)], branches=[(1, 0, 4)]))
    assert work.sampling.tolist() == [0, 1, 1] and work.sampling_rows.tolist() == [2, 1, 0]
    batch = compute(table, work, 20, 21, 22)
    assert batch.sample_index is not None and batch.sample_index.tolist() == [0, 4, 4]
    assert [tokens(table, row)[-1] for row in (2, 1, 0)] == [20, 21, 22]
    assert counts(table, 0) == counts(table, 1) == (6, 5, 5, 2)


def test_a_branch_has_the_blocks_that_came_with_its_plan(table: RowTable) -> None:
    compute(table, table.apply(plan([0], [4], [admit(0, [5] * 6, [3])])))
    compute(table, table.apply(plan([0], [2], extend=[(0, 9)], branches=[(0, 1, 0)])), 1, 2)
    assert blocks(table, 1) == [3, 9]


def beams(table: RowTable) -> None:
    """Rows 0 and 1, after the same prompt and one token each."""
    first = admit(0, [5, 6, 7], [3], logprobs=4, min_tokens=2, stop_token_ids=[9])
    work = table.apply(plan([0], [3], [first], branches=[(0, 1, 0)]))
    compute(table, work, 30, 30)
    compute(table, table.apply(plan([0, 1], told=[(1, 31)], replaced=[(1, 0, 4)])), 40, 41)
    assert tokens(table, 0) == [5, 6, 7, 30, 40] and tokens(table, 1) == [5, 6, 7, 31, 41]


def test_beams_change_places(table: RowTable) -> None:
    beams(table)
    # Row 0 goes on twice, row 1 not at all: the second child takes the place of row 1.
    changed = plan([0, 1], retire=[1], forks=[(0, 1, 5)], told=[(0, 44), (1, 45)], extend=[(0, 7), (1, 8)])
    batch = compute(table, table.apply(changed), 50, 51)
    assert tokens(table, 0) == [5, 6, 7, 30, 44, 50] and tokens(table, 1) == [5, 6, 7, 30, 45, 51]
    assert blocks(table, 0) == [3, 7] and blocks(table, 1) == [3, 8]
    assert batch.token_ids.tolist() == [44, 45] and batch.slots.tolist() == [28, 32]
    assert counts(table, 0) == counts(table, 1) == (6, 5, 3, 2)
    assert table.sampler._settings["seed"].tolist()[:2] == [0, 5]
    assert table.sampler._settings["logprobs"].tolist()[:2] == [4, 4] and sorted(table.sampler._lists) == [0, 1]


def test_a_parent_with_children_in_several_rows(table: RowTable) -> None:
    beams(table)
    changed = plan([1, 2, 3], retire=[0], forks=[(1, 2, 0), (1, 3, 0)], told=[(2, 46), (3, 47)],
                   extend=[(1, 5), (2, 6), (3, 7)])  # fmt: skip
    compute(table, table.apply(changed), 50, 51, 52)
    assert [tokens(table, row)[-2:] for row in (1, 2, 3)] == [[41, 50], [46, 51], [47, 52]]
    assert [blocks(table, row) for row in (1, 2, 3)] == [[4, 5], [4, 6], [4, 7]]


def test_what_is_replaced_in_a_table_that_has_just_come(table: RowTable) -> None:
    """Samples that come back together share their last block until each writes."""
    changed = plan(
        [0, 1],
        admits=[admit(0, [1] * 6, [3, 4], 3, 5), admit(1, [1] * 6, [3, 4], 3, 5)],
        replaced=[(1, 1, 8)],
        extend=[(0, 6)],
    )
    compute(table, table.apply(changed), 2, 3)
    assert blocks(table, 0) == [3, 4, 6] and blocks(table, 1) == [3, 8]


IMPOSSIBLE = [
    (dict(forks=[(0, 4, 0)]), "row 4 is not in 0 to 3"),
    (dict(forks=[(-1, 2, 0)]), "row -1 is not in"),
    (dict(branches=[(0, 4, 0)]), "row 4 is not in"),
    (dict(forks=[(2, 3, 0)]), "row 2 is forked but empty"),
    (dict(forks=[(0, 1, 0)]), "row 1 is to become a copy of row 0 but occupied; retire it first"),
    (dict(forks=[(0, 2, 0), (1, 2, 0)]), "row 2 is to become a copy of row 1 but occupied"),
    (dict(forks=[(0, 2, 0), (2, 3, 0)]), "row 2 is forked in the step in which it is new"),
    (dict(forks=[(2, 3, 0)], admits=[admit(2, [1], [1])]), "row 2 is forked in the step in which it is new"),
    (dict(forks=[(0, 2, 0)], retire=[0]), "row 0 is forked but empty"),
    (dict(branches=[(0, 2, 0)]), "row 0 branches in a step in which it samples nothing"),
    (dict(rows=[1], extend=[(1, 6)], branches=[(0, 2, 0)]), "row 0 branches in a step in which it samples nothing"),
    (dict(rows=[3], num_tokens=[1], admits=[admit(3, [1, 1], [1])], branches=[(3, 2, 0)]), "row 3 branches in a step"),
    (dict(rows=[0, 2], branches=[(0, 2, 0)]), "row 2 is computed but empty"),
    (dict(rows=[0], extend=[(0, 5)], branches=[(0, 1, 0)]), "row 1 is to become a copy of row 0 but occupied"),
    (
        dict(rows=[0], extend=[(0, 5)], branches=[(0, 2, 0), (0, 2, 1)]),
        "row 2 is to become a copy of row 0 but occupied",
    ),
    (
        dict(rows=[0], extend=[(0, 5)], forks=[(1, 2, 0)], branches=[(0, 2, 0)]),
        "row 2 is to become a copy of row 0 but occupied",
    ),
    (dict(told=[(4, 1)]), "row 4 is not in 0 to 3"),
    (dict(told=[(2, 1)]), "row 2 is told a token but empty"),
    (dict(told=[(0, 100)]), "token id 100 is not in 0 to 99"),
    (dict(told=[(0, -1)]), "token id -1"),
    (dict(told=[(0, 1), (1, 1), (0, 2)]), "row 0 is told a token 2 times"),
    (dict(told=[(3, 1)], admits=[admit(3, [1, 2], [1], 1, 1)]), "row 3 is told its last token but did not sample it"),
    (dict(told=[(3, 1)], admits=[admit(3, [1, 2], [1])]), "of 2 known tokens 2 are prompt and 0 computed"),
    (dict(replaced=[(4, 0, 1)]), "row 4 is not in 0 to 3"),
    (dict(replaced=[(2, 0, 1)]), "row 2 is given another block but empty"),
    (dict(replaced=[(0, 0, 10)]), "block id 10 is not in 0 to 9"),
    (dict(replaced=[(0, 1, 1)]), "entry 1 of row 0 is replaced, which has 1 blocks"),
    (dict(replaced=[(0, -1, 1)]), "entry -1 of row 0"),
    (dict(replaced=[(0, 1, 1)], extend=[(0, 2)]), "entry 1 of row 0 is replaced, which has 1 blocks"),
    (dict(replaced=[(1, 0, 1), (1, 0, 2)]), "table entry 5 is replaced 2 times"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_an_impossible_change_is_refused_and_leaves_no_trace(table: RowTable, change: dict, message: str) -> None:
    beams(table)
    before = state(table)
    with pytest.raises(PlanError, match=message):
        table.apply(plan(**change))
    # Nor does what comes before it in a plan.
    good = plan(retire=[1], forks=[(0, 1, 7)], told=[(0, 3)], replaced=[(1, 0, 9)], extend=[(0, 5)])
    with pytest.raises(PlanError, match="row 2 is computed but empty"):
        table.apply(worker_pb2.StepPlan.FromString(good.SerializeToString() + plan([2]).SerializeToString()))
    assert state(table) == before


@pytest.mark.parametrize("name", ["told", "replaced"])
def test_torn_records_are_refused(table: RowTable, name: str) -> None:
    torn = worker_pb2.StepPlan(**{name: packed([1, 1, 1, 1, 1])})
    with pytest.raises(PlanError, match="5 integers do not make up records"):
        table.apply(torn)
