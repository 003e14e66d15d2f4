"""Text: the only place that knows it. Tokenizer, chat template, incremental decoding, stop strings.

Invariants: what a `Detokenizer` has emitted never changes and never ends inside a character; what a `StopStrings` has
emitted never turns out to be part of a stop string; what somebody wrote in a conversation never becomes one of the
model's control tokens. torch and transformers are not imported unless a model has no tokenizer.json.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from quire.cluster.chat_template import ChatTemplate, TemplateError

# Formats that transformers can turn into a tokenizer of the `tokenizers` library.
_OTHER_FORMATS = ("merges.txt", "tokenizer.model", "spiece.model", "vocab.txt", "tekken.json")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

# Noncharacters, never part of an exchanged text (Unicode 23.7): the first breaks a control token that somebody wrote
# into a message, the two others enclose the number of one that the template wrote.
_GUARD, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
_NONCHARACTERS = {ord(mark): "\ufffd" for mark in (_GUARD, _OPEN, _CLOSE)}

_WINDOW = 8
"""Tokens kept as the context in which the next one is decoded; more than any decoder looks back."""

_MAX_CHARACTER_TOKENS = 4
"""A character has at most four bytes: longer waits do not complete it."""

Message = Mapping[str, str]
"""One turn of a conversation: `role` and `content`."""


class TextError(ValueError):
    """Text that cannot be turned into tokens here. The message says what to do instead."""


class NoTokenizerError(TextError):
    """The model's folder holds no tokenizer: it can be served with token ids only."""


