"""What the numbers of a plan must be before anything is done with them."""

from __future__ import annotations

import numpy as np

_NOTHING = np.empty((0, 4), np.int64)


class PlanError(ValueError):
    """A plan that cannot be carried out: the controller and this worker disagree about rows or blocks."""


def ints(packed: bytes) -> np.ndarray:
    """Packed int32 to int64: what indexes arrays without another conversion."""
    if len(packed) % 4:
        raise PlanError(f"{len(packed)} bytes are no array of 32-bit integers")
    return np.frombuffer(packed, "<i4").astype(np.int64)


def records(packed: bytes, width: int) -> np.ndarray:
    """[n, width]."""
    if not packed:
        return _NOTHING[:, :width]
    numbers = ints(packed)
    if len(numbers) % width:
        raise PlanError(f"{len(numbers)} integers do not make up records of {width}")
    return numbers.reshape(-1, width)


def check_ids(ids: np.ndarray, limit: int, what: str) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= limit):
        wrong = ids[(ids < 0) | (ids >= limit)][0]
        raise PlanError(f"{what} {wrong} is not in 0 to {limit - 1}")


def check_different(ids: np.ndarray, what: str, verb: str) -> None:
    """ "row" and "is told": "row 3 is told 2 times in one step"."""
    if len(ids) > 1:
        values, times = np.unique(ids, return_counts=True)
        if len(values) < len(ids):
            raise PlanError(f"{what} {values[times.argmax()]} {verb} {times.max()} times in one step")


def occurrence(values: np.ndarray) -> np.ndarray:
    """How many equal values come before each: [7, 3, 7, 7] gives [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    index = np.arange(len(values))
    first = np.searchsorted(ordered, ordered)
    out = np.empty_like(index)
    out[order] = index - first
    return out
