"""Integer conversions of e4m3 against torch's own: every pattern, and every value that can matter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from quire.kernels.gpu.float8 import E4M3_MAX, E4M3_SCALE, decode_e4m3, encode_e4m3

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FILE = "kernels/gpu/float8.py"
BUGS = [
    ("sign's copy stays", FILE, "<< 7) & -0x4001", "<< 7) & -1", "test_decode_every_pattern"),
    ("NaN decoded as 480", FILE, "(moved + 0x80) & 0x4000", "moved & 0x4000", "test_decode_every_pattern"),
    ("ties away from even", FILE, "+ ((clamped >> 20) & 1)", "+ 1", "test_encode_every_half"),
    ("larger than the largest", FILE, "magnitude, 0x43E00000)", "magnitude, 0x43F00000)", "test_encode_every_half"),
    ("small values cut off", FILE, "tl.where(clamped < 0x3C800000, small, normal)", "normal", "test_encode_every_half"),
    ("NaN encoded as 448", FILE, "tl.where(magnitude > 0x7F800000, 0x7F, code)", "code", "test_encode_every_half"),
    ("sign lost", FILE, "(word >> 24) & 0x80", "(word >> 24) & 0x00", "test_encode_ties"),
]


@triton.jit
def decode(bits, out, N: tl.constexpr, NATIVE: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, decode_e4m3(tl.load(bits + i), NATIVE))


@triton.jit
def encode(x, out, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, encode_e4m3(tl.load(x + i, mask=i < N).to(tl.float32)), mask=i < N)


def encoded(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.uint8, device=DEVICE)
    block = 1024 if torch.cuda.is_available() else 1 << 20
    encode[(triton.cdiv(x.numel(), block),)](x.to(DEVICE), out, x.numel(), block)
    return out.cpu()


def check_encode(x: torch.Tensor) -> None:
    """The sign of NaN is torch's affair."""
    want = x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    got = encoded(x)
    nan = x.isnan()
    assert torch.equal(got[~nan], want[~nan])
    assert (got[nan] & 0x7F == 0x7F).all()


def native_forms() -> list[bool]:
    """The GPU's own conversion, too, where there is one; the interpreter's takes NaN for 480."""
    return [False, True] if DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 9) else [False]


@pytest.mark.parametrize("native", native_forms())
def test_decode_every_pattern(native: bool) -> None:
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    out = torch.empty(256, dtype=torch.float16, device=DEVICE)
    decode[(1,)](bits.to(DEVICE), out, 256, native)
    want = bits.view(torch.float8_e4m3fn).float()
    got = out.cpu().float() * E4M3_SCALE
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit(), want.signbit())  # of zero


def test_encoding_what_was_decoded_changes_nothing() -> None:
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = bits.view(torch.float8_e4m3fn).float()
    known = ~values.isnan()
    assert torch.equal(encoded(values[known]), bits[known])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encode_every_half(dtype: torch.dtype) -> None:
    check_encode(torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).float())


def test_encode_ties() -> None:
    """Every value halfway between two neighbours, and the float32 before and after it."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    around = torch.stack([ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(1e9))]).flatten()
    check_encode(torch.cat([around, -around]))


def test_encode_random_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (1 << 19,), generator=generator)
    check_encode(words.to(torch.int32).view(torch.float32))
    check_encode(torch.exp2(torch.rand(1 << 19, generator=generator) * 24 - 14))
