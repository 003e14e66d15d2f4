"""Norm, rotation and cache write in one kernel, against the torch form and the naive twin.

Everything that may not be read is NaN: what lies around the heads in their wider tensor and the table's rows of other
positions. So is everything before it is written: the result and the whole pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import dispatch, qkv, reference
from quire.kernels.gpu import qkv as gpu
from quire.kernels.gpu.device import DEVICES
from quire.kernels.rotary import cos_sin_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = torch.float8_e4m3fn

FILE = "kernels/gpu/qkv.py"
BUGS = [
    (
        "last query head missing",
        FILE,
        "head < tl.where(is_q, HQ, HKV)",
        "head < tl.where(is_q, HQ - 1, HKV)",
        "test_head_sizes",
    ),
    ("V is K", FILE, "tl.where(is_v, HQ + HKV, HQ))\n    source", "HQ)\n    source", "test_equals_the_torch_form"),
    ("padding written", FILE, "low_mask &= slot >= 0", "low_mask &= slot >= -1", "test_equals_the_torch_form"),
    ("padding written, not rotary", FILE, "rest_mask & (slot >= 0)", "rest_mask", "test_equals_the_torch_form"),
    ("V over K", FILE, "kind * KV_STRIDE", "0 * KV_STRIDE", "test_equals_the_torch_form"),
    ("offset in the block", FILE, "slot % BLOCK_SIZE * SLOT_STRIDE", "0 * SLOT_STRIDE", "test_equals_the_torch_form"),
    ("scale missing", FILE, "wide *= inverse_scale", "wide *= 1.0", "test_float8_pool"),
    ("V takes K's scales", FILE, "kv_scales + kind * HKV + head", "kv_scales + head", "test_float8_pool"),
    ("K takes Q's norm", FILE, "weight = k_norm", "weight = q_norm", "test_heads_normed"),
    ("norm not rounded", FILE, "(x * factor).to(dtype).to(tl.float32)", "(x * factor)", "test_heads_normed"),
    (
        "norm forgets what does not turn",
        FILE,
        "squares += tl.sum(wide * wide",
        "squares += 0 * tl.sum(wide * wide",
        "test_heads_normed",
    ),
    ("norm's weight of another pair", FILE, "2 * pair if INTERLEAVED else pair", "pair", "test_heads_normed"),
    ("turned backwards", FILE, "a * cos - b * sin", "a * cos + b * sin", "test_equals_the_torch_form"),
    (
        "position of the first token",
        FILE,
        "tl.load(positions + token)",
        "tl.load(positions)",
        "test_equals_the_torch_form",
    ),
    (
        "tail of the head missing",
        FILE,
        "_columns(zero, R, D - R)",
        "_columns(zero, R, D - R - 1)",
        "test_equals_the_torch_form",
    ),
    ("stride of the heads taken for their size", FILE, "row * head_stride", "row * D", "test_any_strides"),
]


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU rounds a float32 to a bfloat16, Triton's interpreter cuts it off: let it round."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        data = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(data, target.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)


class Case:
    """Arguments of `norm_rotate_write` for tokens in shuffled slots, every third of them padding."""

    def __init__(
        self,
        dtype: torch.dtype,
        heads: tuple[int, int] = (5, 3),
        size: int = 24,
        rotating: int | None = None,
        interleaved: bool = False,
        normed: bool = False,
        pool_dtype: torch.dtype | None = None,
        scaled: bool = False,
        num_tokens: int = 5,
        block_size: int = 4,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        rotating = size if rotating is None else rotating
        num_heads = heads[0] + 2 * heads[1]
        wide = torch.full((num_tokens, num_heads + 5, size), torch.nan, dtype=dtype)
        wide[:, 3 : 3 + num_heads] = randn(num_tokens, num_heads, size)
        self.qkv = wide.to(DEVICE)[:, 3 : 3 + num_heads]
        num_blocks = num_tokens // block_size + 2
        shape = (num_blocks, 3, 2, block_size, heads[1], size)
        self.pool = torch.full(shape, torch.nan).to(pool_dtype or dtype)
        self.slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
        self.slots[1::3] = -1
        self.positions = torch.randint(0, 40, (num_tokens,), generator=generator)
        self.cos_sin = None
        if rotating:
            table = cos_sin_table(10000 ** -(torch.arange(0, rotating, 2) / rotating), 40)
            self.cos_sin = torch.full_like(table, torch.nan)
            self.cos_sin[self.positions] = table[self.positions]
        self.interleaved = interleaved
        self.q_norm, self.k_norm = (randn(size), randn(size)) if normed else (None, None)
        self.scales = None
        if scaled:
            self.scales = 0.01 + torch.rand(2, heads[1], generator=generator)

    def run(self, function: Callable[..., torch.Tensor], device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, and the pool."""

        def at(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.to(device)

        pool = self.pool.clone().to(device)
        q = function(
            self.qkv.to(device), pool[:, 1], at(self.slots), at(self.positions), at(self.cos_sin), self.interleaved,
            at(self.q_norm), at(self.k_norm), 1e-6, at(self.scales),
        )  # fmt: skip
        return q.cpu(), pool.cpu()

    def run_kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        empty = torch.empty

        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            return empty(*args, **kwargs).fill_(torch.nan)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            q, pool = self.run(gpu.norm_rotate_write, DEVICE)
        assert q.dtype == self.qkv.dtype and q.is_contiguous()
        return q, pool

    def check(self) -> None:
        """Without a norm, every bit is the torch form's. With one, where a sum's order and an inverse square root are
        the GPU's own, values differ by some of the last bits of the largest."""
        got, twin = self.run_kernel(), self.run(reference.norm_rotate_write, "cpu")
        assert not got[0].isnan().any()
        for have, torchs, naive in zip(got, self.run(qkv.norm_rotate_write, "cpu"), twin, strict=True):
            if self.q_norm is None:
                assert same(have, torchs) and same(have, naive)
                continue
            if have.dtype == FLOAT8:
                # One last bit more or less decides where the next rounding goes.
                tolerance = dict(rtol=2.0**-3, atol=2.0**-9)
            else:
                largest = float(torchs.nan_to_num().abs().max())
                tolerance = dict(rtol=0, atol=3 * torch.finfo(have.dtype).eps * largest)
            for want in (torchs, naive):
                torch.testing.assert_close(have.float(), want.float(), equal_nan=True, **tolerance)
            if have.dtype.itemsize < 4:
                # And few do, where every rounding is in its place.
                assert ((have.float() != torchs.float()) & ~have.isnan()).sum() <= 0.01 * have.numel()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit, but for NaN's own bits."""
    a, b = a.float(), b.float()
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


FORMS = {
    "all of the head turns": dict(),
    "a part turns": dict(size=20, rotating=12),
    "interleaved": dict(interleaved=True),
    "a part, interleaved": dict(size=20, rotating=12, interleaved=True),
    "not rotary": dict(rotating=0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_torch_form(form: dict[str, Any], dtype: torch.dtype) -> None:
    Case(dtype, **form).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_heads_normed(form: dict[str, Any], dtype: torch.dtype) -> None:
    Case(dtype, normed=True, **form).check()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_pool(dtype: torch.dtype, scaled: bool) -> None:
    for form in FORMS.values():
        Case(dtype, pool_dtype=FLOAT8, scaled=scaled, **form).check()
    Case(dtype, pool_dtype=FLOAT8, scaled=scaled, normed=True).check()


def test_float8_pool_holds_the_largest_where_values_are_larger() -> None:
    case = Case(torch.float32, pool_dtype=FLOAT8, rotating=0)
    case.qkv[0, :, :3] = torch.tensor([1e5, -torch.inf, torch.nan])
    q, pool = case.run_kernel()
    slot = int(case.slots[0])
    written = pool[slot // 4, 1, :, slot % 4, :, :3].float()
    assert torch.equal(written[..., :2], torch.tensor([448.0, -448.0]).expand(2, 3, 2))
    assert written[..., 2].isnan().all()
    assert same(q[0], case.qkv[0, :5].cpu())


@pytest.mark.parametrize("size", [64, 80, 96, 112, 128, 256])
def test_head_sizes(size: int) -> None:
    """Several programs for the queries of a token, the last of them not full."""
    for heads in ((17, 1), (9, 2)):
        Case(torch.bfloat16, heads=heads, size=size, num_tokens=2, block_size=16).check()


@given(
    heads=st.tuples(st.integers(1, 7), st.integers(1, 5)),
    half=st.integers(1, 20),
    passing=st.sampled_from([0, 0, 1, 8, 13]),
    interleaved=st.booleans(),
    num_tokens=st.integers(1, 4),
    block_size=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_any_shape(
    heads: tuple[int, int],
    half: int,
    passing: int,
    interleaved: bool,
    num_tokens: int,
    block_size: int,
    seed: int,
) -> None:
    Case(
        torch.float16,
        heads=heads,
        size=2 * half + passing,
        rotating=2 * half,
        interleaved=interleaved,
        num_tokens=num_tokens,
        block_size=block_size,
        seed=seed,
    ).check()


def test_any_strides() -> None:
    """Heads of a wider head, and a layer whose heads lie before its tokens."""
    case = Case(torch.float32)
    want = case.run(qkv.norm_rotate_write, "cpu")
    wide = torch.full((*case.qkv.shape[:2], 40), torch.nan, device=DEVICE)
    wide[:, :, 7:31] = case.qkv
    case.qkv = wide[:, :, 7:31]
    case.pool = case.pool.transpose(3, 4).contiguous().transpose(3, 4)
    assert case.pool.clone().stride() == case.pool.stride()
    assert all(same(a, b) for a, b in zip(case.run_kernel(), want, strict=True))


def test_without_tokens() -> None:
    case = Case(torch.float16, num_tokens=0)
    q, pool = case.run_kernel()
    assert q.shape == (0, 5, 24) and pool.isnan().all()


def test_a_pool_of_more_elements_than_an_int32_counts() -> None:
    """On a CPU, memory that is never touched is never taken."""
    blocks = (1 << 18) + 1
    pool = torch.empty(blocks, 2, 16, 1, 256, dtype=FLOAT8, device=DEVICE)
    assert pool.numel() > 1 << 31
    heads = torch.randn(2, 3, 256, device=DEVICE)
    slots = torch.tensor([16 * blocks - 1, 5], device=DEVICE)
    gpu.norm_rotate_write(heads, pool, slots, torch.zeros(2, dtype=torch.long, device=DEVICE))
    for token, (block, offset) in enumerate([(-1, 15), (0, 5)]):
        assert same(pool[block, :, offset, 0], heads[token, 1:].to(FLOAT8))


def test_the_public_operation_runs_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    case = Case(torch.bfloat16, heads=(4, 2), interleaved=True, normed=True, pool_dtype=FLOAT8, scaled=True)
    got = case.run(qkv.norm_rotate_write, DEVICE)
    assert all(same(a, b) for a, b in zip(got, case.run_kernel(), strict=True))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_variants_name_every_argument(device: Any) -> None:
    for variant in gpu.variants(device):
        assert list(variant.arguments) == variant.kernel.arg_names
