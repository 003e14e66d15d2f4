"""Tensor parallelism: which part of everything is this rank's, and the collectives that put parts together.

Passed to whoever needs it; with one rank every operation is the identity and no process group exists. All ranks
issue the same collectives in the same order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from quire.worker.models.checkpoint import share

TIMEOUT = timedelta(minutes=5)
"""For a rank that never arrives; a late one is noticed by the controller long before."""


def visible_gpus() -> list[str]:
    """The devices that this process may use, as CUDA_VISIBLE_DEVICES calls them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if named is None else [name.strip() for name in named.split(",")][:count]


@dataclass(slots=True)
class TensorParallel:
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def single(cls) -> TensorParallel:
        return cls()

    @classmethod
    def start(
        cls, rank: int, size: int, init_method: str, device: torch.device | str, timeout: timedelta = TIMEOUT
    ) -> TensorParallel:
        """Joins the group; returns when all ranks have. `init_method` is the same address for all of them, such as
        "tcp://host:port" or "file:///path"."""
        if size == 1:
            return cls.single()
        device = torch.device(device)
        if device.type == "cuda":  # NCCL wants the device by number
            device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        return cls(rank, size, dist.group.WORLD)

    def split(self, n: int) -> tuple[int, int]:
        """This rank's range (start, stop) of n items; shares may be uneven."""
        return share(n, self.rank, self.size)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def sum_in_order(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place, added up rank by rank in float32 and rounded once: with more than two ranks the
        order in which an all-reduce adds depends on where an element lies in the message and on how long that is."""
        if self.size <= 2:  # either order of two gives the same
            return self.all_reduce(x)
        total = None
        for part in self._gather(x):
            total = part.float() if total is None else total.add_(part)
        assert total is not None
        return x.copy_(total)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Equal shapes of all ranks, concatenated along `dim`."""
        if self.size == 1:
            return x
        return torch.cat(self._gather(x), dim)

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Equal shapes of all ranks, in their order."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """What rank 0 has, in place on the others; shapes are equal."""
        if self.size > 1:
            dist.broadcast(x, src=0, group=self.group)
        return x

    def least(self, number: int, device: torch.device) -> int:
        """The least of the ranks' numbers."""
        if self.size == 1:
            return number
        least = torch.tensor([number], device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.group)
        return int(least.item())

    def close(self) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None
