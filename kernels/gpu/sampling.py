"""From logits to tokens without a sort: the Triton form of kernels/sampling.py, whose definitions it keeps.

Two kernels pick the tokens.

`scan_chunks` reads the logits once, in chunks of CHUNK, many programs to a row. It leaves each chunk's likeliest token
and, for rows that ask, its best token with noise, the sum of its exponentials, and the largest of every GROUP logits.
The number of chunks depends on the vocabulary alone, and every sum has one order: a row's token does not depend on its
neighbours.

`choose_tokens`, one program per row, merges the chunks. That is all for greedy rows and for rows without cuts. A row
with cuts goes on with few of its logits:

- Where k groups have a largest logit of at least x, k logits are at least x. So a search among the groups' largest, a
  sixteenth of the row, bounds the top-k threshold from below; only groups that reach the bound are read again, and what
  reaches it there, little more than k logits, becomes a list, in which the threshold is searched. A search counts
  what lies above eight pivots at once and ends where a count is right, else with two pivots that are neighbours as
  floats: equal logits, or an adversary, cost at most a dozen counts.
- The threshold of top-p is never computed. The best token with noise of everything that top-k and min-p leave is the
  pick if what is likelier than it has less than top_p of the mass. If not, no token up to it is in the nucleus: it is
  dropped with all that is not likelier, and the best of the rest, which the same pass over the list has found, is next.
  So what stands at last is the best of the nucleus. A pass leaves a uniform share of the mass in expectation: 1 + log(1
  / top_p) passes on average.
- For top-p alone the list holds what is likelier than the best token of the whole row, which is known from the chunks.

A list that would not fit (flat rows, top-k in the thousands) is replaced by the row itself: same passes, more to read.

The smallest of E * exp(-x), E the exponential noise, is the largest of x - log(E): one exponential in place of a
logarithm. x itself is handled as the distance below the row's largest logit: never negative, so its bits as an int32
are in its order, which is what the searches halve. It is multiplied with 1 / temperature where it is exponentiated and
nowhere else; so top-k tells apart what the twin's division, at a great temperature, may make equal.

By count of bytes and instructions, not measured: on an H200 (4.3 TB/s, 132 multiprocessors), 512 rows of 128k are read
once in 61 us, which bounds the scan of greedy rows and of rows with top-k or min-p. Noise for every token, about 45
instructions, takes it to some 110 us. Lists add some 50 us. A pass over whole rows takes 65 us to count and 120 us to
weigh: in flat rows top-p = 0.9 takes 1.1 of the latter, and top-k in the thousands eight of the first and three of the
other, nearly a millisecond together.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# Kernels are typed by what they are launched with.

from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl

from quire.kernels import sampling as twin
from quire.kernels.gpu.device import Device, Variant, device_for

GROUP, WIDTH = 16, 256
"""A group's logits lie WIDTH apart, so that one thread holds them all; a chunk is WIDTH groups side by side."""

CHUNK = GROUP * WIDTH

SCAN_THREADS, CHOOSE_THREADS = 64, 256

STEP = 512
"""Logits of a chunk that get their noise at once."""

BLOCK = 2048
"""Logits that a row's program handles at once."""

MOST_GROUPS, MOST_TOKENS = 2048, 4096
"""Room in a row's list."""

LARGEST_LISTED_K = 1024
"""Beyond it the search for the top-k threshold begins with the whole row."""

GREEDY, PLAIN, NUCLEUS, CUT = 0, 1, 2, 3
"""Kinds of rows: the likeliest; by temperature alone; with top-p too; with top-k or min-p."""

SETTINGS = 8
"""Words of a row: kind, log2(e) / temperature, two keys of noise, key of min_p's limit, top_k, top_p, none."""

ENTRY_BLOCK, PENALTY_BLOCK, SCORE_CHUNK = 256, 256, 4096

PENALTY_COUNTS = 1 << 24
"""Counters of penalized tokens in use at once: 64 MiB."""

LARGEST_SCORED_K = 64
"""Most likeliest tokens that the kernels find; beyond it torch sorts."""

_GROUP, _WIDTH, _CHUNK = tl.constexpr(GROUP), tl.constexpr(WIDTH), tl.constexpr(CHUNK)
_MOST_GROUPS, _MOST_TOKENS = tl.constexpr(MOST_GROUPS), tl.constexpr(MOST_TOKENS)
_LARGEST_LISTED_K = tl.constexpr(LARGEST_LISTED_K)
_GREEDY, _PLAIN, _NUCLEUS, _CUT = (tl.constexpr(kind) for kind in (GREEDY, PLAIN, NUCLEUS, CUT))
_SETTINGS = tl.constexpr(SETTINGS)
_GOLDEN, _MIX_1, _MIX_2 = (tl.constexpr(word) for word in (twin.GOLDEN, twin.MIX_1, twin.MIX_2))
_LARGEST_UNIFORM = tl.constexpr(twin.LARGEST_UNIFORM)
_LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)
_PROMPT = tl.constexpr(1 << 30)
_PIVOTS = tl.constexpr(8)

