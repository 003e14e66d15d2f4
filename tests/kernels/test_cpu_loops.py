"""The loops that numba compiles for a CPU: against twins, the torch forms, and themselves on other threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from paged_case import Case

from quire.kernels import activation, dispatch, norm, qkv, reference, rotary
from quire.kernels.attention import PagedRows, SharedPrefixes, paged_attention
from quire.kernels.cpu import decode, tile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

BUGS = [
    ("first token unseen", "kernels/cpu/tile.py", 'icmp_signed(">=", place, first)', 'icmp_signed(">", place, first)',
     "test_prefill"),
    ("a token too many", "kernels/cpu/tile.py", 'icmp_signed("<", place, end)', 'icmp_signed("<=", place, end)',
     "test_decode"),
    ("weights not shrunk", "kernels/cpu/tile.py", "tokens.fma(totals, tokens.splat(shrink), functools",
     "tokens.fma(totals, tokens.splat(1.0), functools", "test_decode"),
    ("values not shrunk", "kernels/cpu/tile.py", "factor = rows.splat(shrink)", "factor = rows.splat(1.0)",
     "test_decode"),
    ("scale missing", "kernels/cpu/tile.py", "tokens.splat(scale)", "tokens.splat(1.0)", "test_decode"),
    ("one token's weight for all of a part", "kernels/cpu/tile.py", "b.add(self.state, b.mul(wide, I64(4)))",
     "self.state", "test_decode"),
    ("one token's weight for all", "kernels/cpu/tile.py", "self.scratch_at + 4 * token", "self.scratch_at",
     "test_decode"),
    ("one pair's weights for all", "kernels/cpu/tile.py", "self.scratch_at + 4 * pair", "self.scratch_at",
     "test_decode"),
    ("a pair's weights swapped", "kernels/cpu/tile.py", "rows.interleave(*pair)", "rows.interleave(*pair[::-1])",
     "test_decode"),
    ("another order than it was summed in", "kernels/cpu/vector.py", "{place: 2 * i + half for", "{place: i + half for",
     "test_decode"),
    ("without pairs, odd for even", "kernels/cpu/vector.py", "else b.shl(words, self._splat_word(16))",
     "else words", "test_without_products_of_pairs"),
    ("splits merged as equals", "kernels/cpu/decode.py",
     "weight = np.float32(2) ** (states[s, size + 2 * TOTALS] - top)", "weight = np.float32(1)", "test_decode"),
    ("another layer's window", "kernels/cpu/decode.py", "layout, scale, window, kv_scales is None)",
     "layout, scale, kv_scales is None)", "test_layers_of_a_step_may_differ"),
    ("another layer's pool", "kernels/cpu/decode.py", "q.data_ptr(), kv_layer.data_ptr(), out.data_ptr()\n",
     "q.data_ptr(), arguments[10] or kv_layer.data_ptr(), out.data_ptr()\n", "test_layers_of_a_step_may_differ"),
    ("a split begins late", "kernels/cpu/decode.py", "(first // SPLIT + 1) * SPLIT)", "(first // SPLIT + 2) * SPLIT)",
     "test_decode"),
    ("another head's keys", "kernels/cpu/decode.py", "range(kv_head * group, (kv_head + 1) * group):\n",
     "range(kv_head, heads, kv_heads):\n", "test_decode"),
    ("heads nobody computes", "kernels/cpu/decode.py", "high = everything * (thread() + 1)",
     "high = (everything * (thread() + 1) - everything // 4)", "test_decode"),
    ("not causal", "kernels/cpu/prefill.py", "place + 1 - origin)", "last - origin)", "test_prefill"),
    ("window too wide", "kernels/cpu/prefill.py", "place - window + 1 - origin)", "place - window - origin)",
     "test_prefill"),
    ("stale sums", "kernels/cpu/prefill.py", "for i in range(queries * group):\n                        clear",
     "for i in range(group):\n                        clear", "test_prefill"),
    ("keys of the first head", "kernels/cpu/prefill.py", "+ (inside - start) * of_token + kv_head * of_head",
     "+ (inside - start) * of_token", "test_prefill"),
    ("a stale value times 0", "kernels/cpu/packed.py", "if start <= token < stop:", "if token < 99:", "test_prefill"),
    ("one pair's packed weights for all", "kernels/cpu/packed.py", "scratch + 4 * pair)", "scratch)",
     "test_prefill"),
    ("halves in the order of memory", "kernels/cpu/packed.py", "at + lanes + i, half] = value[eight, 1, i]",
     "at + lanes + i, half] = value[eight, 0, i]", "test_prefill"),
    ("one state for four queries", "kernels/cpu/packed.py", "builder.add(states[-1], stride)", "state",
     "test_long_prompts"),
    ("a query sees the next token", "kernels/cpu/prefill.py", "np.int32(stop + 1)", "np.int32(stop + 2)",
     "test_long_prompts"),
    ("four windows for the last of four", "kernels/cpu/prefill.py", "np.int32(max(start, low - 2))",
     "np.int32(max(start, low))", "test_long_prompts"),
    ("the second of two tiles forgotten", "kernels/cpu/shared.py", "size, tile, 2,", "size, tile, 1,",
     "test_shared_prefixes"),
    ("another group's prefix", "kernels/cpu/shared.py", "np.int64(rows[starts[g]])", "np.int64(rows[0])",
     "test_shared_prefixes"),
    ("the last rows of a group left out", "kernels/cpu/shared.py", "parts = (count + most - 1) // most",
     "parts = count // most", "test_shared_prefixes"),
    ("a prefix counted in every split", "kernels/cpu/decode.py", "is_begun = False", "is_begun = is_begun",
     "test_shared_prefixes"),
    ("a prefix attended twice", "kernels/cpu/decode.py",
     "first = max(np.int64(begins[row]), length - window)\n            is_begun",
     "first = max(np.int64(0), length - window)\n            is_begun", "test_shared_prefixes"),
    ("members by their rows among all", "kernels/cpu/attention.py", "np.searchsorted(decode, shared.rows)",
     "shared.rows.copy()", "test_shared_prefixes"),
    ("even for odd", "kernels/cpu/vector.py", "return self.widened(words, 0), self.widened(words, 1)",
     "return self.widened(words, 1), self.widened(words, 1)", "test_decode"),
    ("e for 2", "kernels/cpu/decode.py", "scale * LOG2E", "scale", "test_decode"),
    ("sum not rounded", "kernels/cpu/fused.py", "_norm_row(total, weight, eps, out)", "_norm_row(x, weight, eps, out)",
     "test_equal_the_torch_forms"),
    ("normed value not rounded", "kernels/cpu/fused.py", "_widen(_narrow(_widen(x[i]) * factor, x[i]))",
     "_widen(x[i]) * factor", "test_rounded_where_the_torch_forms_round"),
    ("gate not rounded", "kernels/cpu/fused.py",
     "_widen(_narrow(bounded / (np.float32(1) + _exp(-bounded)), gate[i]))",
     "bounded / (np.float32(1) + _exp(-bounded))", "test_rounded_where_the_torch_forms_round"),
    ("ties away", "kernels/cpu/fused.py", "b.add(bits, b.add(tie, word(0x7FFF)))", "b.add(bits, word(0x8000))",
     "test_rounded_where_the_torch_forms_round"),
    ("turned the other way", "kernels/cpu/fused.py", "a * cos - b * sin", "a * cos + b * sin",
     "test_equal_the_torch_forms"),
    ("V to K's place", "kernels/cpu/fused.py", "place + a[12] + (head", "place + (head", "test_equal_the_torch_forms"),
    ("slot 0 not written", "kernels/cpu/fused.py", "written = slot >= 0", "written = slot > 0",
     "test_equal_the_torch_forms"),
    ("silu of large values", "kernels/cpu/fused.py",
     "bounded = np.float32(-88) if x < np.float32(-88) else x", "bounded = x", "test_silu_of_every_size"),
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [((6, 2), 64), ((3, 3), 24), ((4, 1), 6)])
def test_decode(heads: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    Case([(1, 1), (700, 1), (16, 1), (31, 1)], heads=heads, size=size, dtype=dtype).check()
    Case([(300, 1), (90, 1)], heads=heads, size=size, window=40, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [((6, 2), 64), ((3, 3), 24), ((40, 1), 6)])
def test_prefill(heads: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    rows = [(50, 50), (70, 33), (100, 1), (3, 2), (90, 67)]
    Case(rows, heads=heads, size=size, dtype=dtype).check()
    Case(rows, heads=heads, size=size, window=20, dtype=dtype).check()


def groups(*members: tuple[int, int, int]) -> SharedPrefixes:
    """Rows from, to, and the tokens that they share."""
    rows = np.concatenate([np.arange(start, stop) for start, stop, _ in members]).astype(np.int32)
    starts = np.cumsum([0, *(stop - start for start, stop, _ in members)]).astype(np.int32)
    return SharedPrefixes(rows, starts, np.array([tokens for *_, tokens in members], np.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size", "block_size"), [((6, 2), 64, 16), ((3, 3), 24, 4), ((66, 1), 16, 32)])
def test_shared_prefixes(heads: tuple[int, int], size: int, block_size: int, dtype: torch.dtype) -> None:
    """Rows that go on for a token, a split and several; more of them than meet a tile together; and among chunks."""
    rows = [(289, 1), (300, 1), (1200, 1), (512, 1), (513, 1), (700, 1), (330, 1)]
    case = Case(rows, heads, size, block_size, dtype=dtype, shared=6, prefix=288)
    case.rows.shared = groups((0, 6, 288))
    case.check()
    case = Case([(90, 7), *rows, (60, 33), (290, 1)], heads, size, block_size, dtype=dtype)
    case.rows.block_tables[3:6, : 256 // block_size] = case.rows.block_tables[2, : 256 // block_size]
    case.rows.block_tables[7, : 96 // block_size] = case.rows.block_tables[6, : 96 // block_size]
    case.rows.shared = groups((2, 6, 256), (6, 8, 96))
    case.check()
    case = Case([(200 + i, 1) for i in range(70)], heads, size, block_size, dtype=dtype, shared=70, prefix=192)
    case.rows.shared = groups((0, 70, 192))
    case.check()


def test_a_window_has_no_use_for_a_shared_prefix() -> None:
    case = Case([(300, 1), (310, 1)], (6, 2), 64, window=60, dtype=torch.bfloat16)
    case.rows.shared = groups((0, 2, 256))
    case.check()


def test_a_prefix_is_read_together_only_where_pairs_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([(300, 1), (310, 1)], (6, 2), 64, dtype=torch.bfloat16, shared=2, prefix=288)
    case.rows.shared = groups((0, 2, 288))
    case.check()
    calls = [x for x in case.rows.derived.values() if isinstance(x, decode._Call)]
    assert [bool(call.shared) for call in calls] == [bool(tile.form_of(64, 16, 2, 2).dot)]
    case.rows.derived.clear()
    monkeypatch.setattr(tile, "has_dot", lambda: False)
    case.check()
    assert not any(call.shared for call in case.rows.derived.values() if isinstance(call, decode._Call))


def test_long_prompts() -> None:
    """More queries than meet a tile together, and chunks that begin and end inside of tiles."""
    rows = [(300, 300), (411, 150), (2, 2), (555, 6), (301, 133)]
    for heads, window in ((2, 2), None), ((2, 1), None), ((2, 2), 37), ((2, 1), 150):
        Case(rows, heads, size=64, dtype=torch.bfloat16, window=window).check()


def test_without_products_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that has none for bfloat16."""
    monkeypatch.setattr(tile, "has_dot", lambda: False)
    for heads, size in ((6, 2), 64), ((3, 3), 24):
        Case([(1, 1), (700, 1), (60, 60), (90, 33)], heads=heads, size=size, dtype=torch.bfloat16).check()
        Case([(300, 1), (90, 1)], heads=heads, size=size, window=40, dtype=torch.bfloat16).check()


