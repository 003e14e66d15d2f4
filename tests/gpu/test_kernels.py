"""Every public operation on a GPU, as models call it, against references in float64 or its own form for a CPU.

What the interpreted tests of tests/kernels/gpu cannot show: products of bfloat16, sizes and offsets of real models,
recorded graphs, and that the public functions reach the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.oracles import Paged, PagedCase, poison, poisoned_allocations, relative_error
from quire.kernels import activation, norm, sampling
from quire.kernels.attention import PagedRows, paged_attention
from quire.kernels.blocks import copy_blocks, gather_blocks, scatter_blocks
from quire.kernels.linear import linear_invariant
from quire.kernels.qkv import norm_rotate_write

GPU = torch.device("cuda")
ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Relative, of whole results: a rounding or two."""

MIXED = ((1, 1), (17, 1), (300, 1), (2000, 1), (37, 37), (520, 130), (64, 64), (700, 3), (1500, 600))


@pytest.fixture(autouse=True)
def poisoned_and_exact() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    with poisoned_allocations():
        yield


def attend(case: PagedCase, which: int = 0, rows: PagedRows | None = None) -> torch.Tensor:
    return paged_attention(
        case.queries[which], case.layers[which], rows or case.rows(), case.scale, case.spec.window, case.slopes,
        case.kv_scales,
    )  # fmt: skip


def check(spec: Paged) -> None:
    case = PagedCase(spec, GPU)
    rows = case.rows()
    for which in range(spec.used):
        assert case.error(attend(case, which, rows), which) < ERROR[spec.dtype]


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (28, 4), (32, 1), (7, 1)])
def test_attention_of_mixed_rows(heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(Paged(MIXED, heads, num_layers=3, used=2, dtype=dtype))


@pytest.mark.parametrize("block_size", [8, 16, 32, 128])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_attention_of_head_and_block_sizes(size: int, block_size: int) -> None:
    check(Paged(MIXED, (8, 2), size, block_size, num_layers=2))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1}, {"window": 100}, {"window": 700}, {"alibi": True}, {"float8": True}, {"deterministic": True},
        {"float8": True, "window": 300}, {"alibi": True, "deterministic": True},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    check(Paged(MIXED, (8, 2), num_layers=2, dtype=dtype, **options))


@pytest.mark.parametrize("heads", [(32, 8), (40, 40)])
def test_attention_to_a_shared_prefix(heads: tuple[int, int]) -> None:
    rows = tuple((4096 + 1 + 37 * i, 1) for i in range(40))
    check(Paged(rows, heads, num_layers=2, prefix=4096))


def test_attention_to_one_long_context_beside_short_ones() -> None:
    check(Paged(((70_001, 1), *((1 + 50 * i, 1) for i in range(30))), num_layers=2))


def test_attention_in_a_pool_of_more_than_two_billion_elements() -> None:
    spec = Paged(((40_000, 1), (33, 33)), num_layers=32)
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    case = PagedCase(spec, GPU)
    assert case.pool.numel() > 1 << 31
    assert case.error(attend(case)) < ERROR[spec.dtype]


def test_deterministic_attention_depends_on_nothing_but_the_sequence() -> None:
    case = PagedCase(Paged(((1500, 1500), (900, 1), (40, 1)), num_layers=2, deterministic=True), GPU)
    whole = attend(case)

    def some(row: int, first: int, length: int) -> torch.Tensor:
        """Tokens first .. length - 1 of a row, alone."""
        start = int(case.starts[row + 1]) - int(case.lengths[row])
        starts, lengths = np.array([0, length - first], np.int32), np.array([length], np.int32)
        rows = PagedRows(case.tables[row : row + 1], starts, lengths, deterministic=True)
        q = case.queries[0][start + first : start + length]
        return paged_attention(q, case.layers[0], rows, case.scale)

    assert torch.equal(some(0, 0, 1500), whole[:1500])
    assert torch.equal(some(0, 0, 700), whole[:700]) and torch.equal(some(0, 700, 1500), whole[700:1500])
    for token in (0, 1, 63, 64, 1023, 1024, 1499):
        assert torch.equal(some(0, token, token + 1), whole[token : token + 1])
    assert torch.equal(some(1, 899, 900), whole[1500:1501])


