"""Sampling against its definition: plain loops over one row, and statistics of the noise."""

import numpy as np
import pytest
import torch

from quire.kernels import sampling
from quire.kernels.sampling import (
    Columns,
    Entries,
    Penalties,
    add_entries,
    exponential_noise,
    greedy,
    log_probabilities,
    noise_keys,
    penalize,
    pick,
    sample,
)

# Upper 0.001 quantile of chi-square: mean + 3.09 standard deviations, a little more for its skew.
SIGMAS = 3.5


def columns(n: int, **values) -> Columns:
    given = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0) | values
    types = dict(temperature="f4", top_k="i4", top_p="f4", min_p="f4", seed="u8", position="i8")
    return Columns(**{name: np.broadcast_to(np.array(given[name], types[name]), n).copy() for name in types})


def rows_of(c: Columns, index) -> Columns:
    return Columns(*(getattr(c, name)[index] for name in Columns.__slots__))


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """In standard deviations from its mean."""
    expected = probabilities * counts.sum()
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


def noise(seeds, positions, vocab_size: int) -> np.ndarray:
    keys = torch.from_numpy(noise_keys(np.asarray(seeds, np.uint64), np.asarray(positions, np.int64)))
    return exponential_noise(keys, vocab_size).numpy()


def support(logits: torch.Tensor, **settings) -> list[int]:
    """The tokens that a row of logits gives at some of many positions."""
    n = 4000
    settings = dict(position=np.arange(n), seed=3) | settings
    return sorted(set(pick(logits.expand(n, -1), columns(n, **settings)).tolist()))


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0], [-1.0, -3.0, -2.0]])
    assert greedy(logits).tolist() == [1, 0, 0]
    assert pick(logits, columns(3, temperature=0)).tolist() == [1, 0, 0]


def test_rows_without_finite_logits_get_no_token_and_poison_nobody():
    inf, nan = np.inf, np.nan
    logits = torch.tensor([[1.0, 5, 2, 0], [1, nan, 2, 9], [-inf] * 4, [1, inf, 0, 0], [-inf, -inf, 4, -inf]])
    assert greedy(logits).tolist() == [1, -1, -1, -1, 2]
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}, {"min_p": 0.1}):
        tokens = pick(logits, columns(5, **settings, position=np.arange(5)))
        alone = pick(logits[:1], columns(1, **settings)).item()
        assert tokens.tolist() == [alone, -1, -1, -1, 2]


def test_noise_is_one_function_of_seed_position_and_index():
    """Written out for one element in plain integers: what another implementation must compute."""

    def mix(x, joined=0):
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= joined
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    seed, position, vocab_size = 0xFEDCBA9876543210, 77, 1000
    low, high = seed & 0xFFFFFFFF, seed >> 32
    first = mix(mix(mix(low) ^ high) ^ position)
    second = mix((mix((mix(high ^ 0x9E3779B9) + low) & 0xFFFFFFFF) + position) & 0xFFFFFFFF)
    draws = noise([seed], [position], vocab_size)[0]
    for index in (0, 1, 499, 999):
        word = mix((index * 0x9E3779B9 + first) & 0xFFFFFFFF, second) & 0x7FFFFFFF
        assert draws[index] == pytest.approx(-np.log1p(-(word + 0.5) / 2**31), rel=1e-5)