class Tokenizer:
    """Immutable after construction, and safe to use from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._named = dict(named_tokens or {})
        self._template_source = chat_template or ""
        self._template = _compile(chat_template) if chat_template else None
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in self._added.items() if token.special)
        self._steps = _decoder_steps(backend)
        self._pieces: dict[int, bytes | None] = {}
        self._chat_lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a Hugging Face model folder."""
        path = Path(folder)
        settings = _read_json(path / "tokenizer_config.json")
        named = {**_named_tokens(_read_json(path / "special_tokens_map.json")), **_named_tokens(settings)}
        template = _read_template(path, settings)
        file = path / "tokenizer.json"
        if not file.is_file():
            return cls(_convert(path), named, template)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises Exception itself, for a bad file as for a missing one
            raise TextError(f"{file} cannot be read as a tokenizer: {error}") from error
        return cls(backend, named, template)

    # -- ids and text

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    @property
    def bos(self) -> str | None:
        return self._named.get("bos_token")

    @property
    def eos(self) -> str | None:
        return self._named.get("eos_token")

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: no prompt of n tokens is longer than n times this."""
        return max(map(len, self._backend.get_vocab()), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        _check_unicode(text)
        return _encode(self._backend, text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself; half a character reads as U+FFFD."""
        piece = self.piece(token_id)
        if piece is not None:
            return piece.decode("utf-8", "replace")
        return (self._backend.id_to_token(token_id) or "").replace("\u2581", " ")

    def knows(self, token_id: int) -> bool:
        return self._backend.id_to_token(token_id) is not None

    @property
    def is_byte_level(self) -> bool:
        """Whether decoding is the concatenation of the tokens' bytes, whatever the tokens."""
        return self._steps == ["ByteLevel"]

    @property
    def splits_characters(self) -> bool:
        """Whether a token without known bytes may still hold part of a character."""
        return "ByteLevel" in self._steps and not self.is_byte_level

    def piece(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for, or None where its text depends on the tokens before it."""
        if token_id not in self._pieces:
            token = self._backend.id_to_token(token_id)
            if token is None:
                return None
            self._pieces[token_id] = self._piece_of(token)
        return self._pieces[token_id]

    def _piece_of(self, token: str) -> bytes | None:
        if self.is_byte_level:
            known = [_BYTE_OF_CHARACTER.get(character) for character in token]
            return token.encode() if None in known else bytes(byte for byte in known if byte is not None)
        if "ByteFallback" in self._steps and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return None

    # -- conversations

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's chat template writes it."""
        if self._template is None:
            raise TextError("the model has no chat template: send the prompt as text, in the form it was trained on")
        try:
            return self._template.render(messages, add_generation_prompt, self._named)
        except TemplateError as error:
            raise TextError(f"the model's chat template refuses the conversation: {error}") from error

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, in which only the template writes control tokens.

        A control token inside a message is broken by a guard character before the template sees it. In what comes out,
        an unbroken one is the template's: it is replaced by an alias, the guards are taken out again, and a tokenizer
        that knows the aliases but not the control tokens encodes the whole, so that everything else, spaces at the
        start included, is as the ordinary tokenizer would have it.
        """
        for message in messages:
            _check_unicode(message["content"])
        guarded = [self._guard(message) for message in messages]
        rendered = self.render_chat(guarded, add_generation_prompt)
        if _GUARD not in rendered:
            return self.encode(rendered, add_special_tokens=False)
        with self._chat_lock:
            literal = self._literal
        text = literal.controls.sub(literal.alias, rendered).replace(_GUARD, "")
        encoded = _encode(literal.backend, text, False)
        if not literal.forbidden.isdisjoint(encoded):
            raise TextError("a message spells a control token that this model's tokenizer cannot write as plain text")
        return [literal.ids.get(token_id, token_id) for token_id in encoded]

    def _guard(self, message: Message) -> Message:
        # An assistant's turn may quote the template's own markup, such as its thoughts, but no special token.
        starts = self._special_starts if message["role"] == "assistant" else self._control_starts
        content = message["content"].translate(_NONCHARACTERS)
        return {**message, "content": starts.sub(lambda start: start[0] + _GUARD, content)}

    @cached_property
    def _special_starts(self) -> re.Pattern[str]:
        return _starts_of(self._added[token_id].content for token_id in self._special_ids)

    @cached_property
    def _control_starts(self) -> re.Pattern[str]:
        return _starts_of(self._added[token_id].content for token_id in self._control_ids)

    @cached_property
    def _control_ids(self) -> list[int]:
        """Special tokens, and added tokens that the template writes: its markup for thoughts or tools."""
        source = self._template_source
        written = (id for id, token in self._added.items() if token.content.strip() and token.content in source)
        return sorted({*self._special_ids, *written})

    @cached_property
    def _literal(self) -> _Literal:
        # For what a model does not know it has a token of its own, which nobody can abuse.
        unknown = {self._named.get("unk_token"), getattr(self._backend.model, "unk_token", None)}
        tokens = {id: self._added[id] for id in self._control_ids}
        return _Literal(self._backend, tokens, unknown)


class _Literal:
    """The same tokenizer, to which control tokens are ordinary text and only their aliases are control tokens."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        controls: Mapping[int, Any],
        unknown: Collection[str | None],
    ) -> None:
        self.controls = _any_of(token.content for token in controls.values())
        self.backend = tokenizers.Tokenizer.from_str(backend.to_str())
        # Made special, those of the template's markup that are not are skipped with the others.
        self.backend.add_special_tokens(
            [tokenizers.AddedToken(token.content, special=True, normalized=False) for token in controls.values()]
        )
        self.backend.encode_special_tokens = True
        # A model may have a control token in its own vocabulary and make it from text after all.
        self.forbidden = frozenset(id for id, token in controls.items() if token.content not in unknown)
        self._aliases: dict[str, str] = {}
        self.ids: dict[int, int] = {}
        for token_id, token in controls.items():
            alias = f"{_OPEN}{token_id}{_CLOSE}"
            self._aliases[token.content] = alias
            self.backend.add_tokens(
                [tokenizers.AddedToken(alias, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)]
            )
            alias_id = self.backend.token_to_id(alias)
            assert alias_id is not None
            self.ids[alias_id] = token_id

    def alias(self, match: re.Match[str]) -> str:
        return self._aliases[match[0]]


def _encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    # As a batch of one: `encode` holds the interpreter's lock for all the seconds that a long text takes.
    return backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids


