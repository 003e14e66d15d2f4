"""From logits to tokens, in plain torch: the twin of gpu/sampling.py, written for reading, and the form for any device.

Order: bias, forbidden tokens, penalties; then temperature, min-p, top-k, top-p and the pick. Rows are independent:
what a row gets depends on its own logits, settings, seed and position, never on its neighbours. Random numbers are a
hash of (seed, position, vocabulary index), so there is no generator state to carry, lose or restore.

Cuts keep or drop equal logits together, so no order among equals can leak in. The pick takes the lowest index among
equals. A row whose largest logit is not a finite number gets the token -1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from quire.kernels import dispatch

CHUNK_ELEMENTS = 1 << 20
"""Logits handled at once by the steps that need scratch tensors: bounds memory on a GPU, stays in cache on a CPU."""

PARTIAL_SORTS = (1024, 16384)
"""Likeliest tokens that top-p looks at before it sorts a whole row."""

GOLDEN = 0x9E3779B9
"""2^32 divided by the golden ratio: spreads consecutive vocabulary indices over the 32-bit range."""

MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B
"""Multipliers of lowbias32, the 32-bit hash of Chris Wellons."""

LARGEST_UNIFORM = 1.0 - 2.0**-24
"""The largest float32 below 1."""


@dataclass(frozen=True, slots=True)
class Columns:
    """How each of S rows picks; arrays on the host."""

    temperature: np.ndarray
    """[S] float32; 0: greedy, and the rest of the row's columns is not looked at."""
    top_k: np.ndarray
    """[S] int32; 0: off."""
    top_p: np.ndarray
    """[S] float32; 1: off."""
    min_p: np.ndarray
    """[S] float32; 0: off."""
    seed: np.ndarray
    """[S] uint64."""
    position: np.ndarray
    """[S] int64: index, in its sequence, of the token to be picked."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Single logits, by row and token; arrays on the host."""

    rows: np.ndarray
    """[n] int64."""
    tokens: np.ndarray
    """[n] int64."""
    values: np.ndarray
    """[n] float32: added to the logit; -inf forbids the token."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """Rows with a penalty, and the tokens that earn it; arrays on the host but for `tokens`."""

    rows: np.ndarray
    """[P] int64: index among the rows of the logits."""
    tokens: torch.Tensor
    """[P, L] integers on the logits' device: prompt, output, then anything."""
    num_prompt: np.ndarray
    """[P] int64."""
    num_known: np.ndarray
    """[P] int64: prompt and output."""
    repetition: np.ndarray
    """[P] float32: divides positive and multiplies negative logits of tokens in prompt or output."""
    presence: np.ndarray
    """[P] float32: subtracted once for tokens in the output."""
    frequency: np.ndarray
    """[P] float32: subtracted per occurrence in the output."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the Triton form reads of columns, entries and penalties, where it reads it."""

    settings: torch.Tensor
    """Flat int32, as the other two."""
    kinds: np.ndarray
    """[S] int32, on the host."""
    entries: torch.Tensor | None
    penalties: torch.Tensor | None


def prepare_sampling(
    columns: Columns,
    entries: Entries | None,
    penalties: Penalties | None,
    vocab_size: int,
    place: Callable[[np.ndarray], torch.Tensor],
    like: torch.Tensor,
) -> Prepared | None:
    """Ahead of the logits, so that it travels with a step's other inputs: `place` takes an array of int32 along and
    says where it will be: flat, at a multiple of 16 bytes. `like` lies where the logits will. None: there is nothing to
    prepare. The tokens of `penalties` are not looked at."""
    if not dispatch.on_gpu(like):
        return None
    from quire.kernels.gpu import sampling as gpu

    return gpu.prepare(columns, entries, penalties, vocab_size, place)


def sample(
    logits: torch.Tensor,
    columns: Columns,
    entries: Entries | None = None,
    penalties: Penalties | None = None,
    prepared: Prepared | None = None,
) -> torch.Tensor:
    """[S, V] float32 to [S] int64. `logits` is left adjusted: what log-probabilities are taken from. `prepared` is
    made from the same columns, entries and penalties; None: where it is needed it is made now."""
    if dispatch.on_gpu(logits):
        from quire.kernels.gpu import sampling as gpu

        return gpu.sample(logits, columns, entries, penalties, prepared)
    if entries is not None:
        add_entries(logits, entries)
    if penalties is not None:
        penalize(logits, penalties)
    return pick(logits, columns)


def add_entries(logits: torch.Tensor, entries: Entries) -> None:
    """In place, [S, V] float32."""
    if dispatch.on_gpu(logits):
        from quire.kernels.gpu import sampling as gpu

        return gpu.add_entries(logits, entries)
    where = (_upload(entries.rows, logits), _upload(entries.tokens, logits))
    logits.index_put_(where, _upload(entries.values, logits), accumulate=True)


