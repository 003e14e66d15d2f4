"""How each row samples: settings as columns, and the way from logits to tokens and log-probabilities.

Invariant: a row's token is a function of its logits, its settings, its tokens and its position alone, so that
batching, order, preemption and restart cannot change it. A row pays for what it asks for; rows that ask for nothing
cost one argmax.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from quire.kernels.sampling import Columns, Entries, Penalties, greedy, log_probabilities, sample
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
        _check_numbers(message, vocab_size)
        for name, ids in (("stop_token_ids", stops), ("bias_token_ids", biased)):
            if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
                raise ValueError(f"{name} holds an id outside the vocabulary of {vocab_size}")
        if len(biased) != len(bias) or not np.isfinite(bias).all():
            raise ValueError(f"{len(biased)} bias_token_ids need as many finite bias_values; there are {len(bias)}")
        return cls(_values(message, bool(stops.size), bool(biased.size)), stops, biased, bias)


def _check_numbers(message: worker_pb2.Sampling, vocab_size: int) -> None:
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
        "logprobs": 0 <= message.logprobs <= vocab_size,
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
    return needs, message.temperature, *cuts, *penalties, message.seed, message.min_tokens, message.logprobs


class Sampler:
    """Settings of all rows, and sampling by them."""

    def __init__(self, num_rows: int) -> None:
        self._settings = np.zeros(num_rows, SETTINGS)
        self._lists: dict[int, RowSettings] = {}  # of rows with stops to hold back or with a bias

    def admit(self, row: int, settings: RowSettings) -> None:
        self._settings[row] = settings.values
        if settings.values[0] & (BIASED | HELD):  # type: ignore[operator]
            self._lists[row] = settings

    def retire(self, rows: Iterable[int]) -> None:
        for row in rows:
            self._lists.pop(row, None)

    def sample(
        self,
        logits: torch.Tensor,  # [S, V] float32, overwritten
        rows: np.ndarray,  # [S]
        num_prompt: np.ndarray,  # [S]
        num_known: np.ndarray,  # [S]: also the position of the token that is sampled
        token_ids: torch.Tensor,  # [rows of the table, tokens]
    ) -> tuple[torch.Tensor, list[worker_pb2.RowLogprobs]]:
        """Tokens [S] int64, -1 where the logits are not numbers, and log-probabilities of the rows that asked."""
        settings = self._settings[rows]
        needs = settings["needs"]
        if not np.bitwise_or.reduce(needs):
            return greedy(logits), []
        columns = Columns(
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            top_p=settings["top_p"],
            min_p=settings["min_p"],
            seed=settings["seed"],
            position=num_known,
        )
        entries = self._entries(rows, settings, num_known - num_prompt)
        asking = np.flatnonzero(needs & PENALIZED)
        penalties = None
        if asking.size:
            width = int(num_known[asking].max())
            tokens = token_ids[:, :width].index_select(0, torch.from_numpy(rows[asking]).to(token_ids.device))
            penalties = _penalties(settings[asking], asking, tokens, num_prompt[asking], num_known[asking])
        tokens = sample(logits, columns, entries, penalties)
        asking = np.flatnonzero(needs & SCORED)
        return tokens, _score(logits, tokens, asking, settings["logprobs"][asking]) if asking.size else []

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


def _score(
    logits: torch.Tensor, tokens: torch.Tensor, asking: np.ndarray, counts: np.ndarray
) -> list[worker_pb2.RowLogprobs]:
    index = torch.from_numpy(asking).to(logits.device)
    scores = log_probabilities(logits[index], tokens[index], int(counts.max()))
    ids, values, ranks = (part.cpu().numpy() for part in scores)
    return [
        worker_pb2.RowLogprobs(
            position=int(i),
            token_ids=ids[j, : 1 + count].astype("<i4").tobytes(),
            values=values[j, : 1 + count].astype("<f4").tobytes(),
            sampled_rank=int(ranks[j]),
        )
        for j, (i, count) in enumerate(zip(asking, counts, strict=True))
    ]
