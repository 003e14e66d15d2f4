"""How each row samples: settings as columns, and the way from logits to tokens and log-probabilities.

Invariant: a row's token is a function of its logits, its settings, its tokens and its position alone, so that
batching, order, preemption and restart cannot change it. A row pays for what it asks for; rows that ask for nothing
cost one argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from quire.kernels.sampling import (
    Columns,
    Entries,
    Penalties,
    Prepared,
    greedy,
    log_probabilities,
    prepare_sampling,
    sample,
)
from quire.protos import worker_pb2

# What a row needs beyond an argmax.
RANDOM, BIASED, HELD, PENALIZED, SCORED = 1, 2, 4, 8, 16

SETTINGS = np.dtype(
    [
        ("needs", np.uint8),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("seed", np.uint64),
        ("min_tokens", np.int32),
        ("logprobs", np.int32),
    ],
    align=True,  # torch takes a column whose stride is a multiple of its element
)


@dataclass(frozen=True, slots=True)
class RowSettings:
    """One row's settings, checked."""

    values: tuple[float, ...]
    """In the order of SETTINGS."""
    stop_token_ids: np.ndarray
    """[k] int64: not sampled before min_tokens of output."""
    bias_token_ids: np.ndarray
    """[k] int64."""
    bias_values: np.ndarray
    """[k] float32."""

    @classmethod
    def read(cls, message: worker_pb2.Sampling, vocab_size: int) -> RowSettings:
        """Raises ValueError for what cannot be sampled with."""
        stops = np.frombuffer(message.stop_token_ids, "<i4").astype(np.int64)
        biased = np.frombuffer(message.bias_token_ids, "<i4").astype(np.int64)
        bias = np.frombuffer(message.bias_values, "<f4").astype(np.float32)
        _check_numbers(message)
        for name, ids in (("stop_token_ids", stops), ("bias_token_ids", biased)):
            if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
                raise ValueError(f"{name} holds an id outside the vocabulary of {vocab_size}")
        if len(biased) != len(bias) or not np.isfinite(bias).all():
            raise ValueError(f"{len(biased)} bias_token_ids need as many finite bias_values; there are {len(bias)}")
        most = min(message.logprobs, vocab_size)  # a small vocabulary has no more to tell
        return cls((*_values(message, bool(stops.size), bool(biased.size)), most), stops, biased, bias)


def _check_numbers(message: worker_pb2.Sampling) -> None:
    # What a request may ask for has been checked, as float32: a refusal here means that the two disagree. Written so
    # that NaN fails.
    valid = {
        "temperature": 0 <= message.temperature < np.inf,
        "top_k": message.top_k >= 0,
        "top_p": 0 < message.top_p <= 1,
        "min_p": 0 <= message.min_p <= 1,
        "repetition_penalty": 0 < message.repetition_penalty < np.inf,
        "presence_penalty": -np.inf < message.presence_penalty < np.inf,
        "frequency_penalty": -np.inf < message.frequency_penalty < np.inf,
        "min_tokens": message.min_tokens >= 0,
        "logprobs": message.logprobs >= 0,
    }
    for name, fine in valid.items():
        if not fine:
            raise ValueError(f"{name} is {getattr(message, name)}, which is out of range")


def _values(message: worker_pb2.Sampling, has_stops: bool, has_bias: bool) -> tuple[float, ...]:
    penalties = (message.repetition_penalty, message.presence_penalty, message.frequency_penalty)
    needs = (
        (message.temperature > 0) * RANDOM
        | has_bias * BIASED
        | (has_stops and message.min_tokens > 0) * HELD
        | (penalties != (1, 0, 0)) * PENALIZED
        | message.HasField("logprobs") * SCORED
    )
    cuts = (message.top_k, message.top_p, message.min_p)
    return needs, message.temperature, *cuts, *penalties, message.seed, message.min_tokens


Place = Callable[[np.ndarray], torch.Tensor]
"""Takes an array of int32 along to the device, and says where it will be, flat, when the step computes."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How the rows of one step sample, with everything on its way to where they do."""

    columns: Columns | None
    """None: all of them are greedy and ask for nothing else."""
    entries: Entries | None = None
    penalties: Penalties | None = None
    """With the rows of the table in the tokens' place: what they hold is known when the step computes."""
    prepared: Prepared | None = None
    scored: np.ndarray | None = None
    """[A]: index among the rows of those that want log-probabilities; None: nobody does."""
    scored_on_device: torch.Tensor | None = None
    counts: np.ndarray | None = None
    """[A]: the likeliest tokens that each of them wants."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities as they are computed."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Ids [A, 1 + k], values [A, 1 + k], ranks [A]."""
    scored: np.ndarray
    counts: np.ndarray

    def messages(self, arrays: Iterable[np.ndarray]) -> list[worker_pb2.RowLogprobs]:
        """From the tensors as they have come to the host."""
        ids, values, ranks = arrays
        return [
            worker_pb2.RowLogprobs(
                position=int(i),
                token_ids=ids[j, : 1 + count].astype("<i4").tobytes(),
                values=values[j, : 1 + count].astype("<f4").tobytes(),
                sampled_rank=int(ranks[j]),
            )
            for j, (i, count) in enumerate(zip(self.scored, self.counts, strict=True))
        ]