def test_noise_is_exponential():
    draws = noise(np.arange(64), np.arange(64), 1 << 14)
    assert (draws > 0).all() and np.isfinite(draws).all()
    uniform = 1 - np.exp(-draws.astype(np.float64))
    counts = np.histogram(uniform, bins=1024, range=(0, 1))[0]
    assert abs(chi_square(counts, np.full(1024, 1 / 1024))) < SIGMAS
    # The smallest draws win the pick: look at the first thousandth again.
    small = uniform[uniform < 1 / 1024] * 1024
    assert abs(chi_square(np.histogram(small, bins=64, range=(0, 1))[0], np.full(64, 1 / 64))) < SIGMAS


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [
        (np.zeros(256), np.arange(256)),
        (np.arange(256), np.zeros(256)),
        (np.arange(256) << 32, np.zeros(256)),
        (np.arange(256), 255 - np.arange(256)),
        (np.arange(256) ^ (np.arange(256) << 32), np.full(256, 5)),
    ],
    ids=["positions", "seeds", "high seeds", "opposite", "both words"],
)
def test_noise_of_neighbouring_rows_is_independent(seeds, positions):
    uniform = 1 - np.exp(-noise(seeds.astype(np.uint64), positions, 4096).astype(np.float64))
    bins = (uniform * 16).astype(int)
    for a, b in ((bins[:-1], bins[1:]), (bins[:, :-1], bins[:, 1:])):
        pairs = np.bincount((a * 16 + b).ravel(), minlength=256)
        assert abs(chi_square(pairs, np.full(256, 1 / 256))) < SIGMAS
    correlation = np.corrcoef(uniform)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 6 / np.sqrt(4096)


def test_every_bit_of_seed_and_position_changes_the_noise():
    seeds = np.array([0] + [1 << i for i in range(64)] + [0] * 20, np.uint64)
    positions = np.array([0] * 65 + [1 << i for i in range(20)], np.int64)
    assert len(np.unique(noise_keys(seeds, positions), axis=0)) == len(seeds)
    tokens = noise(seeds, positions, 1 << 16).argmin(axis=1)
    assert len(set(tokens)) > len(seeds) - 3


def test_picks_follow_the_distribution():
    n, logits = 40_000, torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5])
    for temperature in (0.5, 1.0, 3.0):
        tokens = pick(logits.expand(n, -1), columns(n, temperature=temperature, seed=1, position=np.arange(n)))
        wanted = torch.softmax(logits / temperature, 0).double().numpy()
        assert abs(chi_square(np.bincount(tokens, minlength=6), wanted / wanted.sum())) < SIGMAS


def test_tiny_temperatures_are_greedy_and_great_ones_uniform():
    logits = torch.tensor([[1.0, 1.001, -3.0]])
    for temperature in (1e-6, 1e-38, 1e-45):
        assert pick(logits, columns(1, temperature=temperature)).item() == 1
    assert support(logits, temperature=1e30) == [0, 1, 2]


def test_top_k_keeps_k_and_whatever_equals_the_last():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, 1.0])
    assert support(logits, top_k=1) == [1]
    assert support(logits, top_k=2) == [1, 3]
    assert support(logits, top_k=3) == [1, 2, 3, 4]
    assert support(logits, top_k=99) == support(logits, top_k=0) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_smallest_set_that_reaches_its_share():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert support(logits, top_p=0.3) == [0]
    assert support(logits, top_p=0.5) == [0, 2]
    assert support(logits, top_p=0.75) == [0, 2, 3]
    assert support(logits, top_p=0.95) == [0, 1, 2, 3]
    assert support(logits, top_p=1e-6) == [0]


def test_top_p_takes_shares_of_what_top_k_and_min_p_left():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    # Of 0.4 and 0.3, the first has 0.57.
    assert support(logits, top_k=2, top_p=0.55) == [0]
    assert support(logits, top_k=2, top_p=0.6) == [0, 2]
    assert support(logits, min_p=0.6, top_p=0.55) == [0]
    assert support(logits, min_p=0.6) == [0, 2]
    assert support(logits, min_p=1.0) == [0]


def test_top_p_looks_further_where_the_likeliest_do_not_reach_its_share(monkeypatch):
    monkeypatch.setattr(sampling, "PARTIAL_SORTS", (4, 16))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 64, generator=generator) * torch.logspace(-1, 1, 32)[:, None]
    short = pick(logits, columns(32, top_p=0.8, position=np.arange(32)))
    monkeypatch.setattr(sampling, "PARTIAL_SORTS", ())
    assert short.tolist() == pick(logits, columns(32, top_p=0.8, position=np.arange(32))).tolist()


