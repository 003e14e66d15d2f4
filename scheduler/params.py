"""What a request may ask for. Validated once, at construction; nothing behind this file checks a range again.

Names and ranges are those of the OpenAI API and vLLM.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_N = 128
MAX_BEAM_WIDTH = 32
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_TEMPERATURE = 100.0
MAX_TOP_K = (1 << 31) - 1


class InvalidRequest(ValueError):
    """The request can never be served as it stands. `field` is the parameter to change."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class QueueFull(RuntimeError):
    """Too many requests wait already; try again later."""


class DefaultTokens(int):
    """A max_tokens that nobody asked for: as many, or what there is room for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Raises InvalidRequest, naming the field, for a value out of range."""

    n: int = 1
    """Independent samples of the prompt."""

    best_of: int | None = None
    """Samples to make, of which the n with the highest mean log-probability are returned, best first, when all have
    ended. None: n."""

    beam_width: int | None = None
    """Beam search over so many candidates, of which the n best are returned, best first, when it is over. None: off."""

    length_penalty: float = 1.0
    """Beam search ranks answers by their log-probability divided by their length to this power: above 0 favours long
    ones."""

    early_stopping: bool | str = False
    """When beam search ends: True: with `beam_width` complete answers; False: when no better one is likely; "never":
    when no better one is possible."""

    max_tokens: int | None = DefaultTokens(16)
    """Output tokens at most; None: as many as the model's context leaves room for. Given, there must be room for them;
    the default is lowered to what there is."""

    min_tokens: int = 0
    """Output tokens before which no end-of-sequence or stop token is sampled."""

    temperature: float = 1.0
    """0 is greedy."""

    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this share; 1: off."""

    top_k: int = 0
    """The k most likely tokens; 0 or -1: off."""

    min_p: float = 0.0
    """Tokens at least this likely relative to the likeliest; 0: off."""

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output; 1: off."""

    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens in the output."""

    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output, per occurrence."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of single tokens."""

    seed: int | None = None
    """Same seed, same prompt: same output, whatever else is being served. None: drawn for the request."""

    stop: Sequence[str] = ()
    """Strings that end the output. A single string is taken as a list of one."""

    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output, besides the model's own."""

    ignore_eos: bool = False
    """Go on past the model's end-of-sequence token."""

    logprobs: int | None = None
    """Log-probabilities: 0: of the sampled token; k: of the k most likely too."""

    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        # None stands for the default here, as in vLLM.
        object.__setattr__(self, "stop", tuple(stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        object.__setattr__(self, "top_k", 0 if self.top_k in (-1, None) else self.top_k)
        self._check_counts()
        self._check_floats()
        self._check_lists()
        self._check_search()

    @property
    def num_sequences(self) -> int:
        """Sequences that run for the request."""
        return self.beam_width or self.best_of or self.n

    @property
    def is_ranked(self) -> bool:
        """Whether the answers are known only when all have ended."""
        return self.beam_width is not None or self.num_sequences > self.n

    def _check_counts(self) -> None:
        _require_int("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, None)
        _require_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _require_int("top_k", self.top_k, 0, MAX_TOP_K)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _require_int("seed", self.seed, -(1 << 63), (1 << 64) - 1)

    def _check_search(self) -> None:
        if self.best_of is not None:
            _require_int("best_of", self.best_of, 1, MAX_N)
            if self.best_of < self.n:
                raise InvalidRequest("best_of", f"best_of is {self.best_of}, fewer than n, which is {self.n}; raise it")
        if self.early_stopping not in (True, False, "never"):
            raise InvalidRequest(
                "early_stopping", f'early_stopping must be true, false or "never", not {self.early_stopping!r}'
            )
        _require_float("length_penalty", self.length_penalty, -100.0, 100.0)
        if self.beam_width is None:
            return
        _require_int("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        if self.n > self.beam_width:
            raise InvalidRequest("n", f"n is {self.n}, more than beam_width, which is {self.beam_width}; lower it")
        if self.best_of is not None:
            raise InvalidRequest(
                "best_of", "best_of is for sampling; beam search makes beam_width answers; leave it out"
            )
        if self.temperature not in (0.0, 1.0) or (self.top_p, self.top_k, self.min_p) != (1.0, 0, 0.0):
            raise InvalidRequest(
                "beam_width", "beam search does not sample; leave temperature, top_p, top_k and min_p out"
            )

    def _check_floats(self) -> None:
        _require_float("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _require_float("min_p", self.min_p, 0.0, 1.0)
        _require_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require_float("top_p", self.top_p, 0.0, 1.0)
        if _float32(self.top_p) == 0:
            raise InvalidRequest("top_p", "top_p must be above 0 and at most 1; for greedy output set temperature to 0")
        _require_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)

    def _check_lists(self) -> None:
        _require_at_most("stop", len(self.stop), MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise InvalidRequest("stop", f"each stop string must have 1 to {MAX_STOP_LENGTH} characters")
        _require_at_most("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, 0, None)
        _require_at_most("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for token, bias in self.logit_bias.items():
            _require_int("logit_bias", token, 0, None)
            _require_float("logit_bias", bias, -100.0, 100.0)


def _require_int(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(name, f"{name} must be a whole number, not {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequest(name, f"{name} must be {bounds}, not {value}")


def _require_float(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(name, f"{name} must be a number, not {value!r}")
    rounded = _float32(value)
    if not _float32(low) <= rounded <= _float32(high):  # not a number is refused too
        raise InvalidRequest(name, f"{name} must be between {low:g} and {high:g}, not {rounded:g}")


def _float32(value: float) -> float:
    """As it is on the wire and in a worker: what passes here must pass there."""
    try:
        rounded: float = struct.unpack("f", struct.pack("f", float(value)))[0]
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    return rounded


def _require_at_most(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(name, f"{name} may have at most {limit} entries, not {count}")