def penalize(logits: torch.Tensor, penalties: Penalties) -> None:
    """In place, [S, V] float32; reads nothing past a row's known tokens."""
    if dispatch.on_gpu(logits):
        from quire.kernels.gpu import sampling as gpu

        return gpu.penalize(logits, penalties)
    vocab_size = logits.shape[1]
    for part in _chunks(len(penalties.rows), vocab_size):
        rows = _upload(penalties.rows[part], logits)
        tokens = penalties.tokens[part]
        num_prompt = _upload(penalties.num_prompt[part], logits)[:, None]
        num_known = _upload(penalties.num_known[part], logits)[:, None]
        index = torch.arange(tokens.shape[1], device=logits.device)
        known = index < num_known
        in_output = count_tokens(tokens, known & (index >= num_prompt), vocab_size)
        seen = count_tokens(tokens, known, vocab_size) > 0

        x = logits[rows]
        repetition = _upload(penalties.repetition[part], logits)[:, None]
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x -= _upload(penalties.frequency[part], logits)[:, None] * in_output
        x -= _upload(penalties.presence[part], logits)[:, None] * (in_output > 0)
        logits[rows] = x


def count_tokens(tokens: torch.Tensor, counted: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[P, L] token ids and which of them count, to occurrences [P, V] int32."""
    # What does not count goes to a column of its own, whatever the id there says.
    index = tokens.long().masked_fill(~counted, vocab_size)
    counts = torch.zeros(len(tokens), vocab_size + 1, dtype=torch.int32, device=tokens.device)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))
    return counts[:, :vocab_size]


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """[S, V] float32 to [S] int64: the likeliest tokens."""
    if dispatch.on_gpu(logits):
        from quire.kernels.gpu import sampling as gpu

        return gpu.greedy(logits)
    tokens, top = _likeliest(logits)
    return tokens.masked_fill(~top.isfinite(), -1)


def pick(logits: torch.Tensor, columns: Columns) -> torch.Tensor:
    """[S, V] float32 to [S] int64; leaves `logits` as they are."""
    if dispatch.on_gpu(logits):
        from quire.kernels.gpu import sampling as gpu

        return gpu.pick(logits, columns)
    tokens, top = _likeliest(logits)
    random = np.flatnonzero(columns.temperature > 0)
    keys = noise_keys(columns.seed[random], columns.position[random])
    for part in _chunks(len(random), logits.shape[1]):
        chosen = random[part]
        rows = _upload(chosen, logits)
        # Relative to the top, so that no temperature, however small, overflows.
        x = (logits[rows] - top[rows, None]) / _upload(columns.temperature[chosen], logits)[:, None]
        _cut(x, columns.top_k[chosen], columns.top_p[chosen], columns.min_p[chosen])
        x -= exponential_noise(_upload(keys[part], logits), logits.shape[1]).log_()
        tokens[rows] = x.argmax(dim=-1)
    return tokens.masked_fill_(~top.isfinite(), -1)


def log_probabilities(
    logits: torch.Tensor, tokens: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the sampled tokens [A] int64 and the k likeliest, from logits [A, V] float32.

    Returns ids [A, 1 + k] and values [A, 1 + k], the sampled token first, and the sampled token's rank [A].
    """
    if dispatch.on_gpu(logits):
        from quire.kernels.gpu import sampling as gpu

        return gpu.log_probabilities(logits, tokens, k)
    return log_probabilities_by_sorting(logits, tokens, k)


def log_probabilities_by_sorting(
    logits: torch.Tensor, tokens: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    everything = logits.log_softmax(dim=-1)
    sampled = everything.gather(1, tokens.clamp(min=0)[:, None])
    best = _largest(everything, k)
    ids = torch.cat([tokens[:, None], best], dim=1)
    values = torch.cat([sampled, everything.gather(1, best)], dim=1)
    return ids, values, 1 + (everything > sampled).sum(dim=-1)


def _largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """[A, V] float32 to the indices [A, k] of each row's k largest, the lowest index first among equals: which of them
    topk finds depends on k, and k is what the greediest row asks for."""
    vocab_size = x.shape[1]
    found = x.topk(min(k + 1, vocab_size), dim=-1)
    best = found.indices[:, :k]
    tied = (found.values[:, 1:] == found.values[:, :-1]).any(dim=-1).nonzero()[:, 0]
    if len(tied):
        pattern = x[tied].view(torch.int32)
        # As integers these are ordered like the numbers; an index below makes each of them unique.
        ordered = (pattern ^ ((pattern >> 31) & 0x7FFFFFFF)).long() << 32
        index = torch.arange(vocab_size - 1, -1, -1, device=x.device)
        best[tied] = (ordered | index).topk(k, dim=-1).indices
    return best


def noise_keys(seed: np.ndarray, position: np.ndarray) -> np.ndarray:
    """[n] uint64 and [n] integers to [n, 2] int32: the two keys of a row's noise.

    Both keys depend on every bit of seed and position, through chains of their own: 64 bits of state.
    """
    low, high = seed.astype(np.uint32), (seed >> np.uint64(32)).astype(np.uint32)
    at = position.astype(np.uint32)
    first = _mix_words(_mix_words(_mix_words(low) ^ high) ^ at)
    second = _mix_words(_mix_words(_mix_words(high ^ np.uint32(GOLDEN)) + low) + at)
    return np.stack([first, second], axis=1).view(np.int32)


def exponential_noise(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Keys [n, 2] int32 to [n, V] float32: independent draws of the exponential distribution, all above 0.

    h is lowbias32 of index * GOLDEN + key0 with key1 joined in between; u = (h's low 31 bits + 0.5) / 2^31; the draw is
    -log(1 - u). 32-bit operations only, so a kernel can compute the same. The smallest draws decide who wins the pick,
    and near u = 0 a float32 has its finest steps.
    """
    index = torch.arange(vocab_size, dtype=torch.int32, device=keys.device) * _signed(GOLDEN)
    h = index + keys[:, :1]
    # A signed shift repeats the sign: mask what it brings in.
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h *= _signed(MIX_1)
    h ^= keys[:, 1:]
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h *= _signed(MIX_2)
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    u = h.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=LARGEST_UNIFORM)
    return u.neg_().log1p_().neg_()


def _mix_words(x: np.ndarray) -> np.ndarray:
    """uint32: lowbias32, a bijection in which every bit moves every other."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(MIX_1)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(MIX_2)
    x = x ^ (x >> np.uint32(16))
    return x


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, V] to tokens [S] and their logits [S]: NaN where there is any NaN in the row."""
    # NumPy's runs in vectors: twelve times torch's on a CPU.
    tokens = torch.from_numpy(logits.numpy().argmax(axis=-1))
    return tokens, logits.gather(1, tokens[:, None])[:, 0]


def _cut(x: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray) -> None:
    """In place, [n, V] with 0 the largest of each row: -inf for what min-p, top-k and top-p leave out, in that order.

    Only the rows that ask are touched.
    """
    vocab_size = x.shape[1]
    some = np.flatnonzero(min_p > 0)
    if some.size:
        _cut_below(x, some, _upload(np.log(min_p[some]), x))
    by_k = (top_k > 0) & (top_k < vocab_size)
    some = np.flatnonzero(by_k)
    if some.size:
        _cut_below(x, some, _top_k_threshold(x, some, top_k[some], top_p[some]))
    some = np.flatnonzero(~by_k & (top_p < 1))
    if some.size:
        _cut_below(x, some, _top_p_threshold(x, some, top_p[some]))


def _cut_below(x: torch.Tensor, chosen: np.ndarray, threshold: torch.Tensor) -> None:
    rows = _upload(chosen, x)
    kept = x[rows]
    x[rows] = kept.masked_fill_(kept < threshold[:, None], -torch.inf)


def _top_k_threshold(x: torch.Tensor, chosen: np.ndarray, top_k: np.ndarray, top_p: np.ndarray) -> torch.Tensor:
    """The smallest logit [m] that stays in each chosen row of [n, V], by top-k and then top-p."""
    kept = x[_upload(chosen, x)]
    ordered = kept.topk(int(top_k.max()), dim=-1).values
    last = ordered.gather(1, _upload(top_k.astype(np.int64) - 1, x)[:, None])
    if (top_p < 1).any():
        kept.masked_fill_(kept < last, -torch.inf)
        last = torch.maximum(last, _nucleus(kept, ordered, top_p)[0])
    return last[:, 0]


def _top_p_threshold(x: torch.Tensor, chosen: np.ndarray, top_p: np.ndarray) -> torch.Tensor:
    """The smallest logit [m] that stays in each chosen row of [n, V], by top-p alone.

    A row's likeliest tokens nearly always reach its share: the fewest are tried first, and only rows in which they do
    not are looked at again.
    """
    vocab_size = x.shape[1]
    last = x.new_empty(len(chosen), 1)
    flat = np.arange(len(chosen))
    for width in (*(width for width in PARTIAL_SORTS if width < vocab_size), vocab_size):
        kept = x[_upload(chosen[flat], x)]
        whole = width == vocab_size
        ordered = (kept.sort(dim=-1, descending=True) if whole else kept.topk(width, dim=-1)).values
        last[_upload(flat, x)], reached = _nucleus(kept, ordered, top_p[flat])
        if whole or reached.all():
            break
        flat = flat[~reached.cpu().numpy()]
    return last[:, 0]


def _nucleus(kept: torch.Tensor, ordered: torch.Tensor, top_p: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest logit [m, 1] needed to reach the share top_p, looking at the likeliest tokens only, and whether
    these reached it [m]. `kept` is [m, V] with 0 the largest, `ordered` [m, w] its largest, descending."""
    # The likeliest has logit 0, so its share is one over the sum.
    share = kept.softmax(dim=-1).amax(dim=-1, keepdim=True)
    before = (ordered.exp() * share).cumsum(dim=-1) < _upload(top_p, kept)[:, None]
    needed = before.sum(dim=-1, keepdim=True)
    return ordered.gather(1, needed.clamp(max=ordered.shape[1] - 1)), needed[:, 0] < ordered.shape[1]


def _chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    return (slice(start, start + size) for start in range(0, num_rows, size))


def _upload(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)
