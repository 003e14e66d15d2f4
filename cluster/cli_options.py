"""Options that several commands of `quire` have, and how an option is made: the environment can set every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import click

Decorator: TypeAlias = Callable[[Any], Any]

URL = "127.0.0.1:50051"


class _Parsed(click.ParamType[int]):
    """A size as people write it: 8k, 512M, 2GiB."""

    def __init__(self, name: str, parser: str) -> None:
        self.name = name
        self._parser = parser

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        from quire.cluster import sizes

        parse: Callable[[str], int] = getattr(sizes, self._parser)
        try:
            return parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


COUNT = _Parsed("tokens", "parse_count")
BYTES = _Parsed("bytes", "parse_bytes")


def option(*names: str, **settings: Any) -> Decorator:
    """An option that the environment can set too: QUIRE_ and its name, whatever the command."""
    variable = "QUIRE_" + names[0].removeprefix("--").split("/")[0].replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_default=settings.get("default") is not None, **settings)


def options(*decorators: Decorator) -> Decorator:
    """Several options as one, in the order in which help shows them."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


engine_options = options(
    option("--tensor-parallel-size", "-tp", type=int, default=1, help="Ranks that share the model."),
    option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
           help="Of weights and KV cache; auto: the model's own."),
    option("--kv-cache-dtype", type=click.Choice(["auto", "fp8"]), default="auto",
           help="fp8 (e4m3) holds twice the tokens of a 16-bit cache; auto: as --dtype."),
    option("--max-model-len", type=COUNT, help="Longest sequence: 4096, 8k, 1K.  [default: the model's]"),
    option("--block-size", type=int, default=16, help="Tokens of a KV block."),
    option("--gpu-memory-utilization", type=float, default=0.9, help="Share of a GPU's memory to use."),
    option("--kv-cache-memory-bytes", type=BYTES, help="Size of each rank's KV pool: 512M, 2GiB.  [default: measured]"),
    option("--num-gpu-blocks-override", type=int, help="Exact number of KV blocks."),
    option("--max-num-seqs", type=int, help="Sequences that run at once.  [default: 256 on a GPU, 64 on a CPU]"),
    option("--max-num-batched-tokens", type=COUNT,
           help="Tokens of the largest step.  [default: 2048 on a GPU, 512 on a CPU]"),
    option("--swap-space", type=float,
           help="GiB of host memory per rank for what is preempted.  [default: 4 on a GPU, 0 on a CPU]"),
    option("--preemption-mode", type=click.Choice(["auto", "swap", "recompute"]), default="auto",
           help="What becomes of the KV of a preempted request; auto: what takes less time."),
    option("--enable-prefix-caching/--no-enable-prefix-caching", default=True,
           help="Compute what several prompts begin with once."),
    option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto: a GPU if there is one."),
    option("--deterministic", is_flag=True,
           help="A request's output is the same to the last bit whatever runs beside it."),
    option("--enforce-eager", is_flag=True,
           help="Launch every step, replay none: no CUDA graphs, less memory, slower."),
)  # fmt: skip

url_option = option("--url", default=URL, metavar="HOST:PORT", help="The server.")

sampling_options = options(
    option("--max-tokens", type=int, help="Output tokens at most.  [default: as many as fit]"),
    option("--temperature", type=float, help="0 takes the likeliest token always.  [default: 1]"),
    option("--top-p", type=float, help="Sample from the smallest set of this probability."),
    option("--top-k", type=int, help="Sample from the k likeliest tokens."),
    option("--seed", type=int, help="Same seed, same output."),
    option("--best-of", type=int, help="Make so many samples; answer with those of the highest mean log-probability."),
    option("--beam-width", type=int, help="Beam search with so many candidates, instead of sampling."),
    option("--length-penalty", type=float, help="Of beam search: above 0 favours long answers.  [default: 1]"),
    option("--early-stopping", type=click.Choice(["true", "false", "never"]),
           help="Beam search ends with enough answers; when no better is likely; or possible.  [default: false]"),
    option("--cache-salt", help="Share what is computed only with requests of the same salt."),
    option("--stop", multiple=True, help="End before this text; may be given several times."),
    option("--timeout", type=float, help="Seconds for each answer at most."),
)  # fmt: skip