def test_top_p_sorts_a_whole_row_only_where_it_must(monkeypatch):
    rows = []
    sort = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda x, **how: rows.append(len(x)) or sort(x, **how))
    logits = torch.zeros(3, 20_000)
    logits[1, :5] = 20.0
    settings = columns(3, top_p=[0.5, 0.9, 0.99], position=np.arange(3))
    whole = pick(logits, settings)
    assert rows == [1]  # 0.99 of 20 000 equals are more than 16 384, and 0.5 of them are not
    monkeypatch.setattr(sampling, "PARTIAL_SORTS", ())
    assert pick(logits, settings).tolist() == whole.tolist()


def test_cuts_equal_a_plain_loop():
    """Against the definitions, written out in float64, over random settings."""
    rng = np.random.default_rng(0)
    n, vocab_size = 300, 50
    logits = torch.from_numpy(rng.normal(0, 2, (n, vocab_size)).astype(np.float32))
    settings = columns(
        n,
        temperature=rng.choice([0.5, 1, 2], n),
        top_k=rng.choice([0, 1, 5, 30, 50, 80], n),
        top_p=rng.choice([0.1, 0.5, 0.9, 1.0], n),
        min_p=rng.choice([0, 0.05, 0.3], n),
        seed=rng.integers(0, 2**63, n),
        position=rng.integers(0, 1000, n),
    )
    draws = noise(settings.seed, settings.position, vocab_size)
    tokens = pick(logits, settings).tolist()
    for i in range(n):
        x = logits[i].double().numpy() / settings.temperature[i]
        x = np.where(np.exp(x - x.max()) < settings.min_p[i], -np.inf, x)
        order = np.argsort(-x)
        if settings.top_k[i]:
            x[order[settings.top_k[i] :]] = -np.inf
        share = np.exp(x[order] - x.max())
        before = np.cumsum(share / share.sum()) - share / share.sum()
        x[order[before >= settings.top_p[i]]] = -np.inf
        assert tokens[i] == np.argmax(x - np.log(draws[i])), i


def test_a_row_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(1)
    n, vocab_size = 64, 3000
    logits = torch.from_numpy(rng.normal(0, 3, (n, vocab_size)).astype(np.float32))
    settings = columns(
        n,
        temperature=rng.choice([0, 0.7, 1.5], n),
        top_k=rng.choice([0, 0, 7, 2000], n),
        top_p=rng.choice([0.5, 0.999, 1.0], n),
        min_p=rng.choice([0, 0.01], n),
        seed=rng.integers(0, 2**63, n),
        position=np.arange(n),
    )
    together = pick(logits, settings)
    order = rng.permutation(n)
    assert pick(logits[order], rows_of(settings, order)).tolist() == together[order].tolist()
    scores = log_probabilities(logits, together, 5)
    for i in range(n):
        one = slice(i, i + 1)
        assert pick(logits[one], rows_of(settings, one)).item() == together[i]
        for mine, ours in zip(log_probabilities(logits[one], together[one], 5), scores, strict=True):
            assert torch.equal(mine[0], ours[i])


def test_chunks_do_not_show(monkeypatch):
    logits = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    settings = columns(20, temperature=np.arange(20) % 3, top_k=5, position=np.arange(20))
    whole = pick(logits, settings).tolist()
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 250)
    assert pick(logits, settings).tolist() == whole


def test_pick_leaves_the_logits():
    logits = torch.randn(4, 9)
    before = logits.clone()
    pick(logits, columns(4, top_k=2, top_p=0.5, min_p=0.1))
    assert torch.equal(logits, before)


def test_entries_add_up_and_forbid():
    logits = torch.zeros(2, 4)
    inf = np.float32(np.inf)
    add_entries(logits, Entries(np.array([0, 0, 1, 1]), np.array([1, 1, 2, 2]), np.array([1, 2, 9, -inf], np.float32)))
    assert logits.tolist() == [[0, 3, 0, 0], [0, 0, -inf, 0]]


