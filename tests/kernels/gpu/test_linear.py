"""The product whose rows do not depend on each other: its kernel against the naive twin, and against itself in other
company. The interpreter cannot multiply bfloat16, so that type is tested on a GPU only."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from guarded import apart, guarded_results
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import dispatch, linear, reference
from quire.kernels.gpu import linear as gpu
from quire.kernels.gpu.device import DEVICES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]

FILE = "kernels/gpu/linear.py"
BUGS = [
    ("tail of K missing", FILE, "if WHOLE < K:", "if WHOLE > K:", "test_equals_the_twin"),
    ("tail of K not masked", FILE, "mask=left[None, :] < K, other=0.0", "mask=left[None, :] >= 0, other=0.0",
     "test_rows_apart"),
    ("last columns written past the row", FILE, "(row < num_rows)[:, None] & (column < N)[None, :]",
     "(row < num_rows)[:, None] & (column >= 0)[None, :]", "test_equals_the_twin"),
    ("last rows written past the end", FILE, "(row < num_rows)[:, None] & (column < N)[None, :]",
     "(row >= 0)[:, None] & (column < N)[None, :]", "test_equals_the_twin"),
    ("rows past the end read", FILE, "tl.minimum(row, num_rows - 1)", "tl.minimum(row, num_rows)",
     "test_nothing_is_read_past_the_ends"),
    ("weight past the end read", FILE, "tl.minimum(column, N - 1)", "tl.minimum(column, N)",
     "test_nothing_is_read_past_the_ends"),
    ("last group of rows as high as the others", FILE, "tl.minimum(row_tiles - group * GROUP, GROUP)", "GROUP",
     "test_several_tiles"),
    ("bias missing", FILE, "if bias is not None:\n        sums", "if bias is None:\n        sums",
     "test_equals_the_twin"),
    ("bias after rounding", FILE, "sums += tl.load(bias + column",
     "sums = sums.to(out.dtype.element_ty).to(tl.float32) + tl.load(bias + column",
     "test_one_rounding"),
    ("rows taken for contiguous", FILE, "[:, None] * x_stride", "[:, None] * K", "test_rows_apart"),
    ("a tile for few rows", FILE, "chosen = tile(device_for(x), x.dtype)\n        linear",
     "chosen = tile(device_for(x), x.dtype)\n        chosen = chosen._replace(depth=16 if num_rows < 16 else 32)\n"
     "        linear", "test_a_row_does_not_depend_on_its_neighbours"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def guarded() -> Iterator[None]:
    torch.manual_seed(0)
    with guarded_results():
        yield


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    got = gpu.linear_invariant(x, weight, bias)
    assert got.dtype == x.dtype and got.is_contiguous()
    want = reference.linear_invariant(x.cpu(), weight.cpu(), None if bias is None else bias.cpu())
    size = max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=4 * torch.finfo(x.dtype).eps * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 192), (100, 33), (1, 1), (70, 130), (33, 257), (128, 128)], ids=str)
def test_equals_the_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs, outputs = shape
    weight, bias = randn(outputs, inputs, dtype=dtype), randn(outputs, dtype=dtype)
    for rows in (1, 3, 64, 65):
        check(randn(rows, inputs, dtype=dtype), weight, None if rows == 3 else bias)


def test_several_tiles() -> None:
    """Groups of row tiles, the last of them not full, against several tiles of columns."""
    for rows in (64 * gpu.GROUP, 64 * (gpu.GROUP + 2) + 5):
        check(randn(rows, 20, dtype=torch.float16), randn(300, 20, dtype=torch.float16), None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_apart(dtype: torch.dtype) -> None:
    for inputs in (64, 37):
        check(apart(randn(5, inputs, dtype=dtype)), randn(7, inputs, dtype=dtype), None)
    check(randn(24, 5, dtype=dtype).T, randn(7, 24, dtype=dtype), None)


@given(
    rows=st.integers(1, 70), inputs=st.integers(1, 150), outputs=st.integers(1, 150), biased=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_any_shape(rows: int, inputs: int, outputs: int, biased: bool, seed: int) -> None:
    torch.manual_seed(seed)
    with guarded_results():
        x, weight = randn(rows, inputs, dtype=torch.float16), randn(outputs, inputs, dtype=torch.float16)
        check(x, weight, randn(outputs, dtype=torch.float16) if biased else None)


def test_nothing_is_read_past_the_ends() -> None:
    """What lies there is infinite and would meet a zero, of which the interpreter's NumPy warns."""
    for dtype in DTYPES:
        around = torch.full((3, 40, 50), torch.inf, dtype=dtype, device=DEVICE)
        x, weight = around[0, :5], around[1, :33]
        for inside in (x, weight):
            inside.copy_(randn(*inside.shape, dtype=dtype))
            inside[:, ::2] = 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check(x, weight, None)
        assert not caught


def test_one_rounding() -> None:
    """The bias is added to what is not yet rounded."""
    x = torch.tensor([[1.0, 2.0**-9]], device=DEVICE).half()
    weight, bias = torch.tensor([[1.0, 0.25]], device=DEVICE).half(), torch.tensor([-1.0], device=DEVICE).half()
    assert gpu.linear_invariant(x, weight, bias).item() == 2.0**-11


def cancelling(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and a weight whose exact products are zero: what comes out are the rounding errors of one order of sums."""
    order = torch.randperm(inputs)
    x, weight = torch.randn(rows, inputs // 2).to(dtype), torch.randn(outputs, inputs // 2).to(dtype)
    return torch.cat([x, -x], 1)[:, order].to(DEVICE), torch.cat([weight, weight], 1)[:, order].to(DEVICE)


@pytest.mark.usefixtures("steady_products")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """Nor on their number, nor on its place."""
    x, weight = cancelling(70, 200, 150, dtype)
    together = gpu.linear_invariant(x, weight, None)
    assert (together != 0).float().mean() > 0.5
    for rows in (1, 2, 15, 16, 17, 33, 64, 65):
        for start in {0, 70 - rows}:
            got = gpu.linear_invariant(x[start : start + rows], weight, None)
            assert torch.equal(got, together[start : start + rows]), (rows, start)
    order = torch.randperm(70, device="cpu").to(DEVICE)
    assert torch.equal(gpu.linear_invariant(x[order], weight, None), together[order])


def test_without_rows() -> None:
    got = gpu.linear_invariant(randn(0, 24, dtype=torch.float16), randn(7, 24, dtype=torch.float16), None)
    assert got.shape == (0, 7)


def test_one_tile_for_all_shapes() -> None:
    """The tile is chosen by device and element type; the launcher has no other way to choose."""
    for device in DEVICES.values():
        for variant in gpu.variants(device):
            chosen = gpu.tile(device, variant.arguments["x"])
            assert [variant.arguments[name] for name in ("ROWS", "COLUMNS", "DEPTH")] == list(chosen[:3])
            assert (variant.num_warps, variant.num_stages) == chosen[3:]


def test_the_public_operation_runs_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    x, weight, bias = (randn(*shape, dtype=torch.float16) for shape in ((3, 24), (7, 24), (7,)))
    calls: list[int] = []
    launch = gpu.linear_invariant
    monkeypatch.setattr(gpu, "linear_invariant", lambda *a: calls.append(1) or launch(*a))
    assert torch.equal(linear.linear_invariant(x, weight, bias), launch(x, weight, bias))
    assert torch.equal(linear.linear_invariant(x, weight), launch(x, weight, None))
    assert len(calls) == 2


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_variants_name_every_argument(device: Any) -> None:
    for variant in gpu.variants(device):
        assert list(variant.arguments) == variant.kernel.arg_names, variant.name