class Detokenizer:
    """Text of a growing sequence of tokens, piece by piece; the work per token does not grow with the text."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> None:
        """`context`: the tokens before the first, whose text is not repeated; it decides about a space in between."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        # The last tokens of the text, and how many of them have been emitted.
        self._window = [id for id in context[-_WINDOW:] if self._has_text(id)]
        self._emitted = len(self._window)

    def feed(self, token_ids: Iterable[int]) -> str:
        """Take more tokens; return the characters that are complete with them."""
        return "".join(map(self._take, token_ids))

    def flush(self) -> str:
        """The end: a character still incomplete is rendered as U+FFFD."""
        rest = self._tokenizer.decode(self._window)[len(self._before()) :]
        self._forget()
        return self._bytes.decode(b"", True) + rest

    def _take(self, token_id: int) -> str:
        if not self._has_text(token_id):
            return ""
        piece = self._tokenizer.piece(token_id)
        # A space at the very start may be one that the decoder takes away, also when it is spelled as a byte.
        if piece is None or (piece == b" " and not self._window and not self._tokenizer.is_byte_level):
            return self._bytes.decode(b"", True) + self._decode_in_place(token_id)
        if not self._tokenizer.is_byte_level:
            self._window.append(token_id)
            self._forget()
        return self._bytes.decode(piece)

    def _has_text(self, token_id: int) -> bool:
        if self._skip and self._tokenizer.is_special(token_id):
            return False
        return self._tokenizer.knows(token_id)

    def _decode_in_place(self, token_id: int) -> str:
        before = self._before()
        self._window.append(token_id)
        after = self._tokenizer.decode(self._window)
        waiting = len(self._window) - self._emitted
        if self._tokenizer.splits_characters and after.endswith("\ufffd") and waiting < _MAX_CHARACTER_TOKENS:
            return ""
        self._forget()
        return after[len(before) :]

    def _before(self) -> str:
        return self._tokenizer.decode(self._window[: self._emitted])

    def _forget(self) -> None:
        del self._window[:-_WINDOW]
        self._emitted = len(self._window)


class StopStrings:
    """Ends a text at the first stop string in it, however the text arrives in pieces.

    First is the one that is complete first, as generation cannot wait for what might follow; of several that end at
    the same character the longest, which began first.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if "" in stops:
            raise TextError("a stop string must have at least one character")
        self._stops = tuple(stops)
        self._include = include
        self._beginnings = frozenset(stop[:length] for stop in stops for length in range(1, len(stop)))
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take more text; return what may be emitted, and the stop string if one is complete."""
        text = self._held + text
        found = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, _, stop = min(found)
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        keep = self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The text has ended: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0


class SampleText:
    """The text of one sample as its tokens come: decoded, without stop tokens, ended by the first stop string.

    Stop strings that are complete before `min_tokens` tokens do not count. `context`: see Detokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        stop_token_ids: Collection[int] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens, context)
        self._stops = StopStrings(stops, include_stop)
        # A stop token, which is the last one, is no more part of the text than a stop string.
        self._silent = frozenset() if include_stop else frozenset(stop_token_ids)
        self._min_tokens = min_tokens
        self._count = 0

    def feed(self, token_id: int) -> tuple[str, str | None]:
        """Take one more token; return what may be emitted, and the stop string if one is complete."""
        self._count += 1
        text = "" if token_id in self._silent else self._detokenizer.feed([token_id])
        return (text, None) if self._count < self._min_tokens else self._stops.feed(text)

    def finish(self) -> tuple[str, str | None]:
        """The sample has ended; return what was held back, and a stop string that its very end completes."""
        text, stop = self._stops.feed(self._detokenizer.flush())
        return text + self._stops.flush(), stop


# -- reading a model's folder


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TextError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TextError(f"{file} must hold a JSON object")
    return value


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their role; each is a string or an object with `content`."""
    named = {}
    for role in _NAMED_TOKENS:
        token = settings.get(role)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            named[role] = content
    return named


def _read_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _compile(source: str) -> ChatTemplate:
    try:
        return ChatTemplate(source)
    except TemplateError as error:
        raise TextError(f"the model's chat template cannot be compiled: {error}") from error


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """Through transformers, which takes seconds to import: only for models without tokenizer.json."""
    if not any((folder / name).is_file() for name in _OTHER_FORMATS):
        raise NoTokenizerError(f"{folder} holds no tokenizer: put its tokenizer.json there, or send token ids only")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend = loaded.backend_tokenizer
    except Exception as error:  # it raises what its many formats raise
        raise TextError(f"the tokenizer in {folder} cannot be read: {error}") from error
    assert isinstance(backend, tokenizers.Tokenizer)
    return backend


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[str]:
    """Kinds of the decoder's steps, without those that change nothing in a concatenation of bytes."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return [step["type"] for step in steps if step["type"] != "Fuse"]


# -- small helpers


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"the text is not valid Unicode: a lone surrogate at character {error.start}") from error


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches an unguarded one of the strings, the longest that fits."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})(?!{_GUARD})")


def _starts_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches the first character of every occurrence of the strings, also where these overlap."""
    rests: dict[str, list[str]] = {}
    for string in filter(None, strings):
        rests.setdefault(string[0], []).append(re.escape(string[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()) or "(?!)")


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable Latin-1 stands for itself, other bytes are moved up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(moved)}


_BYTE_OF_CHARACTER = _byte_of_character()
