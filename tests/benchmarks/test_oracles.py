"""What the kernels are checked against on a GPU, against the naive twins; and the counts that rates are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import oracles
from benchmarks.oracles import NOWHERE, Paged, PagedCase, poisoned_allocations, relative_error, worst
from quire.kernels import reference

CPU = torch.device("cpu")
SPECS = {
    "mixed": Paged(((5, 1), (21, 21), (40, 7), (64, 1), (18, 17))),
    "window": Paged(((37, 1), (50, 20), (3, 3)), window=7),
    "ALiBi": Paged(((37, 1), (20, 20)), alibi=True),
    "float8": Paged(((37, 1), (20, 20)), float8=True),
    "shared": Paged(((40, 1), (33, 1), (50, 1)), prefix=32),
}


def case(spec: Paged, **changes: Any) -> PagedCase:
    import dataclasses

    small = {"heads": (4, 2), "size": 8, "num_layers": 3, "used": 2, "dtype": torch.float32}
    return PagedCase(dataclasses.replace(spec, **(small | changes)), CPU)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_wide_reference_is_the_twin(spec: Paged) -> None:
    made = case(spec)
    for which in range(2):
        twin = reference.paged_attention(
            made.queries[which], made.layers[which], made.rows(), made.scale, spec.window, made.slopes, made.kv_scales
        )
        assert made.error(twin, which) < 1e-6
        wrong = twin.clone()
        wrong[made.tokens()[0]] *= 1.1
        assert made.error(wrong, which) > 1e-3
        wrong[-1] = torch.nan
        assert not made.error(wrong, which) < 1


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_nothing_is_there_but_what_is_seen(spec: Paged) -> None:
    made = case(spec)
    slots = set()
    for row, (length, new) in enumerate(spec.rows):
        first = 0 if spec.window is None else max(0, length - new - spec.window + 1)
        seen = {(int(made.tables[row, p // 16]), p % 16) for p in range(first, length)}
        assert NOWHERE not in {block for block, _ in seen} and len(seen) == length - first
        shared = {(int(made.tables[0, p // 16]), p % 16) for p in range(spec.prefix)}
        assert not (slots & seen) - shared
        slots |= seen
    numbers = made.pool.float().isfinite()
    assert int(numbers.sum()) == made.spec.used * len(slots) * 2 * 2 * 8
    assert made.spec.num_bytes == len(slots) * made.spec.token_bytes + 2 * made.queries[0].numel() * 4
    made.clean()
    assert all(layer.float().isfinite().all() for layer in made.layers)
    assert int(made.clean_tables().max()) < len(made.pool)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_pairs_are_counted(window: int | None) -> None:
    rows = ((1, 1), (9, 9), (30, 7), (12, 1))
    pairs = sum(
        window is None or at - key < window
        for length, new in rows
        for at in range(length - new, length)
        for key in range(at + 1)
    )
    spec = Paged(rows, window=window)
    assert spec.visible_pairs == pairs and spec.flops == 4 * 32 * 128 * pairs and spec.num_prompts == 2


def test_tokens_are_sampled_where_there_are_many() -> None:
    made = case(Paged(((300, 300), (70, 1))))
    first, second = made.sampled()
    assert {0, 127, 128, 299} <= set(first.tolist()) and len(first) < 60 and second.tolist() == [0]
    assert made.tokens()[-1] == 300


def test_relative_error() -> None:
    want = torch.tensor([3.0, 4.0])
    assert relative_error(want, want) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), want) == pytest.approx(0.1)
    assert not relative_error(torch.tensor([3.0, torch.nan]), want) <= 1
    assert worst(0.1, 0.3, 0.2) == 0.3
    assert all(not worst(*errors) <= 1 for errors in ((0.1, float("nan")), (float("nan"), 0.1)))


def test_what_is_allocated_is_poisoned() -> None:
    like = torch.zeros(3)
    with poisoned_allocations():
        made = [torch.empty(2, 2), torch.empty_like(like), like.new_empty(4), torch.empty_strided((2, 2), (2, 1))]
        number = torch.empty(3, dtype=torch.int64)
        assert torch.zeros(3).eq(0).all()
    assert all(x.isnan().all() for x in made) and number.eq(NOWHERE).all()
    assert oracles.poison(torch.zeros(2, dtype=torch.float8_e4m3fn)).float().isnan().all()
