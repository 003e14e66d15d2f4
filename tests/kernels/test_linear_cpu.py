"""The product whose rows do not depend on each other, on a CPU: bit for bit, whatever the batch and the threads.

The rows are each other's halves with opposite signs, against equal weights: exact sums are zero, and what comes out are
the rounding errors of one order of summation. Ordinary results in 16 bits would hide most other orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from quire.kernels import linear, reference
from quire.kernels.cpu import linear as cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 192), (768, 2304), (2048, 768), (100, 33), (768, 1000), (7, 5)]
"""Inputs and outputs."""
ROWS = 70

FILE = "kernels/cpu/linear.py"
BUGS = [
    ("any size will do", FILE, "torch.equal(multiply(size, bias), wanted[:1].expand(size, -1)))", "True)",
     "test_sizes_that_sum_in_another_order_are_not_used"),
    ("one thread's order for all", FILE,
     "    threads = torch.get_num_threads()\n    sizes", "    threads = 1\n    sizes",
     "test_what_was_found_for_some_threads_is_not_used_on_others"),
    ("last resort on all threads", FILE, "    if not sizes and threads > 1:", "    if not sizes and threads > 2:",
     "test_the_last_resort"),
    ("rows that fill no piece lost", FILE, "        num_rows -= found[-1]", "        num_rows -= max(found[-1], 3)",
     "test_pieces_hold_all_rows"),
    ("bias forgotten", FILE, "[_multiply(piece, weight, bias) for piece", "[_multiply(piece, weight, None) for piece",
     "test_equals_the_twin"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Tests here change their number."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    cpu.agreeing_sizes.cache_clear()


def cancelling(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    order, odd = torch.randperm(inputs), inputs % 2
    x, weight = torch.randn(ROWS, inputs // 2).to(dtype), torch.randn(outputs, inputs // 2).to(dtype)
    x, weight = torch.cat([x, -x], 1), torch.cat([weight, weight], 1)
    return F.pad(x, (0, odd))[:, order], F.pad(weight, (0, odd))[:, order].contiguous()


def packed(weight: torch.Tensor) -> torch.Tensor:
    if not cpu._in_onednn(weight.dtype):
        pytest.skip("oneDNN does not compute this type on this machine")
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


@pytest.mark.parametrize("dtype, layout", [*((dtype, "plain") for dtype in DTYPES), (torch.bfloat16, "packed")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    """Whatever the number of rows, a row's place among them and the threads: it is what it is alone, on one thread."""
    inputs, outputs = shape
    if dtype == torch.float16 and not cpu._in_onednn(dtype):
        outputs = min(outputs, 40)  # slow without the instructions for it
    x, weight = cancelling(inputs, outputs, dtype)
    if layout == "packed":
        weight = packed(weight)
    torch.set_num_threads(1)
    bias = linear.linear_invariant(x[:1], weight)[0].roll(1)  # as small as the errors
    alone = torch.cat([linear.linear_invariant(row, weight, bias) for row in x.split(1)])
    assert inputs < 64 or (alone != bias).any()
    large = inputs * outputs > 10000
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for rows in (1, 2, 3, 5, 8, 13, 16, 17, 24, 33, 49, 63, 64, 65, 70) if large else range(1, ROWS + 1):
            start = (rows * 37) % (ROWS - rows + 1)
            got = linear.linear_invariant(x[start : start + rows], weight, bias)
            assert torch.equal(got, alone[start : start + rows]), (count, rows)
        for shift in range(0, ROWS, 9 if large or count > 1 else 1):
            got = linear.linear_invariant(x.roll(shift, 0), weight, bias)
            assert torch.equal(got, alone.roll(shift, 0)), (count, shift)


def test_the_rows_of_this_test_tell_orders_apart() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = cancelling(64, 192, dtype)
        other = torch.randperm(64)
        assert not torch.equal(F.linear(x, weight), F.linear(x[:, other], weight[:, other].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 192), (100, 33), (1, 1), (33, 100)], ids=str)
def test_equals_the_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs, outputs = shape
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    # Rows that lie apart, in every second column.
    x = torch.randn(ROWS, 2 * inputs).to(dtype)[:, ::2]
    for rows in (0, 1, 3, 5, 17, 70):
        for b in (None, bias):
            got, want = linear.linear_invariant(x[:rows], weight, b), reference.linear_invariant(x[:rows], weight, b)
            assert got.dtype == dtype and got.shape == (rows, outputs)
            eps = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(got, want, rtol=eps, atol=2 * eps * inputs**0.5)


