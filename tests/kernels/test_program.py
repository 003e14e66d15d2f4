"""Steps recorded once and replayed: the same bits as launched ones, whatever changes between two runs."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch

if importlib.util.find_spec("numba") is None:
    pytest.skip("loops are compiled by numba", allow_module_level=True)

from quire.kernels.cpu import blocked_linear, decode, fused
from quire.kernels.cpu.program import Memory, NotRecordable, record

FILE = "kernels/cpu/program.py"
BUGS = [
    ("blocks given away too early", FILE, "weakref.finalize(view, free.append, block)", "free.append(block)",
     "test_memory_is_used_again_when_nobody_does"),
    ("blocks never given back", FILE, "weakref.finalize(view, free.append, block)", "pass",
     "test_memory_is_used_again_when_nobody_does"),
    ("a counter goes on counting", FILE, "and calls[i, 2] != 0:", "and calls[i, 2] == 7:", "test_products_run_again"),
    ("the last region left out", FILE, "for i in range(a[0]):", "for i in range(a[0] - 1):",
     "test_what_stands_in_memory_is_read_at_each_run"),
    ("arguments shared by all layers", "kernels/cpu/threads.py",
     "copy = type(arguments).from_buffer_copy(arguments)", "copy = arguments", "test_decode_follows_the_lengths"),
    ("lengths as they were", "kernels/cpu/decode.py",
     "bounds = lengths if longest is None", "lengths = lengths.copy(); bounds = lengths if longest is None",
     "test_decode_follows_the_lengths"),
    ("room for the splits of today", "kernels/cpu/decode.py",
     "lengths if longest is None else np.full(num_rows, longest, np.int32)", "lengths",
     "test_decode_follows_the_lengths"),
    ("factors freed", "kernels/cpu/decode.py", "threads.keep(factors)", "pass",
     "test_a_program_keeps_what_it_reads_from"),
    ("whatever computes passes", FILE, "if not func.is_view:", "if False:", "test_what_computes_otherwise_is_refused"),
]  # fmt: skip

HEADS, SIZE, BLOCK, WIDTH = 4, 64, 16, 40


pytestmark = pytest.mark.usefixtures("two_threads")


def test_what_stands_in_memory_is_read_at_each_run() -> None:
    x, weight = torch.randn(9, 96), torch.randn(96)
    made = record(lambda: fused.silu_and_mul(fused.rms_norm(x, weight, 1e-5)), Memory())
    for _ in range(3):
        x.normal_()
        made.run()
        assert torch.equal(made.result, fused.silu_and_mul(fused.rms_norm(x, weight, 1e-5)))


def test_nothing_is_computed_while_it_is_recorded() -> None:
    x, kv = torch.randn(3, 3 * HEADS, SIZE), torch.full((8, 2, BLOCK, HEADS, SIZE), torch.nan)
    slots, positions = torch.tensor([5, -1, 40]), torch.tensor([5, 0, 8])
    angles = torch.randn(16, SIZE)

    def write() -> torch.Tensor:
        return fused.norm_rotate_write(x, kv, slots, positions, angles, None, None, 0.0)

    made = record(write, Memory())
    assert kv.isnan().all()
    made.run()
    there = ~kv.isnan().all(-1).all(-1)
    assert there.sum() == 4 and there[0, :, 5].all() and there[2, :, 8].all()
    assert torch.equal(made.result, write())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_decode_follows_the_lengths(dtype: torch.dtype, window: int | None, num_threads: int) -> None:
    """Two layers, so that the arguments of one are not those of the other; contexts of one split and of several."""
    torch.set_num_threads(num_threads)
    pools = torch.randn(2, 3 * WIDTH, 2, BLOCK, HEADS, SIZE).to(dtype)
    tables = torch.randperm(3 * WIDTH, dtype=torch.int32).view(3, WIDTH)
    q, lengths = torch.randn(3, 2 * HEADS, SIZE).to(dtype), np.ones(3, np.int32)

    def twice(longest: int | None) -> torch.Tensor:
        rows, derived = lengths if longest else lengths.copy(), {}  # type: ignore[var-annotated]
        first = decode.decode(q, pools[0], tables, rows, 0.1, window, None, derived, None, longest)
        return decode.decode(first, pools[1], tables, rows, 0.1, window, None, derived, None, longest)

    made = record(lambda: twice(WIDTH * BLOCK), Memory())
    for now in ([1, 2, 3], [640, 1, 257], [256, 512, 511], [100, 101, 357], [300, 299, 298]):
        lengths[:] = now
        q.normal_()
        made.run()
        assert torch.equal(made.result, twice(None))


@pytest.mark.skipif(
    not blocked_linear.suits_processor(),
    reason="this processor multiplies no vectors, or whole tiles of bfloat16",
)
def test_products_run_again() -> None:
    weight = torch.randn(640, 96).bfloat16()
    product = blocked_linear.blocked(weight)
    assert product is not None
    x = torch.randn(7, 96).bfloat16()
    made = record(lambda: product.multiply(x, product.packed, None), Memory())
    for _ in range(3):
        x.normal_()
        made.run()
        assert torch.equal(made.result, product.multiply(x, product.packed, None))


@pytest.mark.parametrize(
    "compute", [lambda x: x + 1, lambda x: x.clone(), lambda x: torch.zeros(3), lambda x: x.t() @ x]
)
def test_what_computes_otherwise_is_refused(compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x, weight = torch.randn(4, 32), torch.ones(32)
    with pytest.raises(NotRecordable, match="aten"):
        record(lambda: compute(fused.rms_norm(x, weight, 1e-5)), Memory())
    # Nothing goes on being recorded.
    assert torch.equal(fused.rms_norm(x, weight, 1e-5), fused.rms_norm(x, weight, 1e-5))


def test_rows_whose_states_would_fill_the_memory_are_refused() -> None:
    q, kv = torch.randn(64, 32, SIZE), torch.randn(1, 2, BLOCK, 32, SIZE)
    tables, lengths = torch.zeros(64, 1, dtype=torch.int32), np.ones(64, np.int32)
    with pytest.raises(NotRecordable, match="64 rows of up to 131072 tokens"):
        record(lambda: decode.decode(q, kv, tables, lengths, 1.0, None, None, {}, None, 131072), Memory())


def test_memory_is_used_again_when_nobody_does() -> None:
    memory = Memory()
    first = memory.empty((10, 10), torch.float32)
    view = first.view(-1)[5:]
    place = first.data_ptr()
    del first
    assert memory.empty((100,), torch.float32).data_ptr() != place  # a view still uses it
    del view
    again = memory.empty((50, 4), torch.bfloat16)
    assert again.data_ptr() == place and place % 64 == 0 and memory.num_bytes == 1024


def test_programs_of_similar_sizes_share_their_memory() -> None:
    memory, weight = Memory(), torch.randn(64)
    programs = []
    for rows in range(33, 64):
        x = torch.randn(rows, 64)
        made = record(lambda x=x: fused.rms_norm(fused.rms_norm(x, weight, 1e-5), weight, 1e-5), memory)
        programs.append((made, x))
    assert memory.num_bytes == 2 * (1 << 14)
    for made, x in programs:
        made.run()
        assert torch.equal(made.result, fused.rms_norm(fused.rms_norm(x, weight, 1e-5), weight, 1e-5))


def test_a_program_keeps_what_it_reads_from() -> None:
    """Factors of scales are made anew in every call, and nobody else holds them."""
    scales = torch.tensor([[0.5] * HEADS, [2.0] * HEADS])
    q, kv = torch.randn(1, HEADS, SIZE), torch.randn(4, 2, BLOCK, HEADS, SIZE)
    tables, lengths = torch.zeros(1, 4, dtype=torch.int32), np.full(1, 9, np.int32)

    def attend(longest: int | None = None) -> torch.Tensor:
        return decode.decode(q, kv, tables, lengths, 0.1, None, scales, {}, None, longest)

    made = record(lambda: attend(64), Memory())
    gc.collect()
    filled = [np.full((2, HEADS), np.nan, np.float32) for _ in range(1000)]  # where freed factors would have been
    made.run()
    assert len(filled) == 1000 and torch.equal(made.result, attend())
