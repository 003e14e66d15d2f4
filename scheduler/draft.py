"""A plan in the making, and what must wait for the next one."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.scheduler.plan import Admission, Fork
from quire.scheduler.sequence import Sequence


@dataclass(slots=True)
class Draft:
    spare: int
    """Tokens of the budget beyond one for each running sequence."""
    admitted: list[Admission] = field(default_factory=list)
    extended: list[tuple[int, int]] = field(default_factory=list)
    replaced: list[tuple[int, int, int]] = field(default_factory=list)
    copied: list[tuple[int, int]] = field(default_factory=list)
    swapped_in: list[tuple[int, int]] = field(default_factory=list)
    branched: list[Fork] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Those that compute, but for the rows that decode, which stand before them in the plan."""
    num_tokens: list[int] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    """Of these, those that end with their sequence's last known token."""
    branches: list[Sequence] = field(default_factory=list)
    """The children in `branched`, which sample too."""
    entering: list[Sequence] = field(default_factory=list)
    """They decode from the next step on."""
    partial: list[Sequence] = field(default_factory=list)
    """They have more known tokens to compute even then."""
    last: list[Sequence] = field(default_factory=list)
    """The token that they sample fills them."""
    preempted: bool = False


@dataclass(slots=True)
class Changes:
    """What happened to rows and blocks between two plans, and during the making of one: the next plan tells."""

    retired: list[int] = field(default_factory=list)
    admitted: dict[int, Admission] = field(default_factory=dict)
    """By row: sequences that have taken over from a sibling."""
    forked: dict[int, Fork] = field(default_factory=dict)
    """By the child's row."""
    told: dict[int, int] = field(default_factory=dict)
    swapped_out: list[tuple[int, int]] = field(default_factory=list)

    def give_up(self, row: int) -> None:
        """Its sequence is gone. What no plan has told of never happened."""
        self.told.pop(row, None)
        if self.forked.pop(row, None) is None and self.admitted.pop(row, None) is None:
            self.retired.append(row)


@dataclass(frozen=True, slots=True)
class Flight:
    """What apply() must know of a plan."""

    step: int
    sampled: tuple[Sequence, ...]
    last: frozenset[Sequence]
    """Those that are full with this token."""
    num_cut_off: int
    """Sequences that had ended with tokens in flight when the plan was made: if more have since, one may be here."""
    searching: frozenset[int]
    """Positions in `sampled` of the rows whose results a beam search decides about."""
