"""Cache writes, rotation, norms and activations against their naive twins, and against themselves in other company."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quire.kernels import activation, kv_cache, norm, reference, rotary
from quire.kernels.embedding import embedding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

FILE = "kernels/activation.py"
BUGS = [
    ("no padding to whole vectors", FILE, "F.pad(values, (0, -len(values) % VECTOR))", "values",
     "test_a_row_does_not_depend_on_its_neighbours"),
    ("padding is part of the result", FILE, "[: len(values)].view(x.shape)", "[-len(values) :].view(x.shape)",
     "test_activations"),
    ("pieces that threads share", FILE, "PIECE = 1 << 13", "PIECE = 1 << 20",
     "test_a_row_does_not_depend_on_its_neighbours"),
]  # fmt: skip


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal up to one rounding of the element type."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, want, rtol=4 * eps, atol=4 * eps)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_touches_its_slots_only(dtype: torch.dtype) -> None:
    pool = torch.full((7, 3, 2, 8, 2, 5), torch.nan, dtype=dtype)
    twin = pool.clone()
    slots = torch.randperm(7 * 8)[:19]
    qkv = torch.randn(19, 8, 5).to(dtype)
    k, v = qkv[:, 4:6], qkv[:, 6:]
    kv_cache.write_kv(k, v, pool[:, 1], slots)
    reference.write_kv(k, v, twin[:, 1], slots)
    torch.testing.assert_close(pool, twin, rtol=0, atol=0, equal_nan=True)
    assert pool.isnan().sum() == pool.numel() - 2 * k.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(dtype: torch.dtype) -> None:
    table = rotary.cos_sin_table(10000 ** -(torch.arange(0, 12, 2) / 12), 50)
    q, k = torch.randn(9, 5, 12).to(dtype), torch.randn(9, 2, 12).to(dtype)
    positions = torch.randint(0, 50, (9,))
    for got, want in zip(
        rotary.apply_rotary(q, k, positions, table), reference.apply_rotary(q, k, positions, table), strict=True
    ):
        assert got.dtype == dtype
        close(got, want)


def test_rotation_at_zero_is_the_identity_and_keeps_lengths() -> None:
    table = rotary.cos_sin_table(10000 ** -(torch.arange(0, 16, 2) / 16), 50)
    q = torch.randn(4, 3, 16)
    turned, same = rotary.apply_rotary(q, q, torch.zeros(4, dtype=torch.long), table)
    assert torch.equal(turned, q) and torch.equal(same, q)
    turned, _ = rotary.apply_rotary(q, q, torch.tensor([1, 7, 20, 49]), table)
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (3, 4, 24)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, bias = torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)
    close(norm.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    for got, want in zip(
        norm.add_rms_norm(x, residual, weight, 1e-5), reference.add_rms_norm(x, residual, weight, 1e-5), strict=True
    ):
        close(got, want)
    for w, b in ((weight, bias), (None, None)):
        twin = reference.add_layer_norm(x, residual, w, b, 1e-5)
        for got, want in zip(norm.add_layer_norm(x, residual, w, b, 1e-5), twin, strict=True):
            close(got, want)
    close(norm.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5))
    close(norm.layer_norm(x, None, None, 1e-5), reference.layer_norm(x, None, None, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(6, 22)).to(dtype)
    assert activation.silu_and_mul(x).shape == (6, 11)
    close(activation.silu_and_mul(x), reference.silu_and_mul(x))
    # The far tail of erf and tanh is a difference of nearly equal numbers.
    tail = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(activation.gelu(x), reference.gelu(x), rtol=tail, atol=tail)
    torch.testing.assert_close(activation.gelu(x, tanh=True), reference.gelu(x, tanh=True), rtol=tail, atol=tail)
    close(activation.relu(x), reference.relu(x))
    close(activation.silu_and_mul(x, deterministic=True), reference.silu_and_mul(x))
    for tanh in (False, True):
        torch.testing.assert_close(
            activation.gelu(x, tanh, deterministic=True), reference.gelu(x, tanh), rtol=tail, atol=tail
        )


Rows = Callable[[torch.Tensor], torch.Tensor]
"""[T, width] to a result for each row."""


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Each row turned by the position that its first value names."""
    table = rotary.cos_sin_table(10000 ** -(torch.arange(0, 22, 2) / 22), 200)
    heads = x[:, :88].unflatten(-1, (4, 22))
    q, k = rotary.apply_rotary(heads[:, :3], heads[:, 3:], (x[:, 0].float().abs() * 10).long(), table)
    return torch.cat([q, k], 1)


