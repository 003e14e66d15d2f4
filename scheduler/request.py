"""A request that can be served: prompt, parameters and seed, checked against the model's limits at the door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.scheduler.params import DefaultTokens, InvalidRequest, SamplingParams

MAX_CACHE_SALT = 128


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What of the model decides whether a request can be served."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """An admissible request. Make it with `Request.checked`."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    """64 bits, unsigned; the seed in force, given or drawn."""

    stop_token_ids: frozenset[int]
    """Every token that ends the output."""

    max_len: int
    """Tokens of prompt and output together at which a sequence is full."""

    cache_salt: str = ""
    """Blocks are found again by requests with the same salt only."""

    @classmethod
    def checked(
        cls,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        limits: ModelLimits,
        cache_salt: str = "",
    ) -> Request:
        """Raises InvalidRequest with a sentence that says what to change."""
        check_prompt(prompt, limits)
        check_cache_salt(cache_salt)
        _check_token_ids(params, limits)
        room = limits.max_model_len - len(prompt)
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if isinstance(max_tokens, DefaultTokens):
            max_tokens = min(max_tokens, room)
        if max_tokens > room:
            raise InvalidRequest(
                "max_tokens",
                f"max_tokens is {max_tokens}, but the prompt's {len(prompt)} tokens leave room for {room} of the"
                f" {limits.max_model_len} tokens of context; lower it, or leave it out to use what there is",
            )
        if params.min_tokens > room:
            raise InvalidRequest("min_tokens", f"min_tokens is {params.min_tokens}, but there is room for only {room}")
        eos = () if params.ignore_eos else limits.eos_token_ids
        return cls(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            params=params,
            seed=seed & ((1 << 64) - 1),
            stop_token_ids=frozenset(eos).union(params.stop_token_ids),
            max_len=len(prompt) + max_tokens,
            cache_salt=cache_salt,
        )

    def sample_seed(self, index: int) -> int:
        """The seed of sample `index`: far apart for neighbours, and the request's own for the first."""
        return (self.seed + index * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)


def check_cache_salt(cache_salt: str) -> None:
    """Raises InvalidRequest."""
    if len(cache_salt) > MAX_CACHE_SALT or not cache_salt.isprintable():
        raise InvalidRequest("cache_salt", f"a cache_salt has at most {MAX_CACHE_SALT} printable characters")


def check_prompt(prompt: Sequence[int], limits: ModelLimits) -> None:
    """Whether something can follow it. Raises InvalidRequest."""
    if not prompt:
        raise InvalidRequest("prompt", "the prompt is empty; send at least one token")
    if len(prompt) >= limits.max_model_len:
        raise InvalidRequest(
            "prompt",
            f"the prompt has {len(prompt)} tokens, but at most {limits.max_model_len - 1} fit: the context is"
            f" {limits.max_model_len} tokens, one of them for the answer; shorten it or raise --max-model-len",
        )
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= limits.vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(
            "prompt", f"token id {wrong} is outside the model's vocabulary: ids go from 0 to {limits.vocab_size - 1}"
        )


def _check_token_ids(params: SamplingParams, limits: ModelLimits) -> None:
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        for token in ids:
            if token >= limits.vocab_size:
                raise InvalidRequest(
                    name, f"{name}: token id {token} is outside the vocabulary, 0 to {limits.vocab_size - 1}"
                )