def test_a_packed_weight_is_the_same_weight() -> None:
    weight, bias = torch.randn(96, 64).bfloat16(), torch.randn(96).bfloat16()
    x = torch.randn(5, 64).bfloat16()
    torch.testing.assert_close(
        linear.linear_invariant(x, packed(weight), bias), linear.linear_invariant(x, weight, bias)
    )


@given(num_rows=st.integers(0, 300), sizes=st.sets(st.sampled_from(cpu.SIZES), min_size=1))
def test_pieces_hold_all_rows(num_rows: int, sizes: set[int]) -> None:
    found = cpu.pieces(num_rows, tuple(sorted(sizes)))
    assert set(found) <= sizes
    assert all(size <= num_rows - sum(found[:i]) for i, size in enumerate(found[:-1]))
    assert num_rows <= sum(found) and (not found or sum(found[:-1]) < num_rows)


def test_which_pieces() -> None:
    assert cpu.pieces(1, (1, 2, 4, 8)) == [1]
    assert cpu.pieces(1, (2, 4, 8)) == [2]
    assert cpu.pieces(5, cpu.SIZES) == [8]
    assert cpu.pieces(17, cpu.SIZES) == [16, 1]
    assert cpu.pieces(25, cpu.SIZES) == [32]
    assert cpu.pieces(150, cpu.SIZES) == [64, 64, 16, 8]


# -- libraries worse than those at hand


def reversed_sums(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return cpu_multiply(x.flip(1), weight.flip(1).contiguous(), bias)


cpu_multiply = cpu._multiply


def test_sizes_that_sum_in_another_order_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return (reversed_sums if len(x) >= 16 else cpu_multiply)(x, weight, bias)

    monkeypatch.setattr(cpu, "_multiply", multiply)
    for dtype in (torch.float32, torch.bfloat16):
        cpu.agreeing_sizes.cache_clear()
        x, weight = cancelling(768, 96, dtype)
        assert max(cpu.agreeing_sizes(96, 768, dtype, False, False, torch.get_num_threads())) == 8
        got = linear.linear_invariant(x, weight)
        assert all(torch.equal(linear.linear_invariant(x[i : i + 1], weight)[0], got[i]) for i in range(ROWS))


def test_what_was_found_for_some_threads_is_not_used_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return (reversed_sums if torch.get_num_threads() == 2 else cpu_multiply)(x, weight, bias)

    monkeypatch.setattr(cpu, "_multiply", multiply)
    cpu.agreeing_sizes.cache_clear()
    x, weight = cancelling(768, 96, torch.float32)
    torch.set_num_threads(1)
    alone = linear.linear_invariant(x, weight)
    torch.set_num_threads(2)
    assert not cpu.agreeing_sizes(96, 768, torch.float32, False, False, 2)
    assert torch.equal(linear.linear_invariant(x, weight), alone)
    assert torch.get_num_threads() == 2


def test_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose order depends on the place of a row, and on threads."""

    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if torch.get_num_threads() > 1:
            return reversed_sums(x, weight, bias)
        return torch.cat([cpu_multiply(x[:1], weight, bias), reversed_sums(x[1:], weight, bias)])

    monkeypatch.setattr(cpu, "_multiply", multiply)
    cpu.agreeing_sizes.cache_clear()
    x, weight = cancelling(768, 96, torch.float32)
    bias = torch.zeros(96)
    alone = torch.cat([cpu_multiply(row, weight, bias) for row in x.split(1)])
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.equal(linear.linear_invariant(x, weight, bias), alone)
        assert torch.get_num_threads() == count


def test_threads_are_as_before_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(*arguments: Any) -> torch.Tensor:
        raise RuntimeError

    monkeypatch.setattr(cpu, "_multiply", multiply)
    cpu.agreeing_sizes.cache_clear()
    torch.set_num_threads(3)
    with pytest.raises(RuntimeError):
        linear.linear_invariant(torch.zeros(1, 4), torch.zeros(2, 4))
    assert torch.get_num_threads() == 3