class Sampler:
    """Settings of all rows, and sampling by them."""

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self._settings = np.zeros(num_rows, SETTINGS)
        self._needs = self._settings["needs"]
        self._lists: dict[int, RowSettings] = {}  # of rows with stops to hold back or with a bias
        self._vocab_size = vocab_size

    def admit(self, row: int, settings: RowSettings) -> None:
        self._settings[row] = settings.values
        if settings.values[0] & (BIASED | HELD):  # type: ignore[operator]
            self._lists[row] = settings

    def fork(self, parent: int, child: int, seed: int) -> None:
        """An empty row samples as another does, by a seed of its own."""
        self._settings[child] = self._settings[parent]
        self._settings["seed"][child] = seed
        if parent in self._lists:
            self._lists[child] = self._lists[parent]

    def retire(self, rows: Iterable[int]) -> None:
        for row in rows:
            self._lists.pop(row, None)

    def is_greedy(self, rows: np.ndarray) -> bool:
        """Whether the rows ask for the likeliest token and for nothing else."""
        return not self._needs[rows].any()

    def prepare(
        self,
        rows: np.ndarray,  # [S]
        num_prompt: np.ndarray,  # [rows of the table]
        num_known: np.ndarray,  # [rows of the table]: also the position of the token that is sampled
        place: Place,
        like: torch.Tensor,
    ) -> Draw:
        """What the step has to know before it computes; `like` lies where the logits will."""
        settings, known, prompt = self._settings[rows], num_known[rows], num_prompt[rows]
        needs = settings["needs"]
        columns = Columns(
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            top_p=settings["top_p"],
            min_p=settings["min_p"],
            seed=settings["seed"],
            position=known,
        )
        entries = self._entries(rows, settings, known - prompt)
        asking = np.flatnonzero(needs & PENALIZED)
        penalties = None
        if asking.size:
            place_of = place(rows[asking].astype(np.int32))
            penalties = _penalties(settings[asking], asking, place_of, prompt[asking], known[asking])
        prepared = prepare_sampling(columns, entries, penalties, self._vocab_size, place, like)
        asking = np.flatnonzero(needs & SCORED)
        if not asking.size:
            return Draw(columns, entries, penalties, prepared)
        index = place(asking.astype(np.int32))
        return Draw(columns, entries, penalties, prepared, asking, index, settings["logprobs"][asking])

    def sample(
        self,
        draw: Draw,
        logits: torch.Tensor,  # [S, V] float32, overwritten
        token_ids: torch.Tensor,  # [rows of the table, tokens]
    ) -> tuple[torch.Tensor, Scores | None]:
        """Tokens [S] int64, -1 where the logits are not numbers, and log-probabilities of the rows that asked."""
        if draw.columns is None:
            return greedy(logits), None
        penalties = draw.penalties
        if penalties is not None:
            known = token_ids[:, : int(penalties.num_known.max())].index_select(0, penalties.tokens)
            penalties = replace(penalties, tokens=known)
        tokens = sample(logits, draw.columns, draw.entries, penalties, draw.prepared)
        if draw.scored is None or draw.scored_on_device is None or draw.counts is None:
            return tokens, None
        logits, asked = logits.index_select(0, draw.scored_on_device), tokens.index_select(0, draw.scored_on_device)
        scores = log_probabilities(logits, asked, int(draw.counts.max()))
        return tokens, Scores(scores, draw.scored, draw.counts)

    def _entries(self, rows: np.ndarray, settings: np.ndarray, num_output: np.ndarray) -> Entries | None:
        """Biases and, before a row has min_tokens of output, its stop tokens at -inf."""
        parts: list[tuple[int, np.ndarray, np.ndarray]] = []
        for i in np.flatnonzero(settings["needs"] & (BIASED | HELD)):
            lists = self._lists[int(rows[i])]
            parts.append((int(i), lists.bias_token_ids, lists.bias_values))
            if num_output[i] < settings["min_tokens"][i]:
                stops = lists.stop_token_ids
                parts.append((int(i), stops, np.full(len(stops), -np.inf, np.float32)))
        if not parts:
            return None
        indices, tokens, values = zip(*parts, strict=True)
        return Entries(np.repeat(indices, [len(ids) for ids in tokens]), np.concatenate(tokens), np.concatenate(values))


def _penalties(
    settings: np.ndarray, asking: np.ndarray, tokens: torch.Tensor, num_prompt: np.ndarray, num_known: np.ndarray
) -> Penalties:
    return Penalties(
        asking,
        tokens,
        num_prompt,
        num_known,
        settings["repetition_penalty"],
        settings["presence_penalty"],
        settings["frequency_penalty"],
    )
