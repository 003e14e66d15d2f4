"""Plans written by hand, in lists of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quire.protos import worker_pb2


def packed(numbers: Sequence[int]) -> bytes:
    return np.array(numbers, "<i4").tobytes()


def unpacked(data: bytes) -> list[int]:
    return np.frombuffer(data, "<i4").tolist()


def sampling(**values: Any) -> worker_pb2.Sampling:
    """Greedy and without penalties, unless told."""
    for name in ("stop_token_ids", "bias_token_ids"):
        if name in values:
            values[name] = packed(values[name])
    if "bias_values" in values:
        values["bias_values"] = np.array(values["bias_values"], "<f4").tobytes()
    return worker_pb2.Sampling(**{"top_p": 1, "repetition_penalty": 1} | values)


def admit(
    row: int,
    tokens: Sequence[int],
    blocks: Sequence[int],
    num_prompt: int | None = None,
    num_computed: int = 0,
    **settings: Any,
) -> worker_pb2.Admit:
    return worker_pb2.Admit(
        row=row,
        token_ids=packed(tokens),
        num_prompt_tokens=len(tokens) if num_prompt is None else num_prompt,
        num_computed_tokens=num_computed,
        block_ids=packed(blocks),
        sampling=sampling(**settings),
    )


def plan(
    rows: Sequence[int] = (),
    num_tokens: Sequence[int] = (),
    admits: Sequence[worker_pb2.Admit] = (),
    retire: Sequence[int] = (),
    extend: Sequence[tuple[int, int]] = (),
    forks: Sequence[tuple[int, int, int]] = (),
    branches: Sequence[tuple[int, int, int]] = (),
    told: Sequence[tuple[int, int]] = (),
    replaced: Sequence[tuple[int, int, int]] = (),
    swap_out: Sequence[tuple[int, int]] = (),
    swap_in: Sequence[tuple[int, int]] = (),
    copies: Sequence[tuple[int, int]] = (),
    **position: int,
) -> worker_pb2.StepPlan:
    """Forks and branches are (parent, child, seed)."""
    return worker_pb2.StepPlan(
        rows=packed(rows),
        num_tokens=packed(num_tokens),
        admits=admits,
        retire_rows=packed(retire),
        extend_rows=packed([row for row, _ in extend]),
        extend_blocks=packed([block for _, block in extend]),
        forks=[worker_pb2.Fork(parent=parent, child=child, seed=seed) for parent, child, seed in forks],
        branches=[worker_pb2.Fork(parent=parent, child=child, seed=seed) for parent, child, seed in branches],
        told=packed(np.ravel(told)),
        replaced=packed(np.ravel(replaced)),
        swap_out=packed(np.ravel(swap_out)),
        swap_in=packed(np.ravel(swap_in)),
        copies=packed(np.ravel(copies)),
        **position,
    )
