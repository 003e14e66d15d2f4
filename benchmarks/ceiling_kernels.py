# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
"""Two Triton kernels that do nothing but reach a limit. Imported late: importing triton fixes whether it interprets."""

import triton
import triton.language as tl


@triton.jit
def sum_parts(x, sums, part, BLOCK: tl.constexpr):
    """Program i adds up x[i * part : (i + 1) * part], float32, part a multiple of BLOCK: reads, and hardly writes."""
    program = tl.program_id(0)
    x += program.to(tl.int64) * part
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, part, BLOCK):
        total += tl.load(x + start + offsets)
    tl.store(sums + program, tl.sum(total, 0))


@triton.jit
def nothing(x):
    """As little as a kernel can do that depends on the one before."""
    tl.store(x, tl.load(x) + 1.0)
