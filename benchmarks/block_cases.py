"""Moving whole blocks: copy-on-write, swapping to the host and back. Blocks of 16 tokens, all layers: 2 MiB for
Llama-3.1-8B, 512 KiB for Llama-3.2-1B."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import num_sets, replayed, streamed
from benchmarks.work import Case, Peer, Setting, Target, Work
from quire.kernels.blocks import copy_blocks, gather_blocks, scatter_blocks

MIB = 1 << 20
POOL_BYTES = 4 << 30


class Blocks:
    """A pool of random bytes, and sets of blocks of it in random order, none in two sets."""

    def __init__(self, count: int, block_bytes: int, most_sets: int, setting: Setting) -> None:
        if setting.tiny:
            count, block_bytes = min(count, 3), 1 << 10
        self.count, self.block_bytes, self.device = count, block_bytes, setting.device
        num_blocks = max(2 * count * most_sets, POOL_BYTES // block_bytes if not setting.tiny else 0)
        self.pool = torch.empty(num_blocks, block_bytes, dtype=torch.uint8, device=self.device).random_()
        order = torch.randperm(num_blocks, device=self.device)
        self.sets = order[: 2 * count * most_sets].view(most_sets, 2, count)
        """[sets, 2, count]: sources and destinations."""

    @property
    def num_bytes(self) -> int:
        """Of one set's sources."""
        return self.count * self.block_bytes

    def staging(self) -> torch.Tensor:
        return torch.zeros(self.count, self.block_bytes, dtype=torch.uint8, device=self.device)

    def pinned(self) -> torch.Tensor:
        cuda = self.device.type == "cuda"
        return torch.zeros(self.count, self.block_bytes, dtype=torch.uint8, pin_memory=cuda)

    def differs(self, move: Callable[[], None], want: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """1.0 where `move` leaves another pool than `want` makes of a copy: no other block may change."""
        expected = want(self.pool.clone())
        move()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return float(not torch.equal(self.pool, expected))


def _copy(count: int, block_bytes: int, setting: Setting) -> Work:
    blocks = Blocks(count, block_bytes, num_sets(2 * count * block_bytes) if not setting.tiny else 2, setting)
    pairs = [pair.T.contiguous() for pair in blocks.sets]

    def plain(pair: torch.Tensor) -> torch.Tensor:
        return blocks.pool.index_copy_(0, pair[:, 1], blocks.pool.index_select(0, pair[:, 0]))

    return Work(
        [partial(copy_blocks, blocks.pool, pair) for pair in pairs],
        lambda: blocks.differs(
            partial(copy_blocks, blocks.pool, pairs[0]),
            lambda pool: pool.index_copy_(0, pairs[0][:, 1], pool[pairs[0][:, 0]]),
        ),
        tolerance=0,
        num_bytes=2 * blocks.num_bytes,
        against="copy",
        peers={"torch": lambda: Peer([partial(plain, pair) for pair in pairs])},
    )


def _gather(count: int, block_bytes: int, back: bool, setting: Setting) -> Work:
    """To staging on the device, or `back` from it."""
    blocks = Blocks(count, block_bytes, num_sets(2 * count * block_bytes) if not setting.tiny else 2, setting)
    ids = [pair[0].contiguous() for pair in blocks.sets]
    staging = [blocks.staging().random_() for _ in ids]
    move = scatter_blocks if back else gather_blocks

    def check() -> float:
        if back:
            wrong = blocks.differs(
                partial(scatter_blocks, blocks.pool, ids[0], staging[0]),
                lambda pool: pool.index_copy_(0, ids[0], staging[0]),
            )
            return wrong
        wrong = blocks.differs(partial(gather_blocks, blocks.pool, ids[0], staging[0]), lambda pool: pool)
        return max(wrong, float(not torch.equal(staging[0], blocks.pool[ids[0]])))

    def plain(index: int) -> torch.Tensor:
        if back:
            return blocks.pool.index_copy_(0, ids[index], staging[index])
        return torch.index_select(blocks.pool, 0, ids[index], out=staging[index])

    return Work(
        [partial(move, blocks.pool, each, there) for each, there in zip(ids, staging, strict=True)],
        check,
        tolerance=0,
        num_bytes=2 * blocks.num_bytes,
        against="copy",
        peers={"torch": lambda: Peer([partial(plain, index) for index in range(len(ids))])},
    )


def _swap(count: int, block_bytes: int, back: bool, setting: Setting) -> Work:
    """Between the pool and pinned memory, through staging: a kernel and one copy. Beside it, a copy for each block."""
    blocks = Blocks(count, block_bytes, 1, setting)
    ids, staging, host = blocks.sets[0, 0].contiguous(), blocks.staging(), blocks.pinned()

    def out() -> None:
        gather_blocks(blocks.pool, ids, staging)
        host.copy_(staging, non_blocking=True)

    def into() -> None:
        staging.copy_(host, non_blocking=True)
        scatter_blocks(blocks.pool, ids, staging)

    def check() -> float:
        want = blocks.pool[ids].cpu()
        wrong = blocks.differs(out, lambda pool: pool)
        wrong = max(wrong, float(not torch.equal(host, want)))
        blocks.pool[ids] = 0
        return max(wrong, blocks.differs(into, lambda pool: pool.index_copy_(0, ids, want.to(pool.device))))

    numbers = ids.tolist()
    if back:
        singly = [partial(blocks.pool[n].copy_, host[i], non_blocking=True) for i, n in enumerate(numbers)]
    else:
        singly = [partial(host[i].copy_, blocks.pool[n], non_blocking=True) for i, n in enumerate(numbers)]

    def each() -> None:
        for copy in singly:
            copy()

    return Work(
        [into if back else out],
        check,
        tolerance=0,
        num_bytes=blocks.num_bytes,
        against="to device" if back else "to host",
        how=streamed,
        target=Target("share", 0.8),
        extras={"in a graph": lambda: replayed([into if back else out])},
        peers={"a copy per block": lambda: Peer([each], how=streamed)},
    )


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for size, name in ((2 * MIB, "2 MiB"), (MIB // 2, "512 KiB")):
        for count in (1, 64):
            found[f"copy_blocks {count} x {name}"] = partial(_copy, count, size)
        found[f"gather_blocks 64 x {name}"] = partial(_gather, 64, size, False)
        found[f"scatter_blocks 64 x {name}"] = partial(_gather, 64, size, True)
        found[f"swap out 64 x {name}"] = partial(_swap, 64, size, False)
        found[f"swap in 64 x {name}"] = partial(_swap, 64, size, True)
    return found


CASES = _cases()