def test_penalties_equal_a_plain_loop(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 60)
    rng = np.random.default_rng(2)
    n, vocab_size, width = 7, 20, 30
    logits = torch.from_numpy(rng.normal(0, 2, (n, vocab_size)).astype(np.float32))
    known = rng.integers(2, width + 1, 5)
    penalties = Penalties(
        rows=np.array([0, 2, 3, 5, 6]),
        tokens=torch.from_numpy(rng.integers(0, vocab_size, (5, width)).astype(np.int32)),
        num_prompt=np.array([1, 2, 1, 2, 1]),
        num_known=known,
        repetition=np.array([1.3, 1, 0.8, 1, 2], np.float32),
        presence=np.array([0, 0.5, -0.5, 0, 1], np.float32),
        frequency=np.array([0, 0, 0.25, 0.1, -1], np.float32),
    )
    penalties.tokens[2, known[2] :] = 10**6  # what lies past the known tokens is never looked at
    wanted = logits.clone()
    for j, row in enumerate(penalties.rows):
        tokens = penalties.tokens[j, : known[j]].tolist()
        output = tokens[penalties.num_prompt[j] :]
        for token in set(tokens):
            value = wanted[row, token]
            wanted[row, token] = value / penalties.repetition[j] if value > 0 else value * penalties.repetition[j]
        for token in set(output):
            wanted[row, token] -= penalties.frequency[j] * output.count(token) + penalties.presence[j]
    penalize(logits, penalties)
    torch.testing.assert_close(logits, wanted)


def test_bias_is_penalized_and_a_forbidden_token_stays_so():
    logits = torch.tensor([[1.0, 0.0, 0.0]])
    entries = Entries(np.array([0, 0]), np.array([1, 2]), np.array([4, -np.inf], np.float32))
    penalties = Penalties(
        np.array([0]), torch.tensor([[1, 2]]), np.array([1]), np.array([2]), *np.array([[2], [0], [-9]], np.float32)
    )
    assert sample(logits, columns(1, temperature=0), entries, penalties).item() == 1
    assert logits.tolist() == [[1, 2, -np.inf]]


@pytest.mark.parametrize(("vocab_size", "k"), [(1000, 128), (5003, 256), (256, 256)])
def test_as_many_log_probabilities_as_beams_ask_for(vocab_size, k):
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(k))
    logits[1, k // 2 :] = -torch.inf
    logits[2] = (2 * logits[2]).round()  # equals: the lowest token first
    tokens = logits.argmax(dim=-1)
    tokens[3] = vocab_size - 1
    ids, values, ranks = log_probabilities(logits, tokens, k)
    exact = logits.double().log_softmax(-1)
    order = exact.sort(descending=True, stable=True).indices[:, :k]
    assert torch.equal(ids, torch.cat([tokens[:, None], order], dim=1))
    torch.testing.assert_close(values, exact.gather(1, ids).float())
    assert ranks.tolist() == (1 + (exact > exact.gather(1, tokens[:, None])).sum(-1)).tolist()


def test_log_probabilities_and_ranks():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.4, 0.4, 0.1, 0.1]]).log()
    ids, values, ranks = log_probabilities(logits, torch.tensor([3, 1]), 2)
    assert ids[0].tolist() == [3, 1, 2] and set(ids[1].tolist()) == {0, 1} and ids[1, 0] == 1
    torch.testing.assert_close(values.exp(), torch.tensor([[0.2, 0.4, 0.3], [0.4, 0.4, 0.4]]))
    # Equals share the better rank: greedy is always rank 1.
    assert ranks.tolist() == [3, 1]
    ids, values, ranks = log_probabilities(logits, torch.tensor([0, -1]), 0)
    assert ids.tolist() == [[0], [-1]] and values.shape == (2, 1) and ranks[0] == 4
