"""The norms' kernel against the torch form and the naive twin: odd sizes, strided rows, surroundings of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from guarded import apart, guarded_results
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import dispatch, norm, reference
from quire.kernels.gpu import norm as gpu
from quire.kernels.gpu.device import DEVICES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5

FILE = "kernels/gpu/norm.py"
BUGS = [
    ("last column missing", FILE, "inside = (index < rows) & (column < SIZE)",
     "inside = (index < rows) & (column < SIZE - 1)", "test_equals_the_torch_form"),
    ("rows past the end written", FILE, "values.to(normed.dtype.element_ty), mask=inside)",
     "values.to(normed.dtype.element_ty), mask=column < SIZE)", "test_rows_apart"),
    ("columns past the end written", FILE, "inside = (index < rows) & (column < SIZE)",
     "inside = index < rows", "test_equals_the_torch_form"),
    ("mean of the padded row", FILE, "keep_dims=True) * (1.0 / SIZE) + eps", "keep_dims=True) * (1.0 / COLUMNS) + eps",
     "test_equals_the_torch_form"),
    ("padding counts as -mean", FILE, "tl.where(column < SIZE, values - mean, 0.0)", "values - mean",
     "test_equals_the_torch_form"),
    ("eps missing", FILE, "* (1.0 / SIZE) + eps)", "* (1.0 / SIZE))", "test_small_values"),
    ("heads taken for tokens", FILE, "index % inner * inner_stride", "index * inner_stride", "test_heads"),
    ("rows of the residual taken for contiguous", FILE, "row * residual_stride", "row * SIZE", "test_rows_apart"),
    ("sum not rounded before the norm", FILE, "values = rounded.to(tl.float32)", "values = values",
     "test_rounds_where_torch_rounds"),
    ("RMSNorm not rounded before the weight", FILE, "values = values.to(normed.dtype.element_ty).to(tl.float32)",
     "values = values", "test_rounds_where_torch_rounds"),
    ("sum not stored", FILE, "tl.store(total + row * SIZE + column, rounded, mask=inside)", "pass",
     "test_equals_the_torch_form"),
    ("bias missing", FILE, "values += shift.to(tl.float32)", "pass", "test_equals_the_torch_form"),
]  # fmt: skip

Form = Callable[..., Any]


@pytest.fixture(autouse=True)
def guarded() -> Iterator[None]:
    torch.manual_seed(0)
    with guarded_results():
        yield


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def norms(module: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[Any]:
    """Every operation, with and without what may be left out: results one after the other."""
    return [
        module.rms_norm(x, weight, EPS),
        *module.add_rms_norm(x, residual, weight, EPS),
        module.layer_norm(x, weight, bias, EPS),
        module.layer_norm(x, weight, None, EPS),
        module.layer_norm(x, None, None, EPS),
        *module.add_layer_norm(x, residual, weight, bias, EPS),
        *module.add_layer_norm(x, residual, None, None, EPS),
    ]


def check(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    got = norms(gpu, x, residual, weight, bias)
    arguments = [a.cpu() for a in (x, residual, weight, bias)]
    for have, torchs, twin in zip(got, norms(norm, *arguments), norms(reference, *arguments), strict=True):
        assert have.is_contiguous() or have is x
        close(have, torchs)
        close(have, twin)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Up to two roundings of the largest value, and a float32 sum's own: the interpreter cuts off where a GPU rounds to
    bfloat16, and the order of a sum is the device's own."""
    times = 10 if want.dtype == torch.float32 else 3
    tolerance = times * torch.finfo(want.dtype).eps * max(1.0, float(want.abs().max())) if want.numel() else 0.0
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 24, 128, 1000, 2816, 5120])
def test_equals_the_torch_form(size: int, dtype: torch.dtype) -> None:
    """Of the longest, a row for each program; of the shortest, many."""
    rows = 9 if size <= 128 else 2
    check(*(randn(rows, size, dtype=dtype) + 0.5 for _ in range(2)), *(randn(size, dtype=dtype) for _ in range(2)))


