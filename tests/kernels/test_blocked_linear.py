"""bfloat16 products of blocks, against float32; any number of rows, on any number of threads."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn import functional as F

if importlib.util.find_spec("numba") is None:
    pytest.skip("loops are compiled by numba", allow_module_level=True)

from quire.kernels import linear
from quire.kernels.cpu import block, blocked_linear
from quire.kernels.cpu.blocked_linear import BlockedWeight
from quire.kernels.cpu.program import Memory, record

FILE = "kernels/cpu/blocked_linear.py"
BLOCK = "kernels/cpu/block.py"
BUGS = [
    ("bias forgotten", FILE, "0 if bias is None else bias.data_ptr(), out.data_ptr()", "0, out.data_ptr()",
     "test_equals_the_twin"),
    ("bias of the first block for all", FILE, "a[9] + block * 2 * OUTPUTS if a[9] != 0", "a[9] if a[9] != 0",
     "test_equals_the_twin"),
    ("the second half's bias is the first's", BLOCK, "b.add(bias, of_pass), 2 * LANES * v)",
     "b.add(bias, of_pass), 0)", "test_equals_the_twin"),
    ("a turn too few", BLOCK, "turns = b.udiv(pairs, I64(UNROLLED))",
     "turns = b.sub(b.udiv(pairs, I64(UNROLLED)), I64(1))", "test_equals_the_twin"),
    ("groups that overlap", FILE,
     "                first = end\n", "                first = end - 1 if end < count else end\n",
     "test_equals_the_twin"),
    ("rows side by side", FILE, "self._inputs, 2 * x.stride(0),", "self._inputs, 2 * self._inputs,",
     "test_rows_may_lie_apart"),
    ("a block left out", FILE, "            item = following\n", "            item = following + (following == 2)\n",
     "test_equals_the_twin"),
    ("inputs that are missing are not zeros", FILE, "missing = -inputs % (2 * UNROLLED),", "missing = -inputs % 2,",
     "test_any_number_of_inputs"),
    ("the bias moved by what it lacks", FILE, "F.pad(bias, (0, self._missing))", "F.pad(bias, (self._missing, 0))",
     "test_any_number_of_outputs"),
    # Where rows are multiplied as float32:
    ("rows of the chunk before", FILE, "widens and chunk != held", "widens and held < 0", "test_equals_the_twin"),
    ("threads widen to one place", FILE, "room + thread() * a[13]", "room", "test_a_row_is_the_same_in_any_company"),
    ("an upper half with the lower one in it", "kernels/cpu/vector.py",
     "b.and_(words, self._splat_word(0xFFFF0000)) if half", "words if half", "test_products_are_exact"),
    # Where a block takes several passes:
    ("a pass forgotten", BLOCK, "I64(PAIR_BYTES // count)", "I64(0 // count)", "test_equals_the_twin"),
    ("all passes write to one place", BLOCK, "I64(2 * OUTPUTS // count)", "I64(0 // count)", "test_equals_the_twin"),
    ("sums of the pass before", BLOCK,
     "with cgutils.for_range(b, I64(count)) as walk:\n            for of_row in sums:",
     "with cgutils.for_range(b, I64(count)) as walk:\n            for of_row in sums[:0]:", "test_equals_the_twin"),
]  # fmt: skip

SHAPES = [(64, 16), (192, 32), (128, 768), (768, 224)]
"""Outputs and inputs: below and above what is multiplied without waking other threads."""
ROWS = [*range(1, 15), 18, 19, 49, 64, 131]

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        not block.suits_processor(),
        reason="this processor multiplies no vectors, or whole tiles of bfloat16",
    ),
]


def product(weight: torch.Tensor) -> BlockedWeight:
    found = blocked_linear.blocked(weight)
    assert found is not None
    return found


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    found = linear.packed_product(weight)
    assert found is not None
    multiply, packed = found
    # A place that is left out must not hold the result of the call before.
    stale = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype)
    del stale
    out = multiply(x, packed, bias)
    wanted = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    # One rounding to bfloat16 of a sum whose terms are as large as the root of their number.
    allowed = wanted.abs() * 2**-8 + 1e-5 * weight.shape[1]
    assert out.shape == wanted.shape and out.dtype == torch.bfloat16
    assert ((out.float() - wanted).abs() <= allowed).all()
    return out


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_twin(shape: tuple[int, int], biased: bool) -> None:
    torch.set_num_threads(1 if shape[0] < 128 else 2)
    weight = torch.randn(shape).bfloat16()
    bias = torch.randn(shape[0]).bfloat16() if biased else None
    for rows in ROWS:
        check(torch.randn(rows, shape[1]).bfloat16(), weight, bias)


def test_products_are_exact() -> None:
    """Every sum is of numbers that float32 adds without rounding: whatever else lies in a word must not show."""
    weight = torch.zeros(64, 16, dtype=torch.bfloat16)
    weight[:, 0], weight[:, 1] = 1 + 2**-7, 1
    x = torch.zeros(5, 16, dtype=torch.bfloat16)
    x[:, 1] = 256
    torch.set_num_threads(1)
    found = product(weight)
    assert (found.multiply(x, found.packed, None) == 256).all()
    x[:, 0] = 1
    assert (found.multiply(x, found.packed, torch.full((64,), -256.0).bfloat16()) == 1 + 2**-7).all()


def test_no_rows() -> None:
    found = product(torch.randn(128, 64).bfloat16())
    assert found.multiply(torch.empty(0, 64, dtype=torch.bfloat16), found.packed, None).shape == (0, 128)


def test_rows_may_lie_apart() -> None:
    weight = torch.randn(128, 64).bfloat16()
    wide = torch.randn(9, 200).bfloat16()
    check(wide[:, 8:72], weight, None)
    check(wide[::2, 8:72], weight, None)
    check(torch.randn(64, 5).bfloat16().T, weight, None)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_is_the_same_in_any_company(num_threads: int) -> None:
    x, bias = torch.randn(140, 256).bfloat16(), torch.randn(768).bfloat16()
    found = product(torch.randn(768, 256).bfloat16())
    alone = torch.cat([found.multiply(row, found.packed, bias) for row in x.split(1)])
    torch.set_num_threads(num_threads)
    for rows in (*range(1, 14), 40, 140):
        assert torch.equal(found.multiply(x[:rows], found.packed, bias), alone[:rows]), rows


def test_sums_that_are_not_numbers_stay_so() -> None:
    weight = torch.randn(64, 64).bfloat16()
    x = torch.randn(3, 64).bfloat16()
    x[1, 5] = float("inf")
    x[2, 6] = float("nan")
    torch.set_num_threads(1)
    found = product(weight)
    out = found.multiply(x, found.packed, None)
    assert out[0].isfinite().all() and not out[1].isfinite().any() and out[2].isnan().all()


@pytest.mark.parametrize("shape", [(1, 8), (7, 16), (96, 64), (100, 64), (130, 8), (500, 24)], ids=str)
def test_any_number_of_outputs(shape: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    if shape[0] < block.OUTPUTS and block.ROW_KIND != block.FLOAT32:
        assert blocked_linear.blocked(torch.randn(shape).bfloat16()) is None
        return
    weight = torch.randn(shape).bfloat16()
    for rows in (1, 5, 60):
        x = torch.randn(rows, shape[1]).bfloat16()
        check(x, weight, None)
        check(x, weight, torch.randn(shape[0]).bfloat16())


@pytest.mark.parametrize("shape", [(64, 1), (64, 12), (100, 33), (64, 66)], ids=str)
def test_any_number_of_inputs(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).bfloat16()
    if block.ROW_KIND != block.FLOAT32:
        assert blocked_linear.blocked(weight) is None
        return
    for rows in (1, 5, 60):
        check(torch.randn(rows, shape[1]).bfloat16(), weight, None)


def test_more_threads_than_blocks_or_than_there_was_room_for() -> None:
    weight = torch.randn(640, 96).bfloat16()
    found = product(weight)
    x = torch.randn(50, 96).bfloat16()
    wanted = found.multiply(x, found.packed, None)
    torch.set_num_threads(3)
    assert torch.equal(found.multiply(x, found.packed, None), wanted)
    torch.set_num_threads(1)
    made = record(lambda: found.multiply(x, found.packed, None), Memory())
    torch.set_num_threads(3)
    made.run()
    assert torch.equal(made.result, wanted)


def test_threads_that_no_block_is_left_for() -> None:
    """oneDNN's products would use them; where it has none, there is nothing to lose."""
    torch.set_num_threads(3)
    few, enough = torch.randn(128, 64).bfloat16(), torch.randn(192, 64).bfloat16()
    assert (linear.packed_product(few) is None) == (block.ROW_KIND != block.FLOAT32)
    assert linear.packed_product(enough) is not None


def test_other_types_are_left_to_torch() -> None:
    assert linear.packed_product(torch.randn(64, 64)) is None
    assert linear.packed_product(torch.randn(64, 64).half()) is None
