"""Reserved prefixes: prompts' beginnings whose blocks are computed once and never evicted (section 4.4 of the paper).

Their full blocks are found by content, like everybody's. The last, partly filled one is found here: a request that goes
on from it gets a copy, into which it writes.
"""

from __future__ import annotations

from typing import NamedTuple

from quire.scheduler.params import SamplingParams
from quire.scheduler.prefix_cache import PrefixCache
from quire.scheduler.request import Request
from quire.scheduler.sequence import Sequence


class PrefixStatus(NamedTuple):
    """For an operator."""

    name: str
    num_tokens: int
    num_blocks: int
    """That it holds now."""
    is_ready: bool
    """Its blocks are filled."""
    num_hits: int
    """Admissions that began with all of it."""


def request_for(name: str, token_ids: tuple[int, ...], cache_salt: str) -> Request:
    """What computes a prefix. No client's request can have the same id, for those are printable."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    return Request(f"\0{name}", token_ids, params, 0, frozenset(), len(token_ids) + 1, cache_salt)


def _name_of(request: Request) -> str:
    return request.request_id[1:]


class ReservedPrefixes:
    """Sequences that keep their blocks when they have been computed."""

    def __init__(self, cache: PrefixCache, block_size: int) -> None:
        self._cache = cache
        self._block_size = block_size
        self._sequences: dict[str, Sequence] = {}
        """By name; those that are ready, and those that are on their way."""
        self._hits: dict[str, int] = {}
        self.num_kept = 0
        """Distinct blocks that are kept."""
        self._ready: dict[str, Sequence] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sequences

    def add(self, name: str, sequence: Sequence) -> None:
        self._sequences[name] = sequence
        self._hits[name] = 0

    def keep(self, sequence: Sequence) -> None:
        """It has been computed."""
        name = _name_of(sequence.request)
        self._ready[name] = self._sequences[name]
        self.num_kept = self.count_blocks()

    def remove(self, name: str) -> Sequence:
        self._ready.pop(name, None)
        self.num_kept = self.count_blocks()
        del self._hits[name]
        return self._sequences.pop(name)

    @property
    def ready(self) -> list[Sequence]:
        """Those that own blocks and no row."""
        return list(self._ready.values())

    def count_blocks(self) -> int:
        """As `num_kept`, by a walk."""
        return len({block for sequence in self._ready.values() for block in sequence.block_ids})

    def most_blocks(self) -> int:
        """Blocks that all of them need at most, those on their way included."""
        return sum(-(-s.num_prompt_tokens // self._block_size) for s in self._sequences.values())

    def find_tail(self, sequence: Sequence, num_found: int, most: int) -> tuple[int, int] | None:
        """The block to copy and the tokens in it, where one of the prefixes goes on for a part of a block behind the
        `num_found` full ones that were found; the sequence's first `most` tokens may be found."""
        best: tuple[int, int] | None = None
        size = self._block_size
        for prefix in self._ready.values():
            length = prefix.num_prompt_tokens
            full, rest = divmod(length, size)
            if not rest or full != num_found or length > most or (best is not None and best[1] >= rest):
                continue
            if prefix.request.cache_salt != sequence.request.cache_salt:
                continue
            is_same = not full or self._cache.name(prefix, full - 1) == self._cache.name(sequence, full - 1)
            if is_same and prefix.token_ids[full * size : length] == sequence.token_ids[full * size : length]:
                best = prefix.block_ids[full], rest
        return best

    def count_hit(self, sequence: Sequence) -> None:
        """A sequence was admitted with `num_computed` tokens found."""
        for name, prefix in self._ready.items():
            length = prefix.num_prompt_tokens
            if (
                length <= sequence.num_computed
                and prefix.request.cache_salt == sequence.request.cache_salt
                and prefix.token_ids[:length] == sequence.token_ids[:length]
            ):
                self._hits[name] += 1

    def status(self) -> list[PrefixStatus]:
        return [
            PrefixStatus(name, s.num_prompt_tokens, len(s.block_ids), name in self._ready, self._hits[name])
            for name, s in self._sequences.items()
        ]