def test_the_longest_row() -> None:
    size = gpu.LONGEST_ROW
    x, weight = randn(1, size, dtype=torch.float16), randn(size, dtype=torch.float16)
    close(gpu.rms_norm(x, weight, EPS), norm.rms_norm(x.cpu(), weight.cpu(), EPS))
    with pytest.raises(AssertionError, match="registers"):
        gpu.rms_norm(randn(1, size + 1, dtype=torch.float16), weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads(dtype: torch.dtype) -> None:
    """Those of q and of k, where they lie in the fused projection."""
    size, tokens = 24, 5
    qkv = apart(randn(tokens, 9, size, dtype=dtype))
    weight = randn(size, dtype=dtype)
    for heads in (qkv[:, :6], qkv[:, 6:8], qkv[:1, 6:8], qkv[:, 6:7]):
        assert heads.shape[0] == 1 or not heads.is_contiguous()
        close(gpu.rms_norm(heads, weight, EPS), norm.rms_norm(heads.cpu(), weight.cpu(), EPS))


def test_rows_apart() -> None:
    for size in (24, 1000):
        x, residual = (apart(randn(3, size, dtype=torch.float32), gap) for gap in (3, 7))
        check(x, residual, randn(size, dtype=torch.float32), randn(size, dtype=torch.float32))


def test_columns_apart() -> None:
    """Not what the layers do; it must be right all the same."""
    x, residual = (randn(24, 5, dtype=torch.float32).T for _ in range(2))
    check(x, residual, randn(24, dtype=torch.float32), randn(24, dtype=torch.float32))


@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    size=st.integers(1, 300),
    gap=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(shape: list[int], size: int, gap: int, seed: int) -> None:
    torch.manual_seed(seed)
    with guarded_results():
        x, residual = (apart(randn(*shape, size, dtype=torch.float32), gap) for _ in range(2))
        check(x, residual, randn(size, dtype=torch.float32), randn(size, dtype=torch.float32))


def test_rounds_where_torch_rounds() -> None:
    """Every rounding in its place: but for ties that a sum's order decides, every bit is the torch form's."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.float16]
    for dtype in dtypes:
        for size in (128, 1000):
            # The residual is so much larger that the sum loses most of x.
            x, residual = randn(8, size, dtype=dtype), 30 * randn(8, size, dtype=dtype)
            weight = randn(size, dtype=dtype)
            normed, total = gpu.add_rms_norm(x, residual, weight, EPS)
            assert torch.equal(total, x + residual)
            alone = gpu.rms_norm(total, weight, EPS)
            assert torch.equal(normed, alone)
            layer, layer_total = gpu.add_layer_norm(x, residual, weight, weight, EPS)
            assert torch.equal(layer_total, total)
            assert torch.equal(layer, gpu.layer_norm(total, weight, weight, EPS))
            if dtype != torch.float32:
                want = norm.rms_norm(total.cpu(), weight.cpu(), EPS)
                assert (alone.cpu() != want).float().mean() < 0.01


def test_small_values() -> None:
    """Where eps is all that is left under the root. As many rows as one program takes: without eps, NumPy would warn of
    those that are not there."""
    x, residual = (1e-4 * randn(gpu.sizes(40)["ROWS"], 40, dtype=torch.float32) for _ in range(2))
    weight, bias = randn(40, dtype=torch.float32), 0.01 * randn(40, dtype=torch.float32)
    got = norms(gpu, x, residual, weight, bias)
    for have, want in zip(got, norms(norm, *(a.cpu() for a in (x, residual, weight, bias))), strict=True):
        torch.testing.assert_close(have.cpu(), want, rtol=1e-5, atol=1e-7)


def test_values_whose_squares_no_float16_holds() -> None:
    x = 300 * randn(2, 64, dtype=torch.float16)
    weight = randn(64, dtype=torch.float16)
    close(gpu.rms_norm(x, weight, EPS), norm.rms_norm(x.cpu(), weight.cpu(), EPS))
    close(gpu.layer_norm(x, weight, None, EPS), norm.layer_norm(x.cpu(), weight.cpu(), None, EPS))


@pytest.mark.parametrize("size", [24, 1000])
def test_a_row_does_not_depend_on_its_neighbours(size: int) -> None:
    x, residual = (randn(19, size, dtype=torch.float32) for _ in range(2))
    weight, bias = randn(size, dtype=torch.float32), randn(size, dtype=torch.float32)
    together = norms(gpu, x, residual, weight, bias)
    for row in (0, 7, 18):
        alone = norms(gpu, x[row : row + 1], residual[row : row + 1], weight, bias)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


def test_nan_stays_in_its_row() -> None:
    x = randn(5, 24, dtype=torch.float32)
    x[2, 3] = torch.nan
    for got in norms(gpu, x, x, x[0], x[1])[:-1]:
        assert got[2].isnan().any() and not got[[0, 1, 3, 4]].isnan().any()


def test_without_rows() -> None:
    x, weight = randn(0, 24, dtype=torch.float16), randn(24, dtype=torch.float16)
    assert gpu.rms_norm(randn(0, 3, 24, dtype=torch.float16), weight, EPS).shape == (0, 3, 24)
    for got in norms(gpu, x, x, weight, weight):
        assert got.shape == (0, 24)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would copy the four gigabytes in between")
def test_rows_further_apart_than_an_int32_counts() -> None:
    x = torch.zeros((1 << 31) + 64, dtype=torch.float16, device=DEVICE).as_strided((3, 64), (1 << 30, 1))
    x.copy_(randn(3, 64, dtype=torch.float16))
    weight = randn(64, dtype=torch.float16)
    close(gpu.rms_norm(x, weight, EPS), norm.rms_norm(x.contiguous().cpu(), weight.cpu(), EPS))


def test_the_public_operations_run_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    x, residual, weight, bias = (randn(*shape, dtype=torch.float16) for shape in ((3, 24), (3, 24), (24,), (24,)))
    calls: list[int] = []
    launch = gpu._launch
    monkeypatch.setattr(gpu, "_launch", lambda *a, **k: calls.append(1) or launch(*a, **k))
    for got, want in zip(norms(norm, x, residual, weight, bias), norms(gpu, x, residual, weight, bias), strict=True):
        assert torch.equal(got, want)
    assert len(calls) == 2 * 7


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_variants_name_every_argument(device: Any) -> None:
    for variant in gpu.variants(device):
        assert list(variant.arguments) == variant.kernel.arg_names, variant.name
