"""Movements of whole blocks that a plan orders: out to the swap space, back from it, and copies, in this order and
before anything computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from quire.kernels.blocks import copy_blocks
from quire.protos import worker_pb2
from quire.worker.checks import PlanError, check_different, check_ids, records
from quire.worker.sampler import Place
from quire.worker.swap import Chunk, SwapSpace


@dataclass(frozen=True, slots=True)
class Moves:
    """Checked; [n, 2] int64 each."""

    out: np.ndarray
    """(block, slot)."""
    back: np.ndarray
    """(slot, block)."""
    copies: np.ndarray
    """(source, destination)."""

    def __bool__(self) -> bool:
        return bool(self.out.size or self.back.size or self.copies.size)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The same, with the block ids on their way to the device."""

    out: list[Chunk]
    back: list[Chunk]
    copies: torch.Tensor | None
    """[n, 2] int32."""


class BlockMover:
    def __init__(self, pool: torch.Tensor, swap: SwapSpace) -> None:
        self.swap = swap
        self._pool = pool
        self._is_filled = np.zeros(swap.num_slots, bool)

    def clear(self) -> None:
        """Forgets what the swap space holds."""
        self._is_filled[:] = False

    def check(self, plan: worker_pb2.StepPlan) -> Moves:
        """Raises PlanError for what cannot be moved; changes nothing."""
        moves = Moves(records(plan.swap_out, 2), records(plan.swap_in, 2), records(plan.copies, 2))
        if moves:
            self._check(moves)
        return moves

    def load(self, moves: Moves, place: Place) -> Loaded:
        copies = place(moves.copies.astype(np.int32)).view(-1, 2) if moves.copies.size else None
        out = list(self._chunks(moves.out[:, 0], moves.out[:, 1], place))
        back = list(self._chunks(moves.back[:, 1], moves.back[:, 0], place))
        return Loaded(out, back, copies)

    def run(self, loaded: Loaded) -> None:
        """When the ids are where they were placed."""
        for chunk in loaded.out:
            self.swap.out(chunk)
            self._is_filled[chunk.slots] = True
        for chunk in loaded.back:
            self.swap.back(chunk)
            self._is_filled[chunk.slots] = False
        if loaded.copies is not None:
            copy_blocks(self._pool, loaded.copies)

    def _check(self, moves: Moves) -> None:
        num_blocks, num_slots = len(self._pool), self.swap.num_slots
        blocks, slots = moves.out.T
        back_slots, back_blocks = moves.back.T
        if not num_slots and (slots.size or back_slots.size):
            raise PlanError("blocks are swapped but this worker has no swap space")
        for ids in (blocks, back_blocks, moves.copies):
            check_ids(ids, num_blocks, "moved: block id")
        for ids in (slots, back_slots):
            check_ids(ids, num_slots, "swap slot")
        check_different(slots, "swap slot", "is written")
        check_different(back_slots, "swap slot", "is read")
        check_different(back_blocks, "block", "is swapped in")
        is_empty = ~(self._is_filled[back_slots] | np.isin(back_slots, slots))
        if is_empty.any():
            raise PlanError(f"swap slot {back_slots[is_empty.argmax()]} is read but holds nothing")
        sources, destinations = moves.copies.T
        check_different(destinations, "block", "is a copy's destination")
        both = np.intersect1d(sources, destinations)
        if both.size:
            raise PlanError(f"block {both[0]} is both source and destination of copies")

    def _chunks(self, blocks: np.ndarray, slots: np.ndarray, place: Place) -> Iterator[Chunk]:
        for start in range(0, len(slots), self.swap.chunk):
            stop = start + self.swap.chunk
            yield Chunk(place(blocks[start:stop].astype(np.int32)), slots[start:stop])
