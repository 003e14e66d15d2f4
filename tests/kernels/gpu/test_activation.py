"""The activations' kernels against the torch forms and naive twins: odd sizes, strided rows, surroundings of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from guarded import apart, guarded_results
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import activation, dispatch, reference
from quire.kernels.gpu import activation as gpu
from quire.kernels.gpu.device import DEVICES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

FILE = "kernels/gpu/activation.py"
BUGS = [
    ("gate and up exchanged", FILE, "up = tl.load(source + SIZE, mask=inside, other=0.0)",
     "up = gate\n    gate = tl.load(source + SIZE, mask=inside, other=0.0)", "test_equal_the_torch_forms"),
    ("up of another row's length", FILE, "tl.load(source + SIZE,", "tl.load(source + COLUMNS,",
     "test_equal_the_torch_forms"),
    ("gate not rounded", FILE, "(activated.to(tl.float32) * up)", "(gate / (1.0 + tl.exp2(-gate * LOG2E)) * up)",
     "test_the_gate_is_rounded_before_the_product"),
    ("e for 2", FILE, "tl.exp2(-gate * LOG2E)", "tl.exp2(-gate)", "test_equal_the_torch_forms"),
    ("gated rows taken for contiguous", FILE, "row * stride + column\n    gate", "row * 2 * SIZE + column\n    gate",
     "test_rows_apart"),
    ("rows taken for contiguous", FILE, "x + row * stride + column, mask", "x + row * SIZE + column, mask",
     "test_rows_apart"),
    ("tanh without its factor 2", FILE, "2 * math.sqrt(2 / math.pi)", "math.sqrt(2 / math.pi)",
     "test_equal_the_torch_forms"),
    ("cube missing", FILE, "0.044715 * value * value * value", "0.044715 * value * value",
     "test_equal_the_torch_forms"),
    ("erf of x", FILE, "tl.math.erf(value * SQRT_HALF)", "tl.math.erf(value)", "test_equal_the_torch_forms"),
    ("NaN lost", FILE, "tl.where(value <= 0.0, 0.0, value)", "tl.where(value > 0.0, value, 0.0)",
     "test_nan_and_large_values"),
    ("only the first columns", FILE, "triton.cdiv(size, columns))\n        silu", "size // columns)\n        silu",
     "test_several_programs_to_a_row"),
    ("written past the row", FILE, "result.to(out.dtype.element_ty), mask=inside)",
     "result.to(out.dtype.element_ty))", "test_rows_apart"),
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
"""The interpreter's arithmetic is NumPy's, which warns of what is meant: powers of two that are infinite."""

Form = Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]
FORMS: dict[str, Form] = {
    "silu_and_mul": lambda module: module.silu_and_mul,
    "gelu": lambda module: module.gelu,
    "gelu_tanh": lambda module: partial(module.gelu, tanh=True),
    "relu": lambda module: module.relu,
}
"""Each activation, of the kernels, of the torch forms or of the twins."""


@pytest.fixture(autouse=True)
def guarded() -> Iterator[None]:
    torch.manual_seed(0)
    with guarded_results():
        yield


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(shape)).to(dtype).to(DEVICE)


def check(form: Form, x: torch.Tensor) -> None:
    got = form(gpu)(x)
    assert got.is_contiguous() and got.dtype == x.dtype
    close(got, form(reference)(x.cpu()), tail=8)
    close(got, form(activation)(x.cpu()), tail=24)


def close(got: torch.Tensor, want: torch.Tensor, tail: int) -> None:
    """Two roundings for each of the numbers that a gated value is made of: the interpreter cuts off where a GPU rounds
    to bfloat16. GELU's tail is x / 2 times a difference of nearly equal numbers, hence `tail` roundings of 1: torch's
    vectorized erf is off by more of them than the twin's."""
    eps = torch.finfo(want.dtype).eps
    torch.testing.assert_close(got.cpu(), want, rtol=4 * eps, atol=tail * torch.finfo(torch.float32).eps + eps**2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equal_the_torch_forms(form: Form, dtype: torch.dtype) -> None:
    for size in (2, 14, 64, 100, 128, 1000):
        check(form, randn(5, size, dtype=dtype))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_several_programs_to_a_row(form: Form) -> None:
    for size in (1024, 1025, 2816):
        check(form, randn(2, 2 * size, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_rows_apart(form: Form, dtype: torch.dtype) -> None:
    check(form, apart(randn(4, 70, dtype=dtype)))


@given(rows=st.integers(1, 5), size=st.integers(1, 200), gap=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_any_shape(rows: int, size: int, gap: int, seed: int) -> None:
    torch.manual_seed(seed)
    for form in FORMS.values():
        with guarded_results():
            check(form, apart(randn(rows, 2 * size, dtype=torch.float32), gap))


def test_the_gate_is_rounded_before_the_product() -> None:
    """But for ties that the last bit of an exponential decides, every bit is the torch form's."""
    for dtype in (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,):
        x = randn(8, 1000, dtype=dtype)
        assert (gpu.silu_and_mul(x).cpu() != activation.silu_and_mul(x.cpu())).float().mean() < 0.01


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_nan_and_large_values(form: Form) -> None:
    values = [torch.nan, 1e30, -1e30, 200.0, -200.0, 30.0, -30.0, 1e-30, 0.0, -1.0]
    x = torch.tensor(values, device=DEVICE)
    x = torch.stack([torch.cat([x, torch.ones_like(x)])] * 2)
    torch.testing.assert_close(form(gpu)(x).cpu(), form(activation)(x.cpu()), rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_element_does_not_depend_on_its_place(form: Form) -> None:
    x = randn(7, 2 * 1100, dtype=torch.float32)
    together = form(gpu)(x)
    for row in (0, 3, 6):
        assert torch.equal(form(gpu)(x[row : row + 1])[0], together[row])
    assert torch.equal(form(gpu)(x.flip(0)), together.flip(0))


def test_without_rows() -> None:
    for form in FORMS.values():
        assert form(gpu)(randn(0, 24, dtype=torch.float16)).shape == form(activation)(torch.empty(0, 24)).shape


def test_the_public_operations_run_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    x = randn(3, 24, dtype=torch.float16)
    for name in ("silu_and_mul", "gelu", "relu"):
        calls: list[str] = []
        kernel = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *a, name=name, kernel=kernel: calls.append(name) or kernel(*a))
        assert torch.equal(getattr(activation, name)(x), kernel(x))
        assert calls == [name]
    assert torch.equal(activation.gelu(x, tanh=True), gpu.gelu(x, True))
    assert not torch.equal(activation.gelu(x, tanh=True), activation.gelu(x))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_variants_name_every_argument(device: Any) -> None:
    for variant in gpu.variants(device):
        assert list(variant.arguments) == variant.kernel.arg_names, variant.name
