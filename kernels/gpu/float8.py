"""Eight-bit floats, e4m3 as torch.float8_e4m3fn has it, by integer operations on their patterns.

Not every GPU that Quire runs on converts this type (sm_80 does not, and gfx942 has a variant of its own), and the
interpreter does not either; the patterns are the same everywhere. A kernel gets a float8 tensor as
`tensor.view(torch.uint8)`.

e4m3 has a sign, 4 bits of exponent with bias 7 and 3 of mantissa; no infinity; 0x7f and 0xff are NaN; the largest is
448.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

E4M3_SCALE = 256.0
"""What a decoded value must be multiplied with."""

E4M3_MAX = 448.0


@triton.jit
def decode_e4m3(bits, NATIVE: tl.constexpr = False):
    """uint8 -> float16: the value times 2^-8, exactly; NaN where NaN.

    A float16 has one more bit of exponent and its bias is 8 larger: bits moved, subnormals among them, keep their
    meaning up to 2^-8. The caller folds `E4M3_SCALE` into a scale of its own. NATIVE: the same by the GPU's own
    conversion, a quarter of the instructions, where there is one (CUDA from sm_89 on).
    """
    if NATIVE:
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float16) * 0.00390625
    # Sign and the seven other bits in place, and a copy of the sign between them, which goes.
    moved = (bits.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001
    # Of all patterns only NaN's carries into bit 14: the exponent becomes that of float16's own NaN.
    return (moved | ((moved + 0x80) & 0x4000)).to(tl.float16, bitcast=True)


@triton.jit
def encode_e4m3(x):
    """float32 -> uint8: rounded to nearest, ties to even; what is beyond +-448, infinity too, becomes +-448."""
    word = x.to(tl.int32, bitcast=True)
    magnitude = word & 0x7FFFFFFF
    # The bits of positive floats are in the floats' order. 0x43E00000 is 448, which also stands in for NaN for now.
    clamped = tl.minimum(magnitude, 0x43E00000)
    # From 2^-6 on the exponent stays in place: 20 of 23 bits of mantissa go, and the bias falls by 120.
    normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - (120 << 3)
    # Below, values are whole numbers of 2^-9, which is the last bit of a float32 near 2^14: the sum rounds. The sum is
    # never subnormal, so it does not matter what a GPU makes of subnormal float32.
    small = (clamped.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(clamped < 0x3C800000, small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((word >> 24) & 0x80)).to(tl.uint8)