@pytest.mark.parametrize("window", [None, 200])
def test_a_recorded_graph_follows_the_lengths_on_the_device(window: int | None) -> None:
    longest = (3000, 700, 64, 1, 900, 128)
    case = PagedCase(Paged(tuple((n, 1) for n in longest), num_layers=2, static=True), GPU)
    case.spec = replace(case.spec, window=window)
    held = case.layers[0].clone()
    starts, lengths = (torch.from_numpy(x).to(GPU) for x in (case.starts, case.lengths))

    def step() -> torch.Tensor:
        rows = PagedRows(case.tables, case.starts, case.lengths, on_device=(starts, lengths), static=True)
        return attend(case, rows=rows)

    replay, out = record(step)
    for now in (longest, (1, 1, 1, 1, 1, 1), (2999, 33, 64, 1, 512, 17), (5, 700, 0, 1, 0, 128)):
        case.layers[0].copy_(held)
        for row, (length, most) in enumerate(zip(now, longest, strict=True)):
            past = torch.arange(length, most, device=GPU)
            case.layers[0][case.tables[row].long()[past // 16], :, past % 16] = torch.nan
        case.lengths = np.array(now, np.int32)
        lengths.copy_(torch.from_numpy(case.lengths))
        case.queries[0].normal_()
        replay()
        for row in np.flatnonzero(case.lengths):
            want = case._expected_row(int(row), np.zeros(1, np.int64), 0)
            assert relative_error(out[row : row + 1], want) < ERROR[torch.bfloat16], (now, row)


def record(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A graph's replay, and what the call returned while it was recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(
    "options",
    [{}, {"norms": True}, {"interleaved": True, "rotated": 32}, {"rotated": 0}, {"float8": True, "norms": True}],
    ids=str,
)
def test_norm_rotate_write(options: dict[str, Any], dtype: torch.dtype) -> None:
    tokens, heads, kv_heads, size = 301, 8, 2, 96
    rotated = options.get("rotated", size)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, size).to(dtype)
    slots = torch.randperm(30 * 16)[:tokens]
    slots[[5, 300]] = -1
    positions = torch.randint(0, 500, (tokens,))
    table = torch.randn(500, rotated) if rotated else None
    weights = [torch.randn(size).to(dtype) for _ in range(2)] if options.get("norms") else [None, None]
    float8 = bool(options.get("float8"))
    scales = torch.rand(2, kv_heads) + 0.5 if float8 else None

    def run(device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        pool = poison(
            torch.empty(30, 3, 2, 16, kv_heads, size, dtype=torch.float8_e4m3fn if float8 else dtype, device=device)
        )
        there = [None if x is None else x.to(device) for x in (qkv, slots, positions, table, *weights, scales)]
        q = norm_rotate_write(
            there[0], pool[:, 1], *there[1:4], options.get("interleaved", False), *there[4:6], 1e-6, there[6]
        )
        return q.cpu(), pool.float().cpu()

    (q, pool), (want_q, want_pool) = run(GPU), run("cpu")
    assert q.is_contiguous() and relative_error(q, want_q) < ERROR[dtype]
    assert torch.equal(pool.isnan(), want_pool.isnan())
    assert relative_error(pool.nan_to_num(), want_pool.nan_to_num()) < (1e-2 if float8 else ERROR[dtype])


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("shape", [(1, 7), (33, 4096), (5, 5120), (3, 4, 96), (2, 16384), (2048, 64), (0, 64)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    width = shape[-1]
    wide = torch.randn(*shape[:-1], width + 24, device=GPU).to(dtype)
    x = wide[..., 8 : width + 8]
    residual, weight, bias = (torch.randn(n, device=GPU).to(dtype) for n in (shape, width, width))
    total = x + residual

    def rms(x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight.double()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)

    close(norm.rms_norm(x, weight, 1e-5), rms(x))
    close(norm.layer_norm(x, weight, bias, 1e-5), layer(x))
    close(norm.layer_norm(x, None, None, 1e-5), F.layer_norm(x.double(), (width,), eps=1e-5))
    if len(shape) == 2:
        for (got, added), want in (
            (norm.add_rms_norm(x, residual, weight, 1e-5), rms(total)),
            (norm.add_layer_norm(x, residual, weight, bias, 1e-5), layer(total)),
        ):
            close(got, want)
            assert torch.equal(added, total)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert not got.numel() or relative_error(got, want) < ERROR[got.dtype]


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("shape", [(1, 22), (33, 28672), (2048, 1024), (3, 6), (0, 64)])
def test_activations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (3 * torch.randn(shape, device=GPU)).to(dtype)
    gate, up = x.double().chunk(2, -1)
    close(activation.silu_and_mul(x), F.silu(gate) * up)
    close(activation.gelu(x), F.gelu(x.double()))
    close(activation.gelu(x, tanh=True), F.gelu(x.double(), approximate="tanh"))
    assert torch.equal(activation.relu(x), F.relu(x))


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(("out_size", "in_size"), [(6144, 4096), (80, 48), (33, 100)])
def test_invariant_products(out_size: int, in_size: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(out_size, in_size, device=GPU).to(dtype), torch.randn(out_size, device=GPU).to(dtype)
    x = torch.randn(300, in_size + 8, device=GPU).to(dtype)[:, :in_size]
    whole = linear_invariant(x, weight, bias)
    close(whole, x.double() @ weight.double().T + bias.double())
    close(linear_invariant(x, weight), x.double() @ weight.double().T)
    order = torch.randperm(300, device=GPU)
    assert torch.equal(linear_invariant(x[order], weight, bias), whole[order])
    for rows in (1, 2, 17, 64, 129):
        assert torch.equal(linear_invariant(x[:rows], weight, bias), whole[:rows])
    assert linear_invariant(x[:0], weight, bias).shape == (0, out_size)


@pytest.mark.parametrize("shape", [(32, 2, 16, 8, 128), (3, 5), (1,), (100_001,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_blocks_are_moved(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pool = torch.randint(0, 100, (41, *shape), device=GPU).to(dtype)
    order = torch.randperm(41, device=GPU)
    pairs, ids = order[:20].view(10, 2), order[20:35]
    want = pool.clone()
    want[pairs[:, 1]] = want[pairs[:, 0]]
    copy_blocks(pool, pairs)
    assert torch.equal(pool, want)
    staging = torch.empty(15, *shape, dtype=dtype, device=GPU)
    gather_blocks(pool, ids, staging)
    assert torch.equal(staging, want[ids]) and torch.equal(pool, want)
    want[ids] = staging.flip(0)
    scatter_blocks(pool, ids, staging.flip(0))
    assert torch.equal(pool, want)
    for move in (gather_blocks, scatter_blocks):
        move(pool, ids[:0], staging[:0])
    copy_blocks(pool, pairs[:0])
    assert torch.equal(pool, want)


def columns(n: int, rng: np.random.Generator) -> sampling.Columns:
    return sampling.Columns(
        temperature=rng.choice([0, 0.5, 1, 2], n).astype(np.float32),
        top_k=rng.choice([0, 0, 1, 5, 50, 2000], n).astype(np.int32),
        top_p=rng.choice([0.3, 0.9, 0.999, 1.0], n).astype(np.float32),
        min_p=rng.choice([0, 0, 0.05, 0.3], n).astype(np.float32),
        seed=rng.integers(0, 2**63, n).astype(np.uint64),
        position=rng.integers(0, 4096, n),
    )


@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 128256), (130, 32000), (40, 151937), (300, 17), (0, 100)])
def test_samples_are_those_of_a_cpu(rows: int, vocab_size: int) -> None:
    rng = np.random.default_rng(rows)
    logits = 3 * torch.randn(rows, vocab_size)
    settings = columns(rows, rng)
    if rows > 3:
        logits[1, 5], logits[2] = torch.nan, -torch.inf
        logits[3, 7] = torch.inf
    got = sampling.sample(logits.to(GPU), settings).cpu()
    want = sampling.sample(logits, settings)
    # The noise of both agrees to a millionth: a near tie may fall to either.
    assert (got != want).sum() <= 0.01 * rows
    assert got[1:4].tolist() == [-1] * 3 if rows > 3 else True
    assert torch.equal(sampling.greedy(logits.to(GPU)).cpu(), sampling.greedy(logits))


def test_entries_and_penalties_are_those_of_a_cpu() -> None:
    rng = np.random.default_rng(1)
    rows, vocab_size, width = 40, 32003, 700
    logits = 3 * torch.randn(rows, vocab_size)
    entries = sampling.Entries(
        rng.integers(0, rows, 3000), rng.integers(0, vocab_size, 3000), rng.normal(size=3000).astype(np.float32)
    )
    entries.values[::7] = -np.inf
    known = rng.integers(2, width + 1, 20)
    tokens = rng.integers(0, 300, (20, width)).astype(np.int32)
    for row, n in enumerate(known):
        tokens[row, n:] = 10**6

    def apply(device: torch.device | str) -> torch.Tensor:
        x = logits.clone().to(device)
        penalties = sampling.Penalties(rng_rows, torch.from_numpy(tokens).to(device), known // 2, known, *amounts)
        sampling.add_entries(x, entries)
        sampling.penalize(x, penalties)
        return x.cpu()

    rng_rows = rng.permutation(rows)[:20]
    amounts = [rng.uniform(low, high, 20).astype(np.float32) for low, high in ((0.7, 1.5), (-1, 1), (-0.5, 0.5))]
    torch.testing.assert_close(apply(GPU), apply("cpu"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [0, 1, 5, 20, 64])
def test_log_probabilities_are_those_of_a_cpu(k: int) -> None:
    logits = 3 * torch.randn(37, 128256)
    tokens = torch.randint(0, 128256, (37,))
    tokens[3] = -1
    got = [x.cpu() for x in sampling.log_probabilities(logits.to(GPU), tokens.to(GPU), k)]
    want = sampling.log_probabilities(logits, tokens, k)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
