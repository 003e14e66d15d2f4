"""The torch form of what happens between projection and attention, and what it is composed of, against naive twins."""

from __future__ import annotations

import pytest
import torch

from quire.kernels import kv_cache, qkv, reference, rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = torch.float8_e4m3fn

BUGS = [
    (
        "padding kept",
        "kernels/kv_cache.py",
        "k, v, slots = k[kept], v[kept], slots[kept]",
        "slots = slots.clamp(min=0)",
        "test_padding_is_not_written",
    ),
    (
        "multiplied with the scale",
        "kernels/kv_cache.py",
        "wide * scale.reciprocal()",
        "wide * scale",
        "test_float8_pool",
    ),
    (
        "the largest of another e4m3",
        "kernels/kv_cache.py",
        "FLOAT8_MAX = 448.0",
        "FLOAT8_MAX = 240.0",
        "test_float8_holds_the_largest",
    ),
    (
        "pairs not neighbours",
        "kernels/rotary.py",
        "-1).flatten(-2)",
        "-2).flatten(-2)",
        "test_interleaved_is_neox_in_another_order",
    ),
    (
        "K not normed",
        "kernels/qkv.py",
        "rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)",
        "rms_norm(q, q_norm, eps), k",
        "test_equals_the_twin",
    ),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def table(rotating: int) -> torch.Tensor:
    return rotary.cos_sin_table(10000 ** -(torch.arange(0, rotating, 2) / rotating), 50)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotating", [24, 10, 0])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_equals_the_twin(normed: bool, interleaved: bool, rotating: int, dtype: torch.dtype) -> None:
    heads = torch.randn(9, 11, 24).to(dtype)[:, 1:8]  # 3 for queries, 2 for keys, 2 for values
    pool = torch.full((6, 3, 2, 4, 2, 24), torch.nan, dtype=dtype)
    twin = pool.clone()
    slots = torch.randperm(24)[:9]
    slots[::4] = -7
    q_norm, k_norm = (torch.randn(2, 24).to(dtype)) if normed else (None, None)
    rest = (slots, torch.randint(0, 50, (9,)), table(rotating) if rotating else None, interleaved, q_norm, k_norm, 1e-6)
    got = qkv.norm_rotate_write(heads, pool[:, 1], *rest)
    want = reference.norm_rotate_write(heads, twin[:, 1], *rest)
    assert got.is_contiguous() and got.dtype == dtype
    tolerance = (16 if normed else 2) * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pool, twin, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert (~pool.isnan()).sum() == 6 * 2 * 2 * 24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotating", [12, 8, 2])
def test_interleaved_is_neox_in_another_order(rotating: int, dtype: torch.dtype) -> None:
    q, k = torch.randn(9, 5, 12).to(dtype), torch.randn(9, 2, 12).to(dtype)
    positions = torch.randint(0, 50, (9,))
    order = torch.cat((torch.arange(0, rotating, 2), torch.arange(1, rotating, 2), torch.arange(rotating, 12)))
    cos_sin = table(rotating)
    got = rotary.apply_rotary(q, k, positions, cos_sin, interleaved=True)
    neox = rotary.apply_rotary(q[..., order], k[..., order], positions, cos_sin)
    for one, other, before in zip(got, neox, (q, k), strict=True):
        assert torch.equal(one[..., order], other)
        assert torch.equal(one[..., rotating:], before[..., rotating:])
        assert not torch.equal(one[..., :rotating], before[..., :rotating])


def test_padding_is_not_written() -> None:
    pool = torch.full((3, 2, 4, 2, 5), torch.nan)
    k, v = torch.randn(2, 4, 2, 5)
    kv_cache.write_kv(k, v, pool, torch.tensor([-1, 7, -(2**40), 2]))
    assert torch.equal(pool[1, :, 3], torch.stack((k[1], v[1]))) and torch.equal(
        pool[0, :, 2], torch.stack((k[3], v[3]))
    )
    assert (~pool.isnan()).sum() == 2 * 2 * 2 * 5
    kv_cache.write_kv(k, v, pool, torch.full((4,), -1))
    assert (~pool.isnan()).sum() == 2 * 2 * 2 * 5


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_pool(dtype: torch.dtype, scaled: bool) -> None:
    pool = torch.full((7, 3, 2, 8, 2, 5), torch.nan).to(FLOAT8)
    twin = pool.clone()
    slots = torch.randperm(7 * 8)[:19]
    k, v = torch.randn(2, 19, 2, 5).to(dtype)
    scales = torch.tensor([[0.5, 0.03], [0.002, 2.5]]) if scaled else None
    kv_cache.write_kv(k, v, pool[:, 1], slots, scales)
    reference.write_kv(k, v, twin[:, 1], slots, scales)
    assert torch.equal(pool.view(torch.uint8), twin.view(torch.uint8))
    stored = pool[:, 1].float()
    assert (~stored.isnan()).sum() == 2 * k.numel()
    read = stored[slots // 8, :, slots % 8]  # [19, 2, 2, 5]
    if scales is not None:
        read = read * scales[:, :, None]
    # 3 bits of mantissa; 0.002 is too small a scale for what is above 448 * 0.002.
    want = torch.stack((k, v), 1).float()
    fits = want.abs() < 0.89
    torch.testing.assert_close(read[fits], want[fits], rtol=2.0**-4, atol=2.0**-9)


def test_float8_holds_the_largest() -> None:
    x = torch.tensor([[[1e6, -470.0, torch.inf, torch.nan, 448.0, 0.0]]])
    got = kv_cache.to_float8(x, None).float()[0, 0]
    assert torch.equal(got[:3], torch.tensor([448.0, -448.0, 448.0])) and got[3].isnan()
    assert torch.equal(kv_cache.to_float8(x, torch.tensor([2.0])).float()[0, 0, 1:2], torch.tensor([-240.0]))
