"""bfloat16 products from oneDNN's layout, against float32; any number of rows, on any number of threads."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn import functional as F

if importlib.util.find_spec("numba") is None:
    pytest.skip("loops are compiled by numba", allow_module_level=True)

from quire.kernels import linear
from quire.kernels.cpu import blocked_linear
from quire.kernels.cpu.blocked_linear import BlockedWeight

FILE = "kernels/cpu/blocked_linear.py"
BUGS = [
    ("bias forgotten", FILE, "0 if bias is None else bias.data_ptr(), out.data_ptr()", "0, out.data_ptr()",
     "test_equals_the_twin"),
    ("bias of the first block for all", FILE, "a[7] + block * 2 * OUTPUTS if a[7] != 0", "a[7] if a[7] != 0",
     "test_equals_the_twin"),
    ("the second half's bias is the first's", FILE, "HALVES, bias, 2 * LANES * v)", "HALVES, bias, 0)",
     "test_equals_the_twin"),
    ("a turn too few", FILE, "b.udiv(pairs, I64(UNROLLED))", "b.sub(b.udiv(pairs, I64(UNROLLED)), I64(1))",
     "test_equals_the_twin"),
    ("groups that overlap", FILE,
     "                first = end\n", "                first = end - 1 if end < rows else end\n",
     "test_equals_the_twin"),
    ("rows side by side", FILE, "x.data_ptr(), 2 * x.stride(0)", "x.data_ptr(), 2 * self._inputs",
     "test_rows_may_lie_apart"),
    ("a block left out", FILE, "            block = following\n", "            block = following + (following == 2)\n",
     "test_equals_the_twin"),
    ("any layout will do", FILE,
     "            return False\n    return True", "            return True\n    return True",
     "test_another_layout_is_not_read"),
    ("only the first block looked at", FILE, "for start in (0, outputs - OUTPUTS):", "for start in (0, 0):",
     "test_another_layout_is_not_read"),
    ("inputs that do not fill a turn", FILE, "inputs % (2 * UNROLLED) or", "inputs % 2 or",
     "test_what_the_loop_cannot_take"),
]  # fmt: skip

SHAPES = [(64, 16), (192, 32), (128, 768), (768, 224)]
"""Outputs and inputs: below and above what is multiplied without waking other threads."""
ROWS = [*range(1, 15), 18, 19, 64, 131]

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        not blocked_linear.suits_processor(),
        reason="this processor multiplies no pairs of bfloat16, or whole tiles of them",
    ),
]


def made(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and its copy in oneDNN's layout."""
    weight = torch.randn(outputs, inputs).bfloat16()
    return weight, torch.ops.mkldnn._reorder_linear_weight(weight, None)


def product(weight: torch.Tensor, packed: torch.Tensor) -> BlockedWeight:
    found = blocked_linear.blocked(weight, packed)
    assert found is not None
    return found


def check(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    multiply = linear.packed_product(weight, packed)
    assert multiply is not None
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
    weight, packed = made(*shape)
    bias = torch.randn(shape[0]).bfloat16() if biased else None
    for rows in ROWS:
        check(torch.randn(rows, shape[1]).bfloat16(), weight, packed, bias)


def test_no_rows() -> None:
    weight, packed = made(128, 64)
    assert product(weight, packed).multiply(torch.empty(0, 64, dtype=torch.bfloat16), packed, None).shape == (0, 128)


def test_rows_may_lie_apart() -> None:
    weight, packed = made(128, 64)
    wide = torch.randn(9, 200).bfloat16()
    check(wide[:, 8:72], weight, packed, None)
    check(wide[::2, 8:72], weight, packed, None)
    check(torch.randn(64, 5).bfloat16().T, weight, packed, None)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_is_the_same_in_any_company(num_threads: int) -> None:
    weight, packed = made(768, 256)
    x, bias = torch.randn(40, 256).bfloat16(), torch.randn(768).bfloat16()
    multiply = product(weight, packed).multiply
    alone = torch.cat([multiply(row, packed, bias) for row in x.split(1)])
    torch.set_num_threads(num_threads)
    for rows in (*range(1, 14), 40):
        assert torch.equal(multiply(x[:rows], packed, bias), alone[:rows]), rows


def test_sums_that_are_not_numbers_stay_so() -> None:
    weight, packed = made(64, 64)
    x = torch.randn(3, 64).bfloat16()
    x[1, 5] = float("inf")
    x[2, 6] = float("nan")
    torch.set_num_threads(1)
    out = product(weight, packed).multiply(x, packed, None)
    assert out[0].isfinite().all() and not out[1].isfinite().any() and out[2].isnan().all()


def test_another_layout_is_not_read() -> None:
    weight, packed = made(256, 64)
    assert blocked_linear.blocked(weight, packed) is not None
    for row in (0, 63, 192, 255):
        other = weight.clone()
        other[row, 17] += 1
        assert blocked_linear.blocked(other, packed) is None, row
    plain = weight.clone()
    assert not blocked_linear._is_laid_out(weight, plain.data_ptr())


def test_what_the_loop_cannot_take() -> None:
    for shape in ((96, 64), (100, 64), (64, 12), (64, 66)):
        torch.set_num_threads(1)
        assert linear.packed_product(*made(*shape)) is None, shape
    torch.set_num_threads(3)
    assert linear.packed_product(*made(128, 64)) is None
    assert linear.packed_product(*made(192, 64)) is not None
    weight, packed = made(192, 64)
    assert linear.packed_product(weight.float(), packed) is None
