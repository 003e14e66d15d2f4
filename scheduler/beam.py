"""Beam search of one request: which continuations live on, which are complete, and when no better ones can come.

Knows neither blocks nor rows. The decisions are those of transformers' `generate(num_beams=…)`, taken in float32 as
there, so that the answers are the same: scores are rounded after every operation, and among equal scores the earlier
beam and the likelier token come first.

A beam is a node of a tree whose parents are its history: a step costs O(width), not O(length), and what no beam
descends from any more is gone.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import repeat
from operator import itemgetter
from typing import NamedTuple

from quire.scheduler.plan import Answer, Logprobs
from quire.scheduler.request import Request
from quire.scheduler.sequence import FinishReason

Candidates = Sequence[tuple[int, float]]
"""Tokens with their log-probabilities after one beam, best first."""

_cumulative = itemgetter(0)
_MIN_FLOAT32, _MAX_FLOAT32 = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127


class Move(NamedTuple):
    """One live beam of the next step."""

    parent: int
    """Index among the live beams of this step."""
    token: int
    logprob: float
    """Of the token, given its parent."""


class Hypothesis(NamedTuple):
    """A complete answer."""

    token_ids: tuple[int, ...]
    """Output; where it ended with a stop token, that is the last."""
    logprobs: tuple[Logprobs, ...]
    """One for each token where they are kept; else empty."""
    cumulative_logprob: float
    score: float
    """The cumulative log-probability divided by length ** length_penalty."""
    finish_reason: FinishReason


class _Node:
    """The last token of a beam, and what came before it."""

    __slots__ = ("candidates", "cumulative", "logprob", "parent", "rank", "token")

    def __init__(self, parent: _Node | None, token: int, logprob: float, cumulative: float, rank: int) -> None:
        self.parent = parent
        self.token = token
        self.logprob = logprob
        self.cumulative = cumulative
        self.rank = rank
        """1: no other token was likelier after the parent."""
        self.candidates: Candidates = ()
        """The likeliest after the parent, as many as are reported."""


class _Ended(NamedTuple):
    score: float
    node: _Node
    reason: FinishReason


class BeamSearch:
    """`width` beams until the `n` best answers are settled. Lengths are in tokens, prompt included."""

    def __init__(
        self,
        width: int,
        n: int,
        prompt_len: int,
        max_len: int,
        stop_token_ids: frozenset[int],
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        num_logprobs: int | None = None,
    ) -> None:
        assert 1 <= n <= width and prompt_len < max_len
        self.width = width
        self.n = n
        self.num_candidates = max(width + len(stop_token_ids), num_logprobs or 0)
        """Tokens wanted after each beam, or the whole vocabulary. With every stop token among them there are `width`
        that go on, and no beam has more children; transformers' (1 + stop tokens) * width can decide nothing else."""
        self.num_generated = 0
        """Output tokens of every live beam."""
        self.is_over = False
        self._max_generated = max_len - prompt_len
        self._stop_token_ids = stop_token_ids
        self._length_penalty = length_penalty
        # One beam is the greedy answer, as in transformers: there is no other to go on with when it ends.
        self._early_stopping = True if width == 1 else early_stopping
        self._num_logprobs = num_logprobs
        # The prompt alone. transformers starts with `width` copies of it, all but one beyond any hope.
        self._live = [_Node(None, -1, 0.0, 0.0, 1)]
        self._ended: list[_Ended] = []
        """The best `width` so far, best first."""

    @classmethod
    def of(cls, request: Request) -> BeamSearch:
        """The search that a request asks for."""
        params = request.params
        assert params.beam_width is not None
        return cls(
            params.beam_width,
            params.n,
            len(request.prompt_token_ids),
            request.max_len,
            request.stop_token_ids,
            params.length_penalty,
            params.early_stopping,
            params.logprobs,
        )

    @property
    def num_live(self) -> int:
        """Beams whose candidates the next step takes: 1 in the first; then `width`, or fewer in a vocabulary that
        does not have so many continuations."""
        return len(self._live)

    def step(self, candidates: Sequence[Candidates]) -> list[Move] | None:
        """Take what may follow each live beam, in their order; returns the next live beams, best first, or None when
        the search is over.

        A beam with no candidate of finite log-probability had logits that were not numbers: the search is over, and
        its live beams are answers that ended with ERROR."""
        assert not self.is_over and len(candidates) == len(self._live)
        if not all(any(math.isfinite(logprob) for _, logprob in row) for row in candidates):
            self._fail()
            return None
        self.num_generated += 1
        is_full = self.num_generated == self._max_generated
        live: list[_Node] = []
        moves: list[Move] = []
        for place, (cumulative, parent, rank) in enumerate(self._continuations(candidates)):
            if not math.isfinite(cumulative):
                break  # tokens that cannot be sampled: they stand last
            token, logprob = candidates[parent][rank - 1]
            is_stop = token in self._stop_token_ids
            if not (is_stop or is_full):
                live.append(self._node(parent, candidates[parent], rank, cumulative))
                moves.append(Move(parent, token, logprob))
                if len(live) == self.width:
                    break
            elif place < self.width:  # an end that is not among the best is nobody's answer
                node = self._node(parent, candidates[parent], rank, cumulative)
                reason = FinishReason.STOP if is_stop else FinishReason.LENGTH
                self._ended.append(_Ended(self._score(cumulative, self.num_generated), node, reason))
        self._ended = sorted(self._ended, key=lambda ended: -ended.score)[: self.width]
        self._live = live
        self.is_over = not live or self._is_settled()
        return None if self.is_over else moves

    def answers(self) -> list[Hypothesis]:
        """The n best, best first. Once the search is over."""
        assert self.is_over
        answers = [self._hypothesis(ended) for ended in self._ended[: self.n]]
        # Too small a vocabulary for n of them, or too early a failure.
        nothing = Hypothesis((), (), 0.0, 0.0, FinishReason.ERROR)
        return answers + [nothing] * (self.n - len(answers))

    def _continuations(self, candidates: Sequence[Candidates]) -> list[tuple[float, int, int]]:
        """(cumulative log-probability, beam, rank of the token) of all beams' continuations, best first."""
        entries: list[tuple[float, int, int]] = []
        for parent, (node, row) in enumerate(zip(self._live, candidates, strict=True)):
            before = node.cumulative
            sums = array("f", [before + logprob for _, logprob in row])
            entries.extend(zip(sums, repeat(parent), range(1, len(row) + 1)))
        entries.sort(key=_cumulative, reverse=True)
        return entries

    def _node(self, parent: int, row: Candidates, rank: int, cumulative: float) -> _Node:
        token, logprob = row[rank - 1]
        node = _Node(self._live[parent], token, logprob, cumulative, rank)
        if self._num_logprobs:
            node.candidates = row[: self._num_logprobs]
        return node

    def _is_settled(self) -> bool:
        """Whether the live beams can change nothing, by the measure that was asked for."""
        if len(self._ended) < self.width:
            return False
        if self._early_stopping is True:
            return True
        # With a penalty above 0 a longer answer may be the better one: "never" grants the best beam all that is left
        # at no cost, False looks at it as it is.
        reaches = self._early_stopping == "never" and self._length_penalty > 0.0
        length = self._max_generated if reaches else self.num_generated
        return self._score(self._live[0].cumulative, length) <= self._ended[-1].score

    def _score(self, cumulative: float, num_generated: int) -> float:
        try:
            scale = float(num_generated**self._length_penalty)
        except OverflowError:
            scale = _MAX_FLOAT32
        # Inside the range where a quotient tells more from less.
        scale = min(max(_float32(scale), _MIN_FLOAT32), _MAX_FLOAT32)
        return max(_float32(cumulative / scale), -_MAX_FLOAT32)

    def _fail(self) -> None:
        self._ended += [
            _Ended(self._score(node.cumulative, max(1, self.num_generated)), node, FinishReason.ERROR)
            for node in self._live
        ]
        self._live = []
        self.is_over = True

    def _hypothesis(self, ended: _Ended) -> Hypothesis:
        path: list[_Node] = []
        node = ended.node
        while node.parent is not None:
            path.append(node)
            node = node.parent
        path.reverse()
        return Hypothesis(
            token_ids=tuple(node.token for node in path),
            logprobs=() if self._num_logprobs is None else tuple(_logprobs(node) for node in path),
            cumulative_logprob=ended.node.cumulative,
            score=ended.score,
            finish_reason=ended.reason,
        )


def answers_of(request: Request, search: BeamSearch) -> tuple[Answer, ...]:
    """What the search found, for the request's clients."""
    return tuple(Answer(request, index, *hypothesis) for index, hypothesis in enumerate(search.answers()))


def _logprobs(node: _Node) -> Logprobs:
    return Logprobs(
        token_ids=(node.token, *(token for token, _ in node.candidates)),
        values=(node.logprob, *(logprob for _, logprob in node.candidates)),
        rank=node.rank,
    )


def _float32(value: float) -> float:
    """As torch rounds it: infinite beyond the range."""
    return array("f", [value])[0]
