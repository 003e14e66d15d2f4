"""What a plan comes to when it has been checked: what it does to the rows, what they compute, and what the device must
be told before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from quire.kernels.step_inputs import COPY
from quire.worker.sampler import RowSettings

NO_COPIES = np.empty((0, COPY), np.int32)


@dataclass(frozen=True, slots=True)
class Write:
    """Values for one of the device's rows, on the host."""

    in_blocks: bool
    """Block ids; else token ids."""
    row: int
    column: int
    values: np.ndarray
    """[n] int32."""


@dataclass(slots=True)
class Changes:
    """What the device's rows have yet to be told, in this order. Always empty where they lie on the host."""

    forks: np.ndarray = field(default_factory=lambda: NO_COPIES)
    """[n, COPY] int32: rows copied as earlier steps leave them."""
    writes: list[Write] = field(default_factory=list)
    """In no order: no two overlap."""
    branches: np.ndarray = field(default_factory=lambda: NO_COPIES)
    """[n, COPY] int32: rows copied with what was written."""

    def __bool__(self) -> bool:
        return bool(self.writes or len(self.forks) or len(self.branches))


@dataclass(frozen=True, slots=True)
class Work:
    """What the rows of one step compute; arrays on the host."""

    rows: np.ndarray
    """[B] int64."""
    num_tokens: np.ndarray
    """[B] int64."""
    starts: np.ndarray
    """[B] int64: tokens computed before."""
    sampling: np.ndarray
    """[S] int64: index among the B rows of those that compute their last known token and sample one more; then that of
    the parent of each branch."""

    sampling_rows: np.ndarray
    """[S] int64: the rows that take the sampled tokens: of branches, the child."""

    num_branches: int
    """Of the S."""

    is_decode: bool
    """Every row computes one token and samples one more, and nobody else does."""

    changes: Changes


@dataclass(frozen=True, slots=True)
class Admission:
    row: int
    token_ids: np.ndarray
    """[n] int32."""
    block_ids: np.ndarray
    """[m] int32."""
    settings: RowSettings


class Copy(NamedTuple):
    """A row that becomes a copy of another, and how much of it there is to copy."""

    parent: int
    child: int
    seed: int
    num_tokens: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Checked:
    """What a plan does to the rows, in this order; arrays [n] int64."""

    retired: np.ndarray
    admissions: list[Admission]
    forks: list[Copy]
    told: np.ndarray
    """[n, 2]: rows and tokens."""
    positions: np.ndarray
    """Of these tokens."""
    replaced: np.ndarray
    """[n, 3]: rows, entries of their tables, and blocks."""
    extended: tuple[np.ndarray, np.ndarray, np.ndarray]
    """The same, apart."""
    work: Work
    branches: list[Copy]
    """They share their parents' known tokens, all computed by this step's end."""
