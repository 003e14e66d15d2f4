"""Fresh inputs, poisoned memory and references in higher precision: what a kernel is checked against before it is
timed, at the sizes it is timed at.

The twins in kernels/reference.py are for reading and small shapes; these do the same sums on whole tensors, in float64,
and on a sample of the tokens where there are many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from quire.kernels.attention import PagedRows, SharedPrefixes

NOWHERE = 10**8
"""A block id that nothing may follow, and the poison of integers."""

FLOAT8_NAN = 0x7F
"""Of float8_e4m3fn, which torch does not fill with a number on every device."""

K_SCALE = 0.5
"""Of keys in a float8 pool. Values have 1: other projects multiply theirs by a kernel of its own."""


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||; NaN where anything of `got` is not a number, so that no comparison passes."""
    if not torch.isfinite(got.float()).all():
        return float("nan")
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def worst(*errors: float) -> float:
    """The largest; NaN, which `max` passes over, is larger than all."""
    return max(errors, key=lambda error: (error != error, error))


def poison(x: torch.Tensor) -> torch.Tensor:
    """In place: NaN, or a number that is no block, row or token."""
    if x.dtype == torch.float8_e4m3fn:
        x.view(torch.uint8).fill_(FLOAT8_NAN)
    elif x.dtype.is_floating_point:
        x.fill_(torch.nan)
    elif x.dtype in (torch.int32, torch.int64):
        x.fill_(NOWHERE)
    return x


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """What torch would leave uninitialised is poison: an element that a kernel does not write shows."""
    with (
        mock.patch.object(torch, "empty", _poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", _poisoning(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", _poisoning(torch.empty_strided)),
        mock.patch.object(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty)),
    ):
        yield


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*arguments: Any, **keywords: Any) -> torch.Tensor:
        return poison(allocate(*arguments, **keywords))

    return allocate_poisoned


