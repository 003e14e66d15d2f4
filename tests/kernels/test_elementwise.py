"""Cache writes, rotation, norms and activations against their naive twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quire.kernels import activation, kv_cache, norm, reference, rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


def test_the_twins_are_torchs_own_functions() -> None:
    x = torch.randn(6, 22)
    torch.testing.assert_close(reference.gelu(x), F.gelu(x))
    torch.testing.assert_close(reference.silu_and_mul(x), F.silu(x[:, :11]) * x[:, 11:])
    rms = nn.RMSNorm(22, eps=1e-6)
    torch.testing.assert_close(reference.rms_norm(x, rms.weight.detach(), 1e-6), rms(x).detach())
    torch.testing.assert_close(reference.layer_norm(x, None, None, 1e-5), F.layer_norm(x, (22,)))