def _layer_norms(x: torch.Tensor) -> torch.Tensor:
    weight, bias = x.new_ones(x.shape[1]) / 3, x.new_ones(x.shape[1]) / 7
    plain, total = norm.add_layer_norm(x, x.flip(-1), None, None, 1e-5)
    return torch.cat([norm.layer_norm(x, weight, bias, 1e-5), plain, total], 1)


def _rms_norms(x: torch.Tensor) -> torch.Tensor:
    weight = x.new_ones(x.shape[1]) / 3
    return torch.cat([norm.rms_norm(x, weight, 1e-6), *norm.add_rms_norm(x, x.flip(-1), weight, 1e-6)], 1)


INVARIANT: dict[str, Rows] = {
    "RMS norm": _rms_norms,
    "RMS norm of heads": lambda x: norm.rms_norm(x.unflatten(-1, (-1, 4))[:, :20], x.new_ones(4) / 3, 1e-6).flatten(1),
    "layer norm": _layer_norms,
    "rotary": _rotated,
    "relu": activation.relu,
    "silu and mul": lambda x: activation.silu_and_mul(x, deterministic=True),
    "silu and mul, rows apart": lambda x: activation.silu_and_mul(x[:, 3:-1], deterministic=True),
    "gelu": lambda x: activation.gelu(x, deterministic=True),
    "gelu by tanh": lambda x: activation.gelu(x, tanh=True, deterministic=True),
}
"""The forms of the deterministic mode on a CPU."""


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", INVARIANT.values(), ids=INVARIANT)
def test_a_row_does_not_depend_on_its_neighbours(form: Rows, dtype: torch.dtype) -> None:
    """Nor on their number, its place among them, and threads. The widths fill no whole number of vectors."""
    for width in (100, 1000, 2816):
        x = (3 * torch.randn(70, width)).to(dtype)
        torch.set_num_threads(1)
        alone = torch.cat([form(row) for row in x.split(1)])
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in range(1, 71) if width == 100 else (2, 3, 7, 16, 33, 64, 70):
                start = rows * 37 % (71 - rows)
                assert torch.equal(form(x[start : start + rows]), alone[start : start + rows]), (width, count, rows)
            for shift in (1, 13, 50):
                assert torch.equal(form(x.roll(shift, 0)), alone.roll(shift, 0)), (width, count, shift)


def test_the_twins_are_torchs_own_functions() -> None:
    x = torch.randn(6, 22)
    torch.testing.assert_close(reference.gelu(x), F.gelu(x))
    torch.testing.assert_close(reference.silu_and_mul(x), F.silu(x[:, :11]) * x[:, 11:])
    rms = nn.RMSNorm(22, eps=1e-6)
    torch.testing.assert_close(reference.rms_norm(x, rms.weight.detach(), 1e-6), rms(x).detach())
    torch.testing.assert_close(reference.layer_norm(x, None, None, 1e-5), F.layer_norm(x, (22,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_embedding_takes_rows(dtype: torch.dtype, count: int) -> None:
    table, ids = torch.randn(50, 96).to(dtype), torch.randint(0, 50, (count,))
    assert torch.equal(embedding(ids, table), F.embedding(ids, table))
