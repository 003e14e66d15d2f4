"""The sampling kernels against their twin in torch: every token the same, but where rounding decides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from guarded import apart
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import dispatch
from quire.kernels import sampling as twin
from quire.kernels.gpu import sampling as gpu
from quire.kernels.gpu.sampling import _exponential
from quire.kernels.sampling import Columns, Entries, Penalties

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf

FILE = "kernels/gpu/sampling.py"
BUGS = [
    ("last token missing", FILE, "mask=token < vocab_size, other", "mask=token < vocab_size - 1, other",
     "test_the_last_token"),
    ("a token past the vocabulary", FILE, "mask=token < vocab_size, other", "mask=token < vocab_size + 1, other",
     "test_rows_apart"),
    ("noise read past the vocabulary", FILE, "mask=step < vocab_size, other", "mask=step < vocab_size + 1, other",
     "test_rows_apart"),
    ("the last of equals", FILE, "tl.min(tl.min(tl.where(x == top, token, _NO_TOKEN), 0), 0)",
     "tl.max(tl.max(tl.where(x == top, token, -1), 0), 0)", "test_greedy_takes_the_first_of_the_largest"),
    ("NaN passed over", FILE, "tl.store(numbers, tl.where(broken, float(\"nan\"), top))", "tl.store(numbers, top)",
     "test_rows_without_finite_logits_get_no_token_and_poison_nobody"),
    ("infinity taken", FILE, "& (top < float(\"inf\"))", "", "test_greedy_takes_the_first_of_the_largest"),
    ("chunks merged by their own tops", FILE, "other=float(\"inf\")) * tl.exp2(beyond)", "other=float(\"inf\"))",
     "test_equals_the_twin"),
    ("masses added by their own tops", FILE, "masses * tl.exp2(-beyond)", "masses",
     "test_likely_tokens_in_one_place"),
    ("one chunk's noise for all", FILE, "_exponential(step, key0", "_exponential(step % _CHUNK, key0",
     "test_equals_the_twin"),
    ("noise by the place in the list", FILE, "value = _exponential(token, key0", "value = _exponential(at, key0",
     "test_equals_the_twin"),
    ("wrong shift in the hash", FILE, "h ^= h >> 15", "h ^= h >> 14", "test_noise"),
    ("small draws rounded away", FILE, "f = tl.where(exponent == 0, u, f)", "pass", "test_noise"),
    ("temperature forgotten in cuts", FILE, "distance = (top - logit) * scale", "distance = (top - logit) * _LOG2E",
     "test_equals_the_twin"),
    ("min-p before the temperature", FILE, "astype(np.float64))) * temperature[held]", "astype(np.float64)))",
     "test_equals_the_twin"),
    ("top-k left at the groups' bound", FILE, "k, 0, limit, BLOCK", "k, k // 4 + 16, limit, BLOCK",
     "test_neighbours_among_floats"),
    ("one more than k", FILE, "enough = counts >= k", "enough = counts > k", "test_neighbours_among_floats"),
    ("search given up early", FILE, "while (high - low > 1)", "while (high - low > 64)",
     "test_neighbours_among_floats"),
    ("top-p's share of the whole row", FILE, "total = mass\n", "total = 4 * mass\n", "test_equals_the_twin"),
    ("any pick in the nucleus", FILE, "going = (mass >= top_p * total)", "going = (mass > total)",
     "test_equals_the_twin"),
    ("a group's tokens side by side", FILE, "(offsets % _GROUP) * _WIDTH", "(offsets % _GROUP)",
     "test_equals_the_twin"),
    ("entries of the first row", FILE, "row * stride + token, value", "token, value", "test_entries_add_up_and_forbid"),
    ("unknown tokens counted", FILE, "(index >= num_prompt) & (index < num_known)", "index >= num_prompt",
     "test_penalties"),
    ("prompt's tokens counted", FILE, "in_output = count & (_PROMPT - 1)", "in_output = count",
     "test_a_token_of_prompt_and_output"),
    ("penalized at every occurrence", FILE, "mask = mask & (count != 0)", "pass", "test_penalties"),
    ("counters left as they are", FILE, "tl.atomic_xchg(counts + row * vocab_size + token, 0,",
     "tl.atomic_add(counts + row * vocab_size + token, 0,", "test_penalties"),
    ("equals passed over", FILE, "| ((logit == last) & (token > last_token))", "", "test_log_probabilities"),
    ("rank behind equals", FILE, "tl.sum((x > mine)", "tl.sum((x >= mine)", "test_log_probabilities"),
    ("scores relative to the last chunk", FILE, "tl.sum(masses * tl.exp2((tops - top) * _LOG2E), 0)",
     "tl.sum(masses, 0)", "test_log_probabilities"),
]  # fmt: skip

NEAR = 1e-5
"""Differences of scores, and of shares of the mass, that rounding may turn around."""

SIGMAS = 3.5
"""Of a chi-square statistic: about its upper 0.001 quantile."""


def columns(n: int, **values: Any) -> Columns:
    given = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0) | values
    types = dict(temperature="f4", top_k="i4", top_p="f4", min_p="f4", seed="u8", position="i8")
    return Columns(**{name: np.broadcast_to(np.array(given[name], types[name]), n).copy() for name in types})


def rows_of(c: Columns, index: Any) -> Columns:
    return Columns(*(getattr(c, name)[index] for name in Columns.__slots__))


def normal(rows: int, vocab_size: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What kernels write to begins as NaN or as a large number. The interpreter computes in NumPy, which warns of what
    float32 is expected to do here."""
    empty = torch.empty

    def filled(*shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return empty(*shape, dtype=dtype, device=device).fill_(torch.nan if dtype.is_floating_point else 1 << 30)

    monkeypatch.setattr(torch, "empty", filled)
    with np.errstate(all="ignore"):
        yield


def check(logits: torch.Tensor, c: Columns) -> list[int]:
    """The picks, compared with the twin's."""
    before = logits.clone()
    got = gpu.pick(logits.to(DEVICE), c)
    assert got.dtype == torch.int64
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    want = twin.pick(logits, c)
    differ = np.flatnonzero((got.cpu() != want).numpy())
    assert len(differ) <= 1 + len(want) // 50, differ
    for i in differ:
        assert close_call(logits[i], rows_of(c, slice(i, i + 1)), int(got[i])), (i, int(got[i]), int(want[i]))
    return got.tolist()


def close_call(logits: torch.Tensor, c: Columns, token: int) -> bool:
    """Whether the token could have been picked, had some sum or score been rounded otherwise."""
    if not 0 <= token < len(logits) or not c.temperature[0]:
        return False
    x = logits.double().numpy()
    below = (x.max() - x) / np.float64(c.temperature[0])
    kept, loose = np.isfinite(below), np.isfinite(below)
    if c.min_p[0] > 0:
        limit = -math.log(c.min_p[0])
        kept &= below <= limit - NEAR
        loose &= below <= limit + NEAR
    if 0 < c.top_k[0] < len(x):
        limit = np.sort(below)[c.top_k[0] - 1]
        kept &= below <= limit
        loose &= below <= limit
    if c.top_p[0] < 1:
        share = np.where(loose, np.exp(-below), 0)
        order = np.argsort(below, kind="stable")
        sums = np.concatenate([[0], np.cumsum(share[order])]) / share.sum()
        likelier = sums[np.searchsorted(below[order], below)]
        kept &= likelier < c.top_p[0] - NEAR
        loose &= likelier < c.top_p[0] + NEAR
    keys = torch.from_numpy(twin.noise_keys(c.seed, c.position))
    score = -below - np.log(twin.exponential_noise(keys, len(x))[0].double().numpy())
    return bool(loose[token] and score[token] >= score[kept | (below == 0)].max() - NEAR)


def mixed(n: int, seed: int = 0) -> Columns:
    """Rows of every kind, next to each other."""
    rng = np.random.default_rng(seed)
    return columns(
        n,
        temperature=rng.choice([0, 0.3, 1, 1.7], n, p=[0.1, 0.3, 0.3, 0.3]),
        top_k=rng.choice([0, 1, 5, 50, 700], n, p=[0.4, 0.1, 0.1, 0.3, 0.1]),
        top_p=rng.choice([1, 0.1, 0.9, 0.999], n, p=[0.3, 0.1, 0.5, 0.1]),
        min_p=rng.choice([0, 0.02, 0.4], n, p=[0.6, 0.3, 0.1]),
        seed=rng.integers(0, 2**64, n, dtype=np.uint64),
        position=rng.integers(0, 10**6, n),
    )


@pytest.mark.parametrize("vocab_size, rows", [(1, 2), (7, 16), (1000, 24), (4096, 6), (5003, 12), (32000, 6)])
def test_equals_the_twin(vocab_size: int, rows: int) -> None:
    check(normal(rows, vocab_size, seed=vocab_size), mixed(rows, seed=vocab_size))


@triton.jit
def draw(keys, out, n, SIZE: tl.constexpr):
    token = tl.arange(0, SIZE)
    key0 = tl.load(keys).to(tl.uint32, bitcast=True)
    key1 = tl.load(keys + 1).to(tl.uint32, bitcast=True)
    tl.store(out + token, _exponential(token, key0, key1), mask=token < n)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
def test_noise(seed: int) -> None:
    """A million draws reach the ends of the range, where logarithms lose their digits."""
    keys = torch.from_numpy(twin.noise_keys(np.array([seed], np.uint64), np.array([77])))
    n = 1 << 20 if seed > 1 else 1000
    out = torch.empty(n, dtype=torch.float32, device=torch.device(DEVICE))
    draw[(1,)](keys.to(DEVICE), out, n, SIZE=triton.next_power_of_2(n))
    torch.testing.assert_close(out.cpu(), twin.exponential_noise(keys, n)[0], rtol=2e-6, atol=0)
    assert out.min() > 0


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.full((5, 5003), -2.0)
    logits[0, [4999, 5000]] = 3.0
    logits[1, [17, 17 + 256, 4096]] = 3.0  # one column of a chunk, and the next chunk
    logits[2, [300, 4095]] = INF
    logits[3, 5002] = torch.nan
    assert gpu.greedy(logits.to(DEVICE)).tolist() == [4999, 17, -1, -1, 0]
    assert gpu.pick(logits.to(DEVICE), columns(5, temperature=0)).tolist() == [4999, 17, -1, -1, 0]
    # In a call with rows of other kinds too.
    assert check(logits, columns(5, temperature=[0, 0, 1, 0, 0.5], top_k=[0, 0, 3, 0, 3]))[:4] == [4999, 17, -1, -1]


@pytest.mark.parametrize("where", [0, 4097, 5002])
def test_rows_without_finite_logits_get_no_token_and_poison_nobody(where: int) -> None:
    logits = normal(15, 5003)
    c = columns(15, temperature=[0, 1, 1, 1, 1] * 3, top_k=[0, 0, 9, 0, 0] * 3, top_p=[1, 1, 0.9, 0.9, 1] * 3)
    c.min_p[4::5] = 0.1
    logits[5:10, where] = torch.nan
    logits[10:13] = -INF
    logits[13:, where] = INF
    tokens = check(logits, c)
    assert min(tokens[:5]) >= 0 and tokens[5:] == [-1] * 10


def test_forbidden_tokens_are_never_picked() -> None:
    n = 30
    logits = torch.full((n, 5003), -INF)
    allowed = [3, 700, 4500]
    logits[:, allowed] = torch.tensor([0.0, 1.0, 0.5])
    c = mixed(n)
    c.top_k[:10] = np.arange(10)  # more than there are
    c.temperature[:] = np.maximum(c.temperature, 0.7)
    c.temperature[5] = 1e30
    assert set(check(logits, c)) == set(allowed)


def test_equal_logits_stay_and_go_together() -> None:
    """Few values, so that every cut falls among equals; and rows in which all are equal."""
    n = 30
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 3, (n, 300), generator=generator).float() * 0.5
    logits[:5] = 1.5
    logits[5:10] = torch.where(logits[5:10] > 0, 0.0, -0.0)
    c = mixed(n)
    c.top_k[::2] = np.arange(n // 2) * 20
    check(logits, c)


def test_neighbours_among_floats() -> None:
    """The search for a top-k threshold ends between logits that differ in their last bit, wherever they lie."""
    n = 12
    steps = torch.arange(600, dtype=torch.int32)
    logits = torch.empty(n, 600, dtype=torch.float32, device=torch.device("cpu"))
    for i, base in enumerate([1.0, 1e-30, 3e38, 64.0] * (n // 4)):
        start = torch.tensor([base]).view(torch.int32)
        logits[i] = (start - steps).view(torch.float32)[torch.randperm(600)]
    # Every token that is left is nearly equally likely.
    temperatures = [1, 1, 1e38, 1] * (n // 4)
    check(logits, columns(n, temperature=temperatures, top_k=np.arange(n) * 23 + 1, seed=5, position=np.arange(n)))
    # Three equals, and a neighbour of theirs.
    logits = torch.zeros(n, 600)
    logits[:, 1:] = -(torch.tensor([1.0]).view(torch.int32) + steps[1:] // 3).view(torch.float32)
    check(logits, columns(n, top_k=np.arange(n) * 23 + 3, seed=5, position=np.arange(n)))


@pytest.mark.parametrize("scale, top_k, top_p", [(0.01, [0, 900, 9000], [0.5, 1, 0.9]), (2.0, [0, 33_000], [0.99, 1])])
def test_lists_that_overflow(scale: float, top_k: list[int], top_p: list[float]) -> None:
    """Flat rows, and top-k in the thousands, are searched as they are: too many groups, or too many tokens."""
    c = columns(len(top_k) + 1, temperature=1, top_k=[*top_k, 0], top_p=[*top_p, 1], seed=9)
    c.min_p[-1] = 0.2
    check(normal(len(top_k) + 1, 33_500, scale), c)


def test_likely_tokens_in_one_place() -> None:
    """Groups of likely tokens only: the bound from the groups lets sixteen times k in. Chunks' own tops differ."""
    logits = normal(9, 9000)
    logits[:, 4096:8192] += 40
    top_k, top_p = [1, 100, 400, 0, 0, 0, 0, 0, 0], [1, 1, 0.95, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99]
    check(logits, columns(9, top_k=top_k, top_p=top_p, position=np.arange(9)))


def test_the_last_token() -> None:
    for vocab_size in (255, 257, 4095, 4097):
        logits = torch.zeros(4, vocab_size)
        logits[:, -1] = 50
        c = columns(4, temperature=[0, 1, 1, 1], top_k=[0, 0, 2, 0], top_p=[1, 1, 1, 0.5])
        assert check(logits, c) == [vocab_size - 1] * 4


def test_extreme_settings() -> None:
    temperatures = [1e-45, 1e-38, 1e-6, 1e30, 3e38, 1.0, 1.0, 1.0, 1.0, 1.0]
    c = columns(25, temperature=temperatures[:5] * 4 + temperatures[5:], position=np.arange(25), seed=2**64 - 1)
    c.top_p[20:] = [1e-45, 1e-6, 1 - 2**-24, 0.5, 0.5]
    c.top_p[5:10], c.top_k[10:15], c.min_p[15:20] = 0.9, 4, 0.3
    c.min_p[23:] = [1.0, 1e-45]
    logits = normal(25, 500)
    logits[:, :20] *= 1e3
    tokens = check(logits, c)
    likeliest = logits.argmax(-1).tolist()
    assert tokens[0:2] == likeliest[0:2] and tokens[23] == likeliest[23]


@given(
    levels=st.lists(st.sampled_from([-INF, -200.0, -3.0, -1.0, -0.0, 0.0, 0.5, 2.0, 40.0]), min_size=1, max_size=60),
    repeat=st.sampled_from([1, 9]),
    temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 5.0]),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.0078125, 1, width=32),
    min_p=st.floats(0, 1, width=32),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=15, deadline=None)
def test_any_settings(levels: list[float], repeat: int, seed: int, **values: float) -> None:
    """Every mixture of the cuts, for the same logits."""
    logits = torch.tensor(levels).repeat(5, repeat)
    c = columns(5, **values, seed=seed, position=np.arange(5))
    c.top_k[[1, 3]], c.top_p[[2, 3]], c.min_p[[3, 4]] = 0, 1, 0
    with np.errstate(all="ignore"):
        check(logits, c)


def test_picks_follow_the_distribution() -> None:
    """The twin's noise does, and most rows equal the twin's; here is the proof without it."""
    n, logits = 200, torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5])
    c = columns(n, temperature=0.8, seed=2**63 + 1, position=np.arange(n))
    tokens = gpu.pick(logits.expand(n, -1).to(DEVICE), c).cpu()
    wanted = torch.softmax(logits.double() / 0.8, 0).numpy() * n
    statistic = ((np.bincount(tokens, minlength=6) - wanted) ** 2 / wanted).sum()
    assert abs(statistic - 5) / math.sqrt(10) < SIGMAS


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    n = 12
    logits, c = normal(n, 5003).to(DEVICE), mixed(n, seed=3)
    together = gpu.pick(logits, c)
    order = np.random.default_rng(0).permutation(n)
    assert gpu.pick(logits[order], rows_of(c, order)).tolist() == together[order].tolist()
    for i in range(0, n, 2):
        one = slice(i, i + 1)
        assert gpu.pick(logits[one], rows_of(c, one)).item() == together[i]
    scores = gpu.log_probabilities(logits, together, 5)
    for i in (0, n - 1):
        one = slice(i, i + 1)
        for mine, ours in zip(gpu.log_probabilities(logits[one], together[one], 5), scores, strict=True):
            assert torch.equal(mine[0], ours[i])


