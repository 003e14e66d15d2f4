"""Prefixes to reserve, as an operator writes them: a file of text, or one of JSON that says more.

A JSON file is a list of token ids, or an object with one of "text", "token_ids" and "messages", and where it is wanted
"name" and "cache_salt". The messages are the beginning of conversations. Without a name it is the file's, without what
follows its last dot. Standard library only, so that a mistake is told before anything is started.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.cluster.config import ConfigError

KINDS = ("text", "token_ids", "messages")


@dataclass(frozen=True, slots=True)
class Prefix:
    """What prompts begin with, and the name under which it is kept."""

    name: str
    content: str | Sequence[int] | Sequence[Mapping[str, str]]
    """Text, token ids, or messages with `role` and `content`."""
    cache_salt: str = ""


def read_prefix(file: str) -> Prefix:
    """Raises ConfigError."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prefix {file!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if path.suffix != ".json":
        # Editors end a file with a newline; a prompt that has it begins with what is before it all the same.
        return _checked(Prefix(path.stem, text.removesuffix("\n")), file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the prefix {file!r} is not valid JSON: {error}") from error
    return _checked(_from_json(value, path.stem, file), file)


def _from_json(value: Any, name: str, file: str) -> Prefix:
    if isinstance(value, list):
        value = {"token_ids": value}
    given = [kind for kind in KINDS if kind in value] if isinstance(value, dict) else []
    if len(given) != 1 or not set(value) <= {*KINDS, "name", "cache_salt"}:
        raise ConfigError(
            f"the prefix {file!r} must be a list of token ids, or an object with one of {', '.join(KINDS)},"
            " and name and cache_salt where they are wanted"
        )
    return Prefix(value.get("name", name), value[given[0]], value.get("cache_salt", ""))


def _checked(prefix: Prefix, file: str) -> Prefix:
    content = prefix.content
    if not isinstance(prefix.name, str) or not isinstance(prefix.cache_salt, str):
        raise ConfigError(f"name and cache_salt of the prefix {file!r} must be strings")
    is_known = isinstance(content, str) or (
        isinstance(content, list) and (all(map(_is_token_id, content)) or all(map(_is_message, content)))
    )
    if not is_known or not content:
        raise ConfigError(
            f"the prefix {file!r} must hold text, token ids, or messages with role and content, and not be empty"
        )
    return prefix


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"role", "content"}
        and all(isinstance(v, str) for v in value.values())
    )
