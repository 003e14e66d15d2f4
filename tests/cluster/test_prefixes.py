"""Prefixes to reserve as an operator writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.cluster.config import ConfigError, ServeConfig
from quire.cluster.prefixes import Prefix, read_prefix

MESSAGES = [{"role": "system", "content": "Be kind."}]


def test_text_is_named_by_its_file_and_ends_before_the_editors_newline(tmp_path: Path) -> None:
    file = tmp_path / "system.prompt.txt"
    file.write_text("Bé kind.\n\n", encoding="utf-8")
    assert read_prefix(str(file)) == Prefix("system.prompt", "Bé kind.\n")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2, 3], Prefix("file", [1, 2, 3])),
        ({"token_ids": [7]}, Prefix("file", [7])),
        ({"text": "a\n", "name": "other"}, Prefix("other", "a\n")),
        ({"messages": MESSAGES, "cache_salt": "tenant"}, Prefix("file", MESSAGES, "tenant")),
    ],
)
def test_json_says_more(value: Any, expected: Prefix, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text(json.dumps(value))
    assert read_prefix(str(file)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("7", "list of token ids, or an object"),
        ('{"name": "x"}', "one of text, token_ids, messages"),
        ('{"text": "a", "token_ids": [1]}', "one of text, token_ids, messages"),
        ('{"text": "a", "salt": "b"}', "one of text, token_ids, messages"),
        ('{"text": ""}', "not be empty"),
        ("[]", "not be empty"),
        ("[1, -2]", "must hold text, token ids, or messages"),
        ("[true]", "must hold text, token ids, or messages"),
        ('{"messages": [{"role": "system"}]}', "messages with role and content"),
        ('{"text": "a", "name": 7}', "must be strings"),
        ('{"text": "a", "cache_salt": null}', "must be strings"),
    ],
)
def test_mistakes_are_told_with_the_files_name(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_prefix(str(file))
    assert "wrong.json" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_prefix(str(tmp_path / "absent"))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prefix(str(tmp_path / "latin"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="not be empty"):
        read_prefix(str(tmp_path / "empty"))


def test_names_are_unique_and_the_operators_calls_are_for_this_machine() -> None:
    with pytest.raises(ConfigError, match="two reserved prefixes are named 'a'"):
        ServeConfig(reserved_prefixes=(Prefix("a", "x"), Prefix("b", "x"), Prefix("a", "y")))
    assert ServeConfig().serves_admin and ServeConfig(host="::1").serves_admin
    assert not ServeConfig(host="0.0.0.0").serves_admin and not ServeConfig(enable_admin=False).serves_admin
    assert ServeConfig(host="0.0.0.0", enable_admin=True).serves_admin