def test_rows_apart() -> None:
    """What lies between them is NaN, or likelier than anything."""
    logits, c = normal(8, 1003), mixed(8, seed=4)
    c.temperature[6:], c.top_p[6:], c.top_k[6:], c.min_p[6:] = 1, 1, 0, 0
    wide = apart(logits.to(DEVICE))
    tokens = gpu.pick(logits.to(DEVICE), c).tolist()
    assert gpu.pick(wide, c).tolist() == tokens
    assert gpu.pick(torch.full((8, 1010), 99.0, device=DEVICE)[:, :1003].copy_(logits), c).tolist() == tokens
    assert gpu.greedy(wide).tolist() == twin.greedy(logits).tolist()
    for got, want in zip(gpu.log_probabilities(wide, gpu.greedy(wide), 3), gpu.log_probabilities(
        logits.to(DEVICE), gpu.greedy(wide), 3), strict=True):  # fmt: skip
        assert torch.equal(got, want)


def test_without_rows() -> None:
    empty = torch.zeros(0, 50, device=DEVICE)
    assert gpu.pick(empty, columns(0)).shape == gpu.greedy(empty).shape == (0,)
    ids, values, ranks = gpu.log_probabilities(empty, torch.zeros(0, dtype=torch.int64, device=DEVICE), 3)
    assert ids.shape == values.shape == (0, 4) and ranks.shape == (0,)


