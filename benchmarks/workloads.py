"""Offline workloads: token-id prompts and exact output lengths, a function of a seed, so that any two engines can be
given the same work. Lengths are counted in tokens; ids are drawn from the lower part of any vocabulary.
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
    """One request: its prompt, the number of tokens to generate, and of samples."""

    prompt: list[int]
    output_tokens: int
    n: int = 1


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


WORKLOADS: dict[str, Callable[[], list[Job]]] = {"chat": chat, "prefix": prefix}


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
    return [Job(item["prompt"], item["out"], item["n"]) for item in getattr(module, function)()]


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(LOWEST_ID, HIGHEST_ID + 1) for _ in range(count)]
