"""Offline workloads: token-id prompts and exact output lengths, a function of a seed, so that any two engines can be
given the same work. Lengths are counted in tokens; ids are drawn from the lower part of a vocabulary.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOWEST_ID, HIGHEST_ID = 4, 7999


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt, the number of tokens to generate, and of samples; temperature 0 takes the likeliest."""

    prompt: list[int]
    output_tokens: int
    n: int = 1
    temperature: float = 0.0


def chat(requests: int = 64, seed: int = 0) -> list[Job]:
    """Conversation-like lengths for a small machine: prompts of 80 to 240 tokens, answers of 64 to 192."""
    rng = random.Random(seed)
    jobs = []
    for _ in range(requests):
        prompt = _ids(rng, rng.randint(80, 240))
        jobs.append(Job(prompt, rng.randint(64, 192)))
    return jobs


def prefix(requests: int = 64, seed: int = 1) -> list[Job]:
    """One system prompt of 512 tokens before questions of 32 with answers of 32."""
    rng = random.Random(seed)
    shared = _ids(rng, 512)
    return [Job(shared + _ids(rng, 32), 32) for _ in range(requests)]


def nano(
    requests: int = 256, seed: int = 0, shortest: int = 100, longest: int = 1024, highest: int = 10000
) -> list[Job]:
    """The workload that nano-vllm's figures are stated for, by its published parameters: prompts and answers of 100 to
    1,024 tokens each, all prompts drawn before all answers' lengths, temperature 0.6. 142,827 prompt tokens and 133,966
    output tokens; ids up to `highest`."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(requests):
        length = rng.randint(shortest, longest)
        prompts.append([rng.randint(0, highest) for _ in range(length)])
    lengths = [rng.randint(shortest, longest) for _ in range(requests)]
    return [Job(prompt, length, temperature=0.6) for prompt, length in zip(prompts, lengths, strict=True)]


def tiny() -> list[Job]:
    """For a run-through: eight requests of a few tokens."""
    return nano(8, shortest=4, longest=24, highest=99)


WORKLOADS: dict[str, Callable[[], list[Job]]] = {"chat": chat, "prefix": prefix, "nano": nano, "tiny": tiny}


def load(name: str) -> list[Job]:
    """A workload of this file by name, or `file.py:function` that returns dictionaries with prompt, out and n."""
    if name in WORKLOADS:
        return WORKLOADS[name]()
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise SystemExit(f"no workload {name!r}: give one of {', '.join(WORKLOADS)}, or FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location("workload_file", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [
        Job(item["prompt"], item["out"], item["n"], temperature=0.0 if item["n"] == 1 else 1.0)
        for item in getattr(module, function)()
    ]


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(LOWEST_ID, HIGHEST_ID + 1) for _ in range(count)]