def test_layers_of_a_step_may_differ() -> None:
    """What is kept of a step's rows serves layers with other windows, places in the pool, and scales."""
    case = Case([(300, 1), (90, 1), (7, 1)], heads=(6, 2), float8=True)
    first, others = case.kv_layer, case.kv_layer._base
    assert others is not None and case.kv_scales is not None
    second = others[:, 2]
    second.view(torch.uint8).copy_(first.view(torch.uint8).flip(-1))
    for window in (None, 40, None):
        for layer, scales in (first, case.kv_scales), (second, 2 * case.kv_scales), (first, None):
            case.window, case.kv_layer = window, layer
            kept, case.kv_scales = case.kv_scales, scales
            case.check(tolerance=1e-5)
            case.kv_scales = kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    case = Case([(700, 1), (60, 60), (300, 1), (400, 33)], heads=(6, 3), size=64, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(case.run())
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_bfloat16_token_depends_on_no_neighbour_and_no_cut() -> None:
    """In the deterministic form, to the last bit."""
    whole = Case([(300, 300)], heads=(2, 1), size=64, dtype=torch.bfloat16, deterministic=True)
    want = whole.run()
    for start, stop in ((13, 14), (14, 250), (299, 300)):
        tables = whole.rows.block_tables.repeat(2, 1)
        starts = np.array([0, stop - start, stop - start + 1], np.int32)
        rows = PagedRows(tables, starts, np.array([stop, 40], np.int32), deterministic=True)
        q = torch.cat([whole.q[start:stop], whole.q[39:40]])
        got = paged_attention(q, whole.kv_layer, rows, whole.scale)
        assert torch.equal(got, torch.cat([want[start:stop], want[39:40]]))


def operations(rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Every operation's results, on inputs that depend on the number of rows and the type alone."""
    torch.manual_seed(rows)
    x, residual = (torch.randn(rows, 2 * 90).to(dtype) for _ in range(2))
    weight = torch.randn(180).to(dtype)
    heads = torch.randn(rows, 9, 26).to(dtype)[:, 1:8]
    pool = torch.zeros(-(-rows // 4) + 1, 2, 2, 4, 2, 26, dtype=dtype)
    slots = torch.randperm(4 * len(pool))[:rows]
    angles = rotary.cos_sin_table(10000 ** -(torch.arange(0, 20, 2) / 20), 50)
    positions = torch.randint(0, 50, (rows,))
    scales = torch.randn(2, 26).to(dtype)
    results = [norm.rms_norm(x, weight, 1e-5), *norm.add_rms_norm(x, residual, weight, 1e-5)]
    results += [activation.silu_and_mul(4 * x), norm.rms_norm(heads, scales[0], 1e-5)]
    for norms in ((None, None), (scales[0], scales[1])):
        q = qkv.norm_rotate_write(heads, pool[:, 1], slots, positions, angles, False, *norms, 1e-5)
        results += [q, pool.clone()]
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_the_torch_forms(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (1, 7, 200):
        compiled = operations(rows, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "compiled", lambda *_: None)
            plain = operations(rows, dtype)
        for got, want in zip(compiled, plain, strict=True):
            tolerance = (16 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_where_the_torch_forms_round(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for ties that the last bit of a sum or of an exponential decides, every bit is the torch form's."""
    compiled = operations(400, dtype)
    monkeypatch.setattr(dispatch, "compiled", lambda *_: None)
    for got, want in zip(compiled, operations(400, dtype), strict=True):
        assert (got != want).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_rows_or_threads(dtype: torch.dtype) -> None:
    x, weight = torch.randn(300, 180).to(dtype), torch.randn(180).to(dtype)
    for operation in (lambda x: norm.rms_norm(x, weight, 1e-5), activation.silu_and_mul):
        whole = operation(x)
        torch.set_num_threads(3)
        assert torch.equal(operation(x), whole)
        assert all(torch.equal(operation(x[i : i + 1])[0], whole[i]) for i in range(0, 300, 37))


def test_padding_is_not_written() -> None:
    pool = torch.full((3, 2, 4, 1, 8), torch.nan)
    angles = rotary.cos_sin_table(10000 ** -(torch.arange(0, 8, 2) / 8), 5)
    slots = torch.tensor([-1, 5, -9])
    qkv.norm_rotate_write(torch.randn(3, 4, 8), pool, slots, torch.zeros(3, dtype=torch.int64), angles)
    assert (~pool.isnan()).nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[1, 1]]


def test_silu_of_every_size() -> None:
    values = torch.tensor([0.0, 1e-30, -1e-30, 20.0, -20.0, -87.0, -90.0, -200.0, -1e30, 200.0, 1e30, torch.nan])
    x = torch.cat([values, torch.ones_like(values)])[None]
    torch.testing.assert_close(
        activation.silu_and_mul(x), reference.silu_and_mul(x), rtol=1e-5, atol=1e-30, equal_nan=True
    )


def test_nan_stays_where_it_is() -> None:
    x = torch.randn(5, 64).bfloat16()
    x[2, 7] = torch.nan
    weight = torch.ones(64).bfloat16()
    normed, total = norm.add_rms_norm(x, x, weight, 1e-5)
    assert normed.isnan().any(1).tolist() == [False, False, True, False, False]
    assert total.isnan().sum() == 1