def test_entries_add_up_and_forbid() -> None:
    n, rng = 700, np.random.default_rng(0)
    flat = rng.permutation(9 * 1003)[:n]
    entries = Entries(flat // 1003, flat % 1003, rng.normal(0, 5, n).astype(np.float32))
    entries.values[::9] = -INF
    twice = Entries(*(np.concatenate([getattr(entries, name)] * 2) for name in ("rows", "tokens", "values")))
    for these in (entries, twice, Entries(*(getattr(entries, name)[:0] for name in ("rows", "tokens", "values")))):
        logits = normal(9, 1003)
        got = apart(logits.to(DEVICE))
        gpu.add_entries(got, these)
        twin.add_entries(logits, these)
        torch.testing.assert_close(got.cpu(), logits)


def penalties(rows: list[int], vocab_size: int, width: int, dtype: torch.dtype = torch.int32) -> Penalties:
    rng, n = np.random.default_rng(2), len(rows)
    known = np.minimum(rng.integers(2, 2 * width, n), width)
    tokens = rng.integers(0, vocab_size, (n, width))
    tokens[rng.random(tokens.shape) < 0.5] = vocab_size - 1
    # Nothing may look at what lies past the known tokens.
    tokens[np.arange(width) >= known[:, None]] = 10**9
    there = torch.full((n, width + 5), 10**9, dtype=dtype, device=DEVICE)[:, 2 : width + 2]
    there.copy_(torch.from_numpy(tokens))
    amounts = [rng.choice(values, n).astype(np.float32) for values in ([1, 1.3, 0.8], [0, 0.5, -0.5], [0, 0.25, -1])]
    return Penalties(np.array(rows), there, rng.integers(1, known), known, *amounts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("counters", [1, 130, 1 << 24])
def test_penalties(counters: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PENALTY_COUNTS", counters)
    for width in (30, 300):
        given = penalties([0, 2, 3, 5, 6], 50, width, dtype)
        logits = normal(7, 50)
        logits[3, ::3] = -INF
        got = apart(logits.to(DEVICE))
        gpu.penalize(got, given)
        here = Penalties(given.rows, given.tokens.cpu(), *(getattr(given, name) for name in Penalties.__slots__[2:]))
        twin.penalize(logits, here)
        torch.testing.assert_close(got.cpu(), logits)


def test_a_token_of_prompt_and_output() -> None:
    """The prompt's occurrence counts for the repetition penalty only."""
    amounts = (np.array([x], np.float32) for x in (2, 0.5, 0.25))
    tokens = torch.tensor([[1, 1, 2, 1, 3, 1]], device=DEVICE)
    logits = torch.tensor([[1.0, 4.0, -4.0, 4.0]], device=DEVICE)
    gpu.penalize(logits, Penalties(np.array([0]), tokens, np.array([3]), np.array([6]), *amounts))
    assert logits.tolist() == [[1.0, 2 - 0.5 - 0.5, -8.0, 2 - 0.5 - 0.25]]


def test_sample_does_everything_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public function, and with one transfer."""
    logits, c = normal(9, 1003), mixed(9, seed=5)
    given = penalties([1, 4, 8], 1003, 40)
    entries = Entries(np.array([1, 1, 4, 7]), np.array([1002, 5, 1002, 0]), np.array([30, 2, -INF, 50], np.float32))
    there, uploads, upload = logits.to(DEVICE), [], gpu._upload
    monkeypatch.setattr(gpu, "_upload", lambda *given: uploads.append(given) or upload(*given))
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    got = twin.sample(there, c, entries, given)
    assert len(uploads) == 1
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: False)
    here = Penalties(given.rows, given.tokens.cpu(), *(getattr(given, name) for name in Penalties.__slots__[2:]))
    want = twin.sample(logits, c, entries, here)
    torch.testing.assert_close(there.cpu(), logits)
    assert got.tolist() == want.tolist()


def test_every_public_function_has_its_form_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    calls = dict(sample=(0, 0, 0, 0), add_entries=(0, 0), penalize=(0, 0), greedy=(0,), pick=(0, 0))
    for name, arguments in (calls | dict(log_probabilities=(0, 0, 0))).items():
        monkeypatch.setattr(gpu, name, lambda *given, name=name: name)
        assert getattr(twin, name)(*arguments) == name


@pytest.mark.parametrize(
    "vocab_size, k", [(7, 7), (1000, 1), (5003, 20), (9000, 0), (300, 64), (300, 65), (1000, 128), (900, 256)]
)
def test_log_probabilities(vocab_size: int, k: int) -> None:
    logits = normal(5, vocab_size)
    logits[1, : vocab_size // 2] = -INF
    logits[2] = logits[2].round()  # equals: the lowest token first
    tokens = torch.tensor([vocab_size - 1, vocab_size - 1, 3, -1, int(logits[4].argmax())])
    ids, values, ranks = (part.cpu() for part in gpu.log_probabilities(logits.to(DEVICE), tokens.to(DEVICE), k))
    assert ids.dtype == ranks.dtype == torch.int64 and values.dtype == torch.float32
    exact = logits.double().log_softmax(-1)
    order = exact.sort(descending=True, stable=True).indices[:, :k]
    assert torch.equal(ids[:, 0], tokens)
    torch.testing.assert_close(values[:, 1:], exact.gather(1, order).float())
    if k <= gpu.LARGEST_SCORED_K:
        assert torch.equal(ids[:, 1:], order)
    mine = exact.gather(1, tokens.clamp(min=0)[:, None])
    torch.testing.assert_close(values[:, :1], mine.float())
    assert ranks.tolist() == (1 + (exact > mine).sum(-1)).tolist() and ranks[4] == 1


def test_log_probabilities_of_rows_without_finite_logits() -> None:
    logits = normal(3, 5003)
    logits[0, 4500], logits[1] = torch.nan, -INF
    tokens = torch.tensor([-1, -1, 0])
    ids, values, _ = (part.cpu() for part in gpu.log_probabilities(logits.to(DEVICE), tokens.to(DEVICE), 4))
    assert values[:2].isnan().all() and ids.min() >= -1 and ids.max() < 5003
    torch.testing.assert_close(values[2], twin.log_probabilities(logits, tokens, 4)[1][2])