@dataclass(frozen=True, slots=True)
class Paged:
    """What attention is asked for."""

    rows: tuple[tuple[int, int], ...]
    """(tokens in the KV, of which new)."""
    heads: tuple[int, int] = (32, 8)
    """Of queries, of keys and values."""
    size: int = 128
    block_size: int = 16
    num_layers: int = 32
    """Of the pool: a block's neighbours in memory are its other layers."""
    used: int = 1
    """Layers that hold anything and are attended to in turn."""
    dtype: torch.dtype = torch.bfloat16
    float8: bool = False
    """The pool's type."""
    window: int | None = None
    alibi: bool = False
    deterministic: bool = False
    static: bool = False
    """With work lists for lengths that change between a graph's replays; rows of one new token."""
    prefix: int = 0
    """Tokens in common, in whole blocks, of all rows, which are then one group."""
    seed: int = 0

    @property
    def token_bytes(self) -> int:
        """Of one token's K and V in one layer."""
        return 2 * self.heads[1] * self.size * (1 if self.float8 else self.dtype.itemsize)

    @property
    def num_new(self) -> int:
        return sum(new for _, new in self.rows)

    @property
    def num_prompts(self) -> int:
        """Rows with several new tokens."""
        return sum(new > 1 for _, new in self.rows)

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs that count."""
        return sum(_pairs(length, new, self.window) for length, new in self.rows)

    @property
    def flops(self) -> float:
        """Of one layer: two products, each a multiplication and an addition per pair, head and dimension."""
        return 4.0 * self.heads[0] * self.size * self.visible_pairs

    @property
    def num_bytes(self) -> float:
        """Of one layer, each key read once however many queries see it: K and V, queries, results."""
        keys = sum(length - _first_key(length, new, self.window) for length, new in self.rows)
        keys -= self.prefix * (len(self.rows) - 1)
        return float(keys * self.token_bytes + 2 * self.num_new * self.heads[0] * self.size * self.dtype.itemsize)


def _first_key(length: int, new: int, window: int | None) -> int:
    return 0 if window is None else max(0, length - new - window + 1)


def _pairs(length: int, new: int, window: int | None) -> int:
    past = length - new
    if window is None:
        return new * past + new * (new + 1) // 2
    return sum(min(past + i + 1, window) for i in range(new))


class PagedCase:
    """A `Paged` on a device: shuffled block tables, a pool that is NaN wherever no query may look, layers 0 .. used - 1
    (spread over the pool's) filled with normal numbers."""

    def __init__(self, spec: Paged, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.generator = torch.Generator(device).manual_seed(spec.seed)
        lengths, new = (np.array(column, np.int32) for column in zip(*spec.rows, strict=True))
        self.starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        self.lengths = lengths
        self.scale = spec.size**-0.5
        tables, num_blocks, unseen = self._place(lengths)
        self.tables = torch.from_numpy(tables).to(device)
        self.indices = [i * spec.num_layers // spec.used for i in range(spec.used)]
        self._fill(num_blocks, torch.from_numpy(unseen).to(device))
        self.slopes = self.kv_scales = None
        if spec.alibi:
            self.slopes = 2.0 ** -torch.linspace(0.25, 8, spec.heads[0], device=device)
        if spec.float8:
            self.kv_scales = torch.ones(2, spec.heads[1], device=device)
            self.kv_scales[0] = K_SCALE
        shape = (spec.num_new, spec.heads[0], spec.size)
        self.queries = [
            torch.randn(shape, generator=self.generator, device=device).to(spec.dtype) for _ in self.indices
        ]

    def _place(self, lengths: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        """Block tables, blocks in all, and the slots [n, 2] (block, offset) in blocks of tables that nobody may see."""
        spec, size = self.spec, self.spec.block_size
        counts = (-(-lengths // size)).tolist()
        firsts = [_first_key(*row, spec.window) for row in spec.rows]
        begins = [max(first // size, spec.prefix // size if row else 0) for row, first in enumerate(firsts)]
        taken, unseen = 3, []
        needed = sum(counts) - sum(begins)
        order = np.random.default_rng(spec.seed).permutation(needed + taken).astype(np.int32)
        tables = np.full((len(lengths), max(counts) + 2), NOWHERE, np.int32)
        for row, (length, _) in enumerate(spec.rows):
            first, begin, count = firsts[row], begins[row], counts[row]
            if row:
                tables[row, : spec.prefix // size] = tables[0, : spec.prefix // size]
            tables[row, begin:count] = order[taken : taken + count - begin]
            taken += count - begin
            unseen += [(tables[row, count - 1], offset) for offset in range((length - 1) % size + 1, size)]
            if begin == first // size:
                unseen += [(tables[row, begin], offset) for offset in range(first % size)]
        # The first three of `order` are in no table.
        return tables, len(order), np.array(unseen, np.int64).reshape(-1, 2)

    def _fill(self, num_blocks: int, unseen: torch.Tensor) -> None:
        spec = self.spec
        dtype = torch.float8_e4m3fn if spec.float8 else spec.dtype
        shape = (num_blocks, spec.num_layers, 2, spec.block_size, spec.heads[1], spec.size)
        self.pool = poison(torch.empty(shape, dtype=dtype, device=self.device))
        self.layers = [self.pool[:, index] for index in self.indices]
        """[N, 2, block, Hkv, D] each, strided views."""
        known = self.tables[self.tables != NOWHERE].unique().long()
        self.unseen = unseen
        for layer in self.layers:
            raw = self._raw(layer)
            for part in known.split(2048):
                values = torch.randn(len(part), *shape[2:], generator=self.generator, device=self.device)
                raw[part] = self._raw(values.to(dtype))
            raw[unseen[:, 0], :, unseen[:, 1]] = FLOAT8_NAN if spec.float8 else torch.nan

    def _raw(self, x: torch.Tensor) -> torch.Tensor:
        """What can be indexed on every device: bytes, of a float8 pool."""
        return x.view(torch.uint8) if self.spec.float8 else x

    def rows(self, shared: bool | None = None) -> PagedRows:
        """A step's rows, nothing derived yet."""
        groups = None
        if self.spec.prefix if shared is None else shared:
            members = np.arange(len(self.lengths), dtype=np.int32)
            starts = np.array([0, len(members)], np.int32)
            groups = SharedPrefixes(members, starts, np.array([self.spec.prefix], np.int32))
        rows = PagedRows(
            self.tables, self.starts, self.lengths, self.spec.deterministic, groups, static=self.spec.static
        )
        if rows.static:
            rows.on_device = (
                torch.from_numpy(self.starts).to(self.device),
                torch.from_numpy(self.lengths).to(self.device),
            )
        return rows

    def sampled(self, most: int = 32) -> list[np.ndarray]:
        """Of each row, which of its new tokens are compared: all, or the ends, tiles' edges and some between."""
        rng = np.random.default_rng(self.spec.seed)
        chosen = []
        for new in np.diff(self.starts).tolist():
            some = {0, 1, 15, 16, 63, 64, 127, 128, new // 2, new - 2, new - 1, *rng.integers(0, new, most).tolist()}
            chosen.append(np.arange(new) if new <= most else np.array(sorted(i for i in some if 0 <= i < new)))
        return chosen

    def tokens(self) -> torch.Tensor:
        """Indices of the compared tokens among all."""
        rows = zip(self.starts.tolist(), self.sampled(), strict=False)
        return torch.from_numpy(np.concatenate([start + chosen for start, chosen in rows])).to(self.device)

    def expected(self, which: int = 0) -> torch.Tensor:
        """float64 [compared tokens, Hq, D] of layer `which`."""
        out = []
        for row, chosen in enumerate(self.sampled()):
            out.append(self._expected_row(row, chosen, which))
        return torch.cat(out)

    def _expected_row(self, row: int, chosen: np.ndarray, which: int) -> torch.Tensor:
        spec, size = self.spec, self.spec.block_size
        length = int(self.lengths[row])
        past = length - int(self.starts[row + 1] - self.starts[row])
        first = _first_key(length, length - past, spec.window) // size * size
        blocks = self.tables[row, first // size : -(-length // size)].long()
        pages = self._raw(self.layers[which])[blocks].view(self.pool.dtype).float()
        kv = pages.transpose(0, 1).flatten(1, 2)[:, : length - first]  # [2, m, Hkv, D]
        if self.kv_scales is not None:
            kv = kv * self.kv_scales[:, None, :, None]
        low = _first_key(length, length - past, spec.window) - first
        k, v = kv[:, low:].double()
        first += low
        at = torch.from_numpy(past + chosen).to(self.device)[:, None]  # [n, 1]
        key_at = torch.arange(first, length, device=self.device)
        seen = key_at <= at
        if spec.window is not None:
            seen &= at - key_at < spec.window
        q = self.queries[which][int(self.starts[row]) + torch.from_numpy(chosen).to(self.device)].double()
        group = spec.heads[0] // spec.heads[1]
        out = torch.empty(len(chosen), spec.heads[0], spec.size, dtype=torch.float64, device=self.device)
        for head in range(spec.heads[0]):
            scores = q[:, head] @ k[:, head // group].T * self.scale
            if self.slopes is not None:
                scores += self.slopes[head] * (key_at - at)
            out[:, head] = scores.masked_fill_(~seen, -torch.inf).softmax(-1) @ v[:, head // group]
        return out

    def error(self, out: torch.Tensor, which: int = 0) -> float:
        """Relative, over the compared tokens; NaN where any token's result is not a number."""
        if not torch.isfinite(out.float()).all():
            return float("nan")
        return relative_error(out[self.tokens()], self.expected(which))

    def clean(self) -> None:
        """Nothing that is reached by a slip is poison any more: other projects' kernels promise less than ours."""
        known = self.tables[self.tables != NOWHERE].unique().long()
        spare = torch.ones(len(self.pool), dtype=torch.bool, device=self.device).index_fill_(0, known, False).nonzero()
        for layer in self.layers:
            raw = self._raw(layer)
            raw[self.unseen[:, 0], :, self.unseen[:, 1]] = 0
            raw[spare[:, 0]] = 0

    def clean_tables(self) -> torch.Tensor:
        return self.tables.masked_fill(self.tables == NOWHERE, 0)
