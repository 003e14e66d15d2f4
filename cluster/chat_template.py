"""A model's chat template: Jinja that came with the weights, and so code that nobody here has read.

It runs in a sandbox, with the few helpers that transformers gives it and nothing else; whatever it does wrong comes out
as a `TemplateError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateError(ValueError):
    """The template is not valid, refuses the conversation, or fails on it."""


class ChatTemplate:
    """Immutable, and safe to use from several threads."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, named_tokens: Mapping[str, str]
    ) -> str:
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **named_tokens,
            )
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise TemplateError(repr(error)) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's turns for training; for serving it is its content."""

    tags = {"generation"}  # noqa: RUF012  (declared so by its base class)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja's own filter, this one does not escape HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