FARTHEST = 0x7F7FFFFF
"""The largest finite float32, as an int32: distances of tokens that are not forbidden."""


@triton.jit
def _exponential(token, key0, key1):
    """The exponential noise of tokens (int32): `sampling.exponential_noise`, to about one part in a million."""
    h = token.to(tl.uint32) * _GOLDEN + key0
    h ^= h >> 16
    h *= _MIX_1
    h ^= key1
    h ^= h >> 15
    h *= _MIX_2
    h ^= h >> 16
    # (h + 0.5) / 2^31: a power of two does not change the rounding.
    u = tl.minimum((h & 0x7FFFFFFF).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10, _LARGEST_UNIFORM)
    # -log(1 - u), without the branches of the library's logarithm: 1 - u is 2^exponent * (1 - f), 1 - f between
    # sqrt(1/2) and sqrt(2), and -log(1 - f) is f times a polynomial, fitted for its largest relative error, 1.1e-6.
    # Where the exponent is 0, f is u: the rounding of 1 - u would spoil small u, which decide.
    bits = (1.0 - u).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = 1.0 - (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(exponent == 0, u, f)
    p = 0.118961021 * f + 0.186678529
    p = p * f + 0.204963297
    p = p * f + 0.249097437
    p = p * f + 0.333145082
    p = p * f + 0.500011146
    p = p * f + 1.00000095
    return exponent.to(tl.float32) * -_LN2 + p * f


@triton.jit
def _best(values, tokens):
    """The token of the smallest value: of equals the lowest."""
    return tl.min(tl.where(values == tl.min(values, 0), tokens, _NO_TOKEN), 0)


@triton.jit
def scan_chunks(
    logits,  # [S, V] float32, by its row stride
    stride,
    vocab_size,
    settings,  # [S, SETTINGS] int32
    numbers,  # [S, 3, CHUNKS] float32, written: the largest logit (NaN for a chunk with one), best with noise, mass
    tokens,  # [S, 2, CHUNKS] int32, written: those of the first two
    group_tops,  # [S, number of chunks, WIDTH] float32, written for rows with cuts
    CHUNKS: tl.constexpr,  # at least the number of chunks
    STEP: tl.constexpr,
    RANDOM: tl.constexpr,  # whether some row is not greedy
    CUTS: tl.constexpr,  # whether some row has cuts
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    logits += row * stride
    numbers += row * (3 * CHUNKS) + chunk
    tokens += row * (2 * CHUNKS) + chunk
    token = chunk * _CHUNK + tl.arange(0, _GROUP)[:, None] * _WIDTH + tl.arange(0, _WIDTH)[None, :]
    x = tl.load(logits + token, mask=token < vocab_size, other=float("-inf"))
    # A maximum may or may not pass NaN on.
    broken = tl.max(tl.max((x != x).to(tl.int32), 0), 0) > 0
    groups = tl.max(x, 0)
    top = tl.max(groups, 0)
    tl.store(numbers, tl.where(broken, float("nan"), top))
    kind = _GREEDY
    if RANDOM:
        settings += row * _SETTINGS
        kind = tl.load(settings)
    if kind == _GREEDY:
        tl.store(tokens, tl.min(tl.min(tl.where(x == top, token, _NO_TOKEN), 0), 0))
    if RANDOM:
        if CUTS:
            if kind >= _NUCLEUS:
                at = (row * tl.num_programs(0) + chunk) * _WIDTH
                tl.store(group_tops + at + tl.arange(0, _WIDTH), groups)
        if (kind == _PLAIN) | (kind == _NUCLEUS):
            scale = tl.load(settings + 1).to(tl.float32, bitcast=True)
            key0 = tl.load(settings + 2).to(tl.uint32, bitcast=True)
            key1 = tl.load(settings + 3).to(tl.uint32, bitcast=True)
            base = tl.where(top == float("-inf"), 0.0, top)
            least = tl.full([STEP], float("inf"), tl.float32)
            best = tl.full([STEP], _NO_TOKEN, tl.int32)
            mass = tl.full([STEP], 0.0, tl.float32)
            # The chunk is in the nearest cache: read again, it needs no registers.
            for start in range(chunk * _CHUNK, tl.minimum(chunk * _CHUNK + _CHUNK, vocab_size), STEP):
                step = start + tl.arange(0, STEP)
                logit = tl.load(logits + step, mask=step < vocab_size, other=float("-inf"))
                distance = (base - logit) * scale
                value = _exponential(step, key0, key1) * tl.exp2(distance)
                best = tl.where(value < least, step, best)
                least = tl.minimum(least, value)
                if CUTS:
                    if kind == _NUCLEUS:
                        mass += tl.exp2(-distance)
            tl.store(numbers + CHUNKS, tl.min(least, 0))
            tl.store(tokens + CHUNKS, _best(least, best))
            tl.store(numbers + 2 * CHUNKS, tl.sum(mass, 0))


@triton.jit
def _key(logit, top):
    """The distance below the top as an int32 of the same order. A forbidden token's is greater than FARTHEST."""
    return (top - logit).to(tl.int32, bitcast=True)


@triton.jit
def _search(source, n, top, k, slack, limit, BLOCK: tl.constexpr):
    """A key no greater than `limit`, at least k of the n logits not beyond it, and at most k + slack or as few as equal
    ones allow; `limit` itself where fewer are within it."""
    # A thread holds whole columns of a block and adds them up by itself.
    column = tl.arange(0, 2)[None, :, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, None, :]
    nth = tl.arange(0, _PIVOTS) + 1
    within = tl.full([1, BLOCK // 2], 0, tl.int32)
    farthest = tl.full([1, BLOCK // 2], 0, tl.int32)
    for start in range(0, n, BLOCK):
        logit = tl.load(source + start + column, mask=start + column < n, other=float("-inf"))
        key = _key(logit, top)
        within += tl.sum((key <= limit).to(tl.int32), 1)
        farthest = tl.maximum(farthest, tl.max(tl.where(key <= limit, key, 0), 1))
    count = tl.sum(tl.sum(within, 1), 0)
    low = -1  # fewer than k are within it
    high = limit
    if count >= k:
        high = tl.max(tl.max(farthest, 1), 0)
    # Half the distance, a quarter and so on first: then bits are nearly as good as distances.
    pivots = tl.maximum(high - (nth << 23), 0)
    while (high - low > 1) & (count > k + slack):
        below = tl.full([_PIVOTS, BLOCK // 2], 0, tl.int32)
        for start in range(0, n, BLOCK):
            logit = tl.load(source + start + column, mask=start + column < n, other=float("-inf"))
            key = _key(logit, top)
            below += tl.sum((key <= pivots[:, None, None]).to(tl.int32), 1)
        counts = tl.sum(below, 1)
        enough = counts >= k
        high = tl.minimum(high, tl.min(tl.where(enough, pivots, high), 0))
        count = tl.minimum(count, tl.min(tl.where(enough, counts, count), 0))
        low = tl.maximum(low, tl.max(tl.where(enough, low, pivots), 0))
        pivots = tl.minimum(low + tl.maximum((high - low) // _PIVOTS, 1) * nth, high)
    return high


@triton.jit
def _fill_list(
    logits, vocab_size, group_tops, num_groups, groups, list_logits, list_tokens, top, limit, BLOCK: tl.constexpr
):
    """Lists the logits within `limit`, and their tokens; returns the list's length, or more than fits."""
    offsets = tl.arange(0, BLOCK)
    found = 0
    for start in range(0, num_groups, BLOCK):
        group = start + offsets
        logit = tl.load(group_tops + group, mask=group < num_groups, other=float("-inf"))
        inside = _key(logit, top) <= limit
        place = found + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(groups + place, group, mask=inside & (place < _MOST_GROUPS))
        found += tl.sum(inside.to(tl.int32), 0)
    n = _MOST_TOKENS + 1
    if found <= _MOST_GROUPS:
        n = 0
        tl.debug_barrier()  # the groups were written by other threads
        for start in range(0, found * _GROUP, BLOCK):
            slot = (start + offsets) // _GROUP
            group = tl.load(groups + slot, mask=slot < found, other=0)
            token = (group // _WIDTH) * _CHUNK + (offsets % _GROUP) * _WIDTH + group % _WIDTH
            logit = tl.load(logits + token, mask=(slot < found) & (token < vocab_size), other=float("-inf"))
            inside = _key(logit, top) <= limit
            place = n + tl.cumsum(inside.to(tl.int32), 0) - 1
            tl.store(list_logits + place, logit, mask=inside & (place < _MOST_TOKENS))
            tl.store(list_tokens + place, token, mask=inside & (place < _MOST_TOKENS))
            n += tl.sum(inside.to(tl.int32), 0)
        # To a multiple of 16 with what no limit lets in: then the list is read 16 bytes at a time.
        tail = n + tl.arange(0, 16)
        tl.store(list_logits + tail, float("-inf"), mask=tail < _MOST_TOKENS)
        tl.debug_barrier()
    return (n + 15) // 16 * 16


@triton.jit
def _weigh(source, tokens, listed, n, top, scale, key0, key1, limit, BLOCK: tl.constexpr):
    """Of the logits within `limit`: the sum of their exponentials, and the best token with noise."""
    offsets = tl.arange(0, BLOCK)
    mass = tl.full([BLOCK], 0.0, tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    best = tl.full([BLOCK], _NO_TOKEN, tl.int32)
    for start in range(0, n, BLOCK):
        at = start + offsets
        logit = tl.load(source + at, mask=at < n, other=float("-inf"))
        token = tl.where(listed, tl.load(tokens + at, mask=(at < n) & listed, other=0), at)
        inside = _key(logit, top) <= limit
        distance = (top - logit) * scale
        mass += tl.where(inside, tl.exp2(-distance), 0.0)
        value = _exponential(token, key0, key1) * tl.exp2(distance)
        value = tl.where(inside, value, float("inf"))
        # A list is in no order: of equals the lowest token.
        best = tl.where((value < least) | ((value == least) & (token < best)), token, best)
        least = tl.minimum(least, value)
    return tl.sum(mass, 0), _best(least, best)


@triton.jit
def _choose_among_few(
    logits,  # of the row, as what follows
    vocab_size,
    settings,
    group_tops,
    num_groups,
    groups,
    list_logits,
    list_tokens,
    top,
    total,  # of the masses; 0: what top-k and min-p leave is yet to be weighed
    picked,  # the best token with noise, where `total` is known
    BLOCK: tl.constexpr,
):
    """The token of a row with cuts."""
    scale = tl.load(settings + 1).to(tl.float32, bitcast=True)
    key0 = tl.load(settings + 2).to(tl.uint32, bitcast=True)
    key1 = tl.load(settings + 3).to(tl.uint32, bitcast=True)
    limit = tl.load(settings + 4)
    k = tl.load(settings + 5)
    top_p = tl.load(settings + 6).to(tl.float32, bitcast=True)
    nucleus = tl.load(settings) == _NUCLEUS
    if nucleus:
        limit = _key(tl.load(logits + picked), top)
    elif (k > 0) & (k <= _LARGEST_LISTED_K):
        limit = _search(group_tops, num_groups, top, k, k // 4 + 16, limit, BLOCK)
    n = _fill_list(logits, vocab_size, group_tops, num_groups, groups, list_logits, list_tokens, top, limit, BLOCK)
    listed = n <= _MOST_TOKENS
    source = logits
    if listed:
        source = list_logits
    else:
        n = vocab_size
    if nucleus:
        limit -= 1
    elif k > 0:
        limit = _search(source, n, top, k, 0, limit, BLOCK)
    going = True
    while going:
        mass, best = _weigh(source, list_tokens, listed, n, top, scale, key0, key1, limit, BLOCK)
        if total == 0.0:
            total = mass
            picked = best
            going = top_p < 1.0
        else:
            # The top's share alone is 1, so an empty set's mass cannot be mistaken.
            going = (mass >= top_p * total) & (mass > 0.0)
            picked = tl.where(going, best, picked)
        if going:
            limit = _key(tl.load(logits + picked), top) - 1
    return picked


@triton.jit
def choose_tokens(
    logits,  # [S, V] float32, by its row stride
    stride,
    vocab_size,
    settings,  # [S, SETTINGS] int32
    numbers,  # as scan_chunks leaves them
    tokens,
    group_tops,
    groups,  # [S, MOST_GROUPS] int32, scratch
    list_logits,  # [S, MOST_TOKENS] float32, scratch
    list_tokens,  # [S, MOST_TOKENS] int32, scratch
    num_chunks,
    out,  # [S] int64
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANDOM: tl.constexpr,
    CUTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    numbers += row * (3 * CHUNKS)
    tokens += row * (2 * CHUNKS)
    chunk = tl.arange(0, CHUNKS)
    real = chunk < num_chunks
    tops = tl.load(numbers + chunk, mask=real, other=float("-inf"))
    broken = tl.max((tops != tops).to(tl.int32), 0) > 0
    tops = tl.where(tops == tops, tops, float("-inf"))
    top = tl.max(tops, 0) + 0.0  # never -0.0, for the keys of distances
    sound = (top > float("-inf")) & (top < float("inf")) & (broken == 0)
    kind = _GREEDY
    if RANDOM:
        settings += row * _SETTINGS
        kind = tl.where(sound, tl.load(settings), _GREEDY)
    picked = _NO_TOKEN
    if kind == _GREEDY:
        picked = tl.min(tl.where(tops == top, tl.load(tokens + chunk, mask=real, other=_NO_TOKEN), _NO_TOKEN), 0)
    if RANDOM:
        total = 0.0
        if (kind == _PLAIN) | (kind == _NUCLEUS):
            # From each chunk's own top to the row's.
            beyond = (top - tops) * tl.load(settings + 1).to(tl.float32, bitcast=True)
            values = tl.load(numbers + CHUNKS + chunk, mask=real, other=float("inf")) * tl.exp2(beyond)
            picked = _best(values, tl.load(tokens + CHUNKS + chunk, mask=real, other=_NO_TOKEN))
            if CUTS:
                if kind == _NUCLEUS:
                    masses = tl.load(numbers + 2 * CHUNKS + chunk, mask=real, other=0.0)
                    total = tl.sum(masses * tl.exp2(-beyond), 0)
        if CUTS:
            if kind >= _NUCLEUS:
                num_groups = num_chunks * _WIDTH
                picked = _choose_among_few(
                    logits + row * stride,
                    vocab_size,
                    settings,
                    group_tops + row * num_groups,
                    num_groups,
                    groups + row * _MOST_GROUPS,
                    list_logits + row * _MOST_TOKENS,
                    list_tokens + row * _MOST_TOKENS,
                    top,
                    total,
                    picked,
                    BLOCK,
                )
    tl.store(out + row, tl.where(sound, picked, -1).to(tl.int64))


@triton.jit(do_not_specialize=["n"])
def apply_entries(logits, stride, entries, n, BLOCK: tl.constexpr):  # entries: [n, 3] int32: row, token, value's bits
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    row = tl.load(entries + index * 3, mask=mask, other=0).to(tl.int64)
    token = tl.load(entries + index * 3 + 1, mask=mask, other=0)
    value = tl.load(entries + index * 3 + 2, mask=mask, other=0).to(tl.float32, bitcast=True)
    tl.atomic_add(logits + row * stride + token, value, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["tokens_stride"])
def count_known(
    tokens,  # [P, L] integers, by their row stride
    tokens_stride,
    rows,  # [P, 6] int32: row, tokens of the prompt, tokens known, repetition, presence, frequency
    counts,  # [P, V] int32, zeros; written: occurrences in the output, and a bit for the prompt
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_prompt, num_known = tl.load(rows + row * 6 + 1), tl.load(rows + row * 6 + 2)
    token = tl.load(tokens + row * tokens_stride + index, mask=index < num_known, other=0).to(tl.int64)
    counts += row * vocab_size
    tl.atomic_or(counts + token, _PROMPT, mask=index < tl.minimum(num_prompt, num_known), sem="relaxed")
    tl.atomic_add(counts + token, 1, mask=(index >= num_prompt) & (index < num_known), sem="relaxed")


@triton.jit(do_not_specialize=["tokens_stride"])
def penalize_known(
    logits,  # [S, V] float32, by its row stride
    stride,
    tokens,  # as above
    tokens_stride,
    rows,
    counts,  # as count_known leaves them; zeros again when done
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < tl.load(rows + row * 6 + 2)
    token = tl.load(tokens + row * tokens_stride + index, mask=mask, other=0).to(tl.int64)
    # Of all occurrences of a token one finds its count and applies it.
    count = tl.atomic_xchg(counts + row * vocab_size + token, 0, mask=mask, sem="relaxed")
    mask = mask & (count != 0)
    in_output = count & (_PROMPT - 1)
    repetition = tl.load(rows + row * 6 + 3).to(tl.float32, bitcast=True)
    presence = tl.load(rows + row * 6 + 4).to(tl.float32, bitcast=True)
    frequency = tl.load(rows + row * 6 + 5).to(tl.float32, bitcast=True)
    logits += tl.load(rows + row * 6).to(tl.int64) * stride
    x = tl.load(logits + token, mask=mask, other=0.0)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x -= frequency * in_output.to(tl.float32)
    x -= tl.where(in_output > 0, presence, 0.0)
    tl.store(logits + token, x, mask=mask)


@triton.jit
def _next_likeliest(logit, token, real, last, last_token):
    """The likeliest after the last one, equals by their tokens."""
    after = real & ((logit < last) | ((logit == last) & (token > last_token)))
    value = tl.max(tl.where(after, logit, float("-inf")), 0)
    return value, tl.min(tl.where(after & (logit == value), token, _NO_TOKEN), 0)


@triton.jit(do_not_specialize=["k"])
def score_chunks(
    logits,  # [A, V] float32, by its row stride
    stride,
    vocab_size,
    sampled,  # [A] int64; what is negative counts as 0
    numbers,  # [A, 2, CHUNKS] float32, written: the largest logit (NaN for a chunk with one), sum of exponentials
    greater,  # [A, CHUNKS] int32, written: logits greater than the sampled token's
    best,  # [A, CHUNKS, K] float32, written: the k largest
    best_tokens,  # [A, CHUNKS, K] int32, written
    k,
    CHUNKS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    logits += row * stride
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    real = token < vocab_size
    x = tl.load(logits + token, mask=real, other=float("-inf"))
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    x = tl.where(x == x, x, float("-inf"))
    top = tl.max(x, 0)
    mass = tl.sum(tl.exp2((x - tl.where(top == float("-inf"), 0.0, top)) * _LOG2E), 0)
    mine = tl.load(logits + tl.maximum(tl.load(sampled + row), 0))
    tl.store(numbers + row * (2 * CHUNKS) + chunk, tl.where(broken, float("nan"), top))
    tl.store(numbers + row * (2 * CHUNKS) + CHUNKS + chunk, mass)
    tl.store(greater + row * CHUNKS + chunk, tl.sum((x > mine).to(tl.int32), 0))
    at = (row * CHUNKS + chunk) * K
    last = float("inf")
    last_token = -1
    for i in range(0, k):
        last, last_token = _next_likeliest(x, token, real, last, last_token)
        tl.store(best + at + i, last)
        tl.store(best_tokens + at + i, last_token)


@triton.jit(do_not_specialize=["k"])
def score_rows(
    logits,  # [A, V] float32, by its row stride
    stride,
    sampled,  # [A] int64
    numbers,  # as score_chunks leaves them
    greater,
    best,
    best_tokens,
    num_chunks,
    k,
    ids,  # [A, 1 + k] int64, written
    values,  # [A, 1 + k] float32, written
    ranks,  # [A] int64, written
    CHUNKS: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    real = chunk < num_chunks
    tops = tl.load(numbers + row * (2 * CHUNKS) + chunk, mask=real, other=float("-inf"))
    broken = tl.max((tops != tops).to(tl.int32), 0) > 0
    tops = tl.where(tops == tops, tops, float("-inf"))
    top = tl.max(tops, 0)
    masses = tl.load(numbers + row * (2 * CHUNKS) + CHUNKS + chunk, mask=real, other=0.0)
    mass = tl.sum(masses * tl.exp2((tops - top) * _LOG2E), 0)
    mass = tl.where(broken, float("nan"), mass)
    log_mass = tl.log(mass)
    token = tl.load(sampled + row)
    mine = tl.load(logits + row * stride + tl.maximum(token, 0))
    ids += row * (k + 1)
    values += row * (k + 1)
    tl.store(ids, token)
    tl.store(values, mine - top - log_mass)
    rank = tl.sum(tl.load(greater + row * CHUNKS + chunk, mask=real, other=0), 0) + 1
    tl.store(ranks + row, rank.to(tl.int64))
    index = tl.arange(0, CHUNKS * K)
    real = (index // K < num_chunks) & (index % K < k)
    x = tl.load(best + row * (CHUNKS * K) + index, mask=real, other=float("-inf"))
    tokens = tl.load(best_tokens + row * (CHUNKS * K) + index, mask=real, other=_NO_TOKEN)
    last = float("inf")
    last_token = -1
    for i in range(0, k):
        last, last_token = _next_likeliest(x, tokens, real, last, last_token)
        tl.store(ids + 1 + i, last_token.to(tl.int64))
        tl.store(values + 1 + i, last - top - log_mass)


def sample(
    logits: torch.Tensor,  # [S, V] float32, left adjusted
    columns: twin.Columns,
    entries: twin.Entries | None = None,
    penalties: twin.Penalties | None = None,
    prepared: twin.Prepared | None = None,
) -> torch.Tensor:  # [S] int64
    if prepared is None:
        parts = _words(columns, entries, penalties, logits.shape[1])
        prepared = _prepared(parts, _upload(parts, logits.device), entries, penalties)
    if prepared.entries is not None:
        _add_entries(logits, prepared.entries)
    if penalties is not None and prepared.penalties is not None:
        _penalize(logits, penalties.tokens, prepared.penalties)
    return _pick(logits, prepared.settings, prepared.kinds)


def prepare(
    columns: twin.Columns,
    entries: twin.Entries | None,
    penalties: twin.Penalties | None,
    vocab_size: int,
    place: Callable[[np.ndarray], torch.Tensor],
) -> twin.Prepared:
    parts = _words(columns, entries, penalties, vocab_size)
    return _prepared(parts, [place(part) for part in parts], entries, penalties)


def _prepared(
    parts: list[np.ndarray],
    there: list[torch.Tensor],
    entries: twin.Entries | None,
    penalties: twin.Penalties | None,
) -> twin.Prepared:
    return twin.Prepared(
        settings=there[0],
        kinds=parts[0][:, 0],
        entries=None if entries is None else there[1],
        penalties=None if penalties is None else there[-1],
    )


def _words(
    columns: twin.Columns, entries: twin.Entries | None, penalties: twin.Penalties | None, vocab_size: int
) -> list[np.ndarray]:
    """int32: what kernels read, entries and penalties where there are any."""
    parts = [_settings(columns, vocab_size)]
    parts += [] if entries is None else [_entry_words(entries)]
    parts += [] if penalties is None else [_penalty_words(penalties)]
    return parts


def add_entries(logits: torch.Tensor, entries: twin.Entries) -> None:
    """In place, [S, V] float32. At a logit with more than one entry, forbidding aside, they add up in any order."""
    _add_entries(logits, *_upload([_entry_words(entries)], logits.device))


def penalize(logits: torch.Tensor, penalties: twin.Penalties) -> None:
    """In place, [S, V] float32; reads nothing past a row's known tokens."""
    _penalize(logits, penalties.tokens, *_upload([_penalty_words(penalties)], logits.device))


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """[S, V] to [S] int64: the likeliest tokens."""
    return _pick(logits, None, np.zeros(1, np.int32))


def pick(logits: torch.Tensor, columns: twin.Columns) -> torch.Tensor:
    """[S, V] float32 to [S] int64; leaves `logits` as they are."""
    return sample(logits, columns)


def log_probabilities(
    logits: torch.Tensor,  # [A, V] float32
    tokens: torch.Tensor,  # [A] int64
    k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the twin; of equal logits, the lowest tokens first."""
    if k > LARGEST_SCORED_K or not len(logits):
        return twin.log_probabilities_by_sorting(logits, tokens, k)
    rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, SCORE_CHUNK)
    shape = {"CHUNKS": triton.next_power_of_2(num_chunks), "K": _scored(k)}
    numbers = torch.empty(rows, 2, shape["CHUNKS"], dtype=torch.float32, device=logits.device)
    greater = torch.empty(rows, shape["CHUNKS"], dtype=torch.int32, device=logits.device)
    best = torch.empty(rows, shape["CHUNKS"], shape["K"], dtype=torch.float32, device=logits.device)
    best_tokens = torch.empty(rows, shape["CHUNKS"], shape["K"], dtype=torch.int32, device=logits.device)
    ids = torch.empty(rows, 1 + k, dtype=torch.int64, device=logits.device)
    values = torch.empty(rows, 1 + k, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(rows, dtype=torch.int64, device=logits.device)
    partial = (numbers, greater, best, best_tokens)
    score_chunks[(num_chunks, rows)](
        logits, _stride(logits), vocab_size, tokens, *partial, k, **shape, BLOCK=SCORE_CHUNK, num_warps=4
    )
    score_rows[(rows,)](
        logits, _stride(logits), tokens, *partial, num_chunks, k, ids, values, ranks, **shape, num_warps=4
    )
    return ids, values, ranks


def _scored(k: int) -> int:
    """Few forms of the kernels, whatever k requests ask for."""
    return 8 if k <= 8 else 32 if k <= 32 else LARGEST_SCORED_K


def _settings(columns: twin.Columns, vocab_size: int) -> np.ndarray:
    """[S, SETTINGS] int32."""
    words = np.zeros((len(columns.temperature), SETTINGS), np.int32)
    temperature = columns.temperature
    random = np.flatnonzero(temperature > 0)
    top_k = np.where((columns.top_k > 0) & (columns.top_k < vocab_size), columns.top_k, 0)
    held = columns.min_p > 0
    kinds = np.where(columns.top_p < 1, NUCLEUS, PLAIN)
    words[random, 0] = np.where((top_k > 0) | held, CUT, kinds)[random]
    # Clipped, so that 0 and infinity times it are what they should be.
    scale = np.clip(np.log2(np.e) / temperature[random].astype(np.float64), 1.2e-38, 3e38)
    words[random, 1] = scale.astype(np.float32).view(np.int32)
    words[random, 2:4] = twin.noise_keys(columns.seed[random], columns.position[random])
    words[:, 4] = FARTHEST
    limit = np.abs(np.log(columns.min_p[held].astype(np.float64))) * temperature[held]
    words[held, 4] = np.minimum(limit, np.finfo(np.float32).max).astype(np.float32).view(np.int32)
    words[:, 5] = top_k
    words[:, 6] = columns.top_p.astype(np.float32).view(np.int32)
    return words


def _entry_words(entries: twin.Entries) -> np.ndarray:
    values = entries.values.astype(np.float32).view(np.int32)
    return np.stack([entries.rows.astype(np.int32), entries.tokens.astype(np.int32), values], axis=1)


def _penalty_words(penalties: twin.Penalties) -> np.ndarray:
    counts = (penalties.rows, penalties.num_prompt, penalties.num_known)
    amounts = (penalties.repetition, penalties.presence, penalties.frequency)
    words = [count.astype(np.int32) for count in counts] + [x.astype(np.float32).view(np.int32) for x in amounts]
    return np.stack(words, axis=1)


def _upload(parts: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """int32 arrays, in one transfer. Each begins at a multiple of 16 bytes, which a kernel is specialized for."""
    starts = np.cumsum([0] + [-(-part.size // 4) * 4 for part in parts])
    packed = np.zeros(starts[-1], np.int32)
    for part, start in zip(parts, starts, strict=False):
        packed[start : start + part.size] = part.ravel()
    there = torch.from_numpy(packed).to(device, non_blocking=True)
    return [there[start : start + part.size] for part, start in zip(parts, starts, strict=False)]


def _stride(logits: torch.Tensor) -> int:
    assert logits.stride(1) == 1 or logits.shape[1] == 1
    return logits.stride(0)


def _add_entries(logits: torch.Tensor, entries: torch.Tensor) -> None:
    n = len(entries) // 3
    if n:
        grid = (triton.cdiv(n, ENTRY_BLOCK),)
        apply_entries[grid](logits, _stride(logits), entries, n, BLOCK=ENTRY_BLOCK, num_warps=4)


def _penalize(logits: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> None:
    """A table of the vocabulary for each row counts its tokens; only their logits are visited."""
    vocab_size = logits.shape[1]
    num_rows, width = tokens.shape
    together = max(1, min(num_rows, PENALTY_COUNTS // vocab_size))
    counts = torch.zeros(together, vocab_size, dtype=torch.int32, device=logits.device)
    for start in range(0, num_rows, together):
        part = tokens[start : start + together]
        grid = (triton.cdiv(width, PENALTY_BLOCK), len(part))
        arguments = (part, part.stride(0), rows[start * 6 :], counts, vocab_size)
        if all(grid):
            count_known[grid](*arguments, BLOCK=PENALTY_BLOCK, num_warps=4)
            penalize_known[grid](logits, _stride(logits), *arguments, BLOCK=PENALTY_BLOCK, num_warps=4)


def _pick(logits: torch.Tensor, settings: torch.Tensor | None, kinds: np.ndarray) -> torch.Tensor:
    rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    random, cuts = bool((kinds > GREEDY).any()), bool((kinds > PLAIN).any())
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    flags = {"CHUNKS": triton.next_power_of_2(num_chunks), "RANDOM": random, "CUTS": cuts}
    numbers = torch.empty(rows, 3, flags["CHUNKS"], dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, 2, flags["CHUNKS"], dtype=torch.int32, device=logits.device)
    group_tops = groups = list_logits = list_tokens = None
    if cuts:
        group_tops = torch.empty(rows, num_chunks, WIDTH, dtype=torch.float32, device=logits.device)
        groups = torch.empty(rows, MOST_GROUPS, dtype=torch.int32, device=logits.device)
        list_logits = torch.empty(rows, MOST_TOKENS, dtype=torch.float32, device=logits.device)
        list_tokens = torch.empty(rows, MOST_TOKENS, dtype=torch.int32, device=logits.device)
    given = (logits, _stride(logits), vocab_size, settings if random else None, numbers, tokens, group_tops)
    scan_warps, choose_warps = _warps(device_for(logits), cuts)
    scan_chunks[(num_chunks, rows)](*given, **flags, STEP=STEP, num_warps=scan_warps)
    lists = (groups, list_logits, list_tokens)
    choose_tokens[(rows,)](*given, *lists, num_chunks, out, **flags, BLOCK=BLOCK, num_warps=choose_warps)
    return out


def _warps(device: Device, cuts: bool) -> tuple[int, int]:
    """Of scan_chunks and choose_tokens."""
    return SCAN_THREADS // device.warp_size, CHOOSE_THREADS // device.warp_size if cuts else 1


def variants(device: Device) -> list[Variant]:
    """For the vocabulary of Llama 3."""
    vocab_size = 128256
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    shape = {"CHUNKS": triton.next_power_of_2(num_chunks)}
    row = {"logits": torch.float32, "stride": vocab_size}
    found = []
    for name, random, cuts in (("greedy", False, False), ("temperature", True, False), ("cuts", True, True)):
        scratch = torch.float32 if cuts else None
        given = row | {
            "vocab_size": vocab_size,
            "settings": torch.int32 if random else None,
            "numbers": torch.float32,
            "tokens": torch.int32,
            "group_tops": scratch,
        }
        lists = {
            "groups": torch.int32 if cuts else None,
            "list_logits": scratch,
            "list_tokens": torch.int32 if cuts else None,
            "num_chunks": num_chunks,
            "out": torch.int64,
        }
        flags = {"RANDOM": random, "CUTS": cuts}
        scan = given | shape | {"STEP": STEP} | flags
        choose = given | lists | shape | {"BLOCK": BLOCK} | flags
        scan_warps, choose_warps = _warps(device, cuts)
        found.append(Variant(f"sampling: scan, {name}", scan_chunks, scan, num_warps=scan_warps, hot=True))
        found.append(Variant(f"sampling: choose, {name}", choose_tokens, choose, num_warps=choose_warps, hot=True))
    entries = row | {"entries": torch.int32, "n": 1000, "BLOCK": ENTRY_BLOCK}
    known = {"tokens": torch.int32, "tokens_stride": 1001, "rows": torch.int32, "counts": torch.int32}
    known |= {"vocab_size": vocab_size, "BLOCK": PENALTY_BLOCK}
    found.append(Variant("sampling: entries", apply_entries, entries))
    found.append(Variant("sampling: known tokens", count_known, known))
    found.append(Variant("sampling: penalties", penalize_known, row | known))
    for k in (8, 32, LARGEST_SCORED_K):
        partial = {"numbers": torch.float32, "greater": torch.int32, "best": torch.float32, "best_tokens": torch.int32}
        sizes = shape | {"K": k}
        chunks = row | {"vocab_size": vocab_size, "sampled": torch.int64} | partial | {"k": k} | sizes
        written = {"ids": torch.int64, "values": torch.float32, "ranks": torch.int64}
        rows = row | {"sampled": torch.int64} | partial | {"num_chunks": num_chunks, "k": k} | written | sizes
        found.append(Variant(f"sampling: score {k}", score_chunks, chunks | {"BLOCK": SCORE_CHUNK}))
        found.append(Variant(f"sampling: scores of rows, {k}", score_rows, rows))
    return found
