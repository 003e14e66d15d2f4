"""A server's load as a person reads it: who runs and waits, where every block is, what sharing and preemption did."""

from __future__ import annotations

from collections.abc import Iterator

from quire.cluster.sizes import bytes_text
from quire.protos import generation_pb2 as pb


def render(load: pb.Load) -> str:
    return "\n".join(_lines(load))


def _lines(load: pb.Load) -> Iterator[str]:
    yield f"{load.num_running} sequences run, {load.num_waiting} wait; {load.open_requests} requests are open"
    yield f"KV pool of {_blocks(load, load.blocks_total)} on each rank, {load.block_size} tokens a block:"
    yield _row("in tables", load, load.blocks_used)
    yield _row("  of reserved prefixes", load, load.blocks_reserved_prefix)
    yield _row("cached, evictable", load, load.blocks_cached)
    yield _row("free", load, load.blocks_free)
    used = load.blocks_used * load.block_size
    yield (
        f"  token slots in tables: {load.slots_filled:,} filled, {load.slots_reserved:,} reserved and empty"
        f" ({_share(load.slots_filled, used)} filled); {load.slots_shared:,} more without sharing"
    )
    if load.swap_blocks_total:
        whole = _blocks(load, load.swap_blocks_total)
        yield f"swap space of {whole}, of which {load.swap_blocks_used:,} blocks are used"
    yield (
        f"prefix cache: {load.prefix_hit_tokens:,} of {load.prefix_query_tokens:,} tokens found"
        f" ({_share(load.prefix_hit_tokens, load.prefix_query_tokens)})"
    )
    yield (
        f"preemptions: {load.num_swap_preemptions:,} by swap,"
        f" {load.num_preemptions - load.num_swap_preemptions:,} by recompute ({load.recomputed_tokens:,} tokens)"
    )
    yield (
        f"blocks moved: {load.copied_blocks:,} copied, {load.swapped_out_blocks:,} swapped out,"
        f" {load.swapped_in_blocks:,} in"
    )
    yield (
        f"since the start: {load.num_steps:,} steps, {load.prompt_tokens:,} prompt tokens,"
        f" {load.generation_tokens:,} generated; {load.num_finished:,} answers, {load.num_cancelled:,} cancelled"
    )


def _row(name: str, load: pb.Load, count: int) -> str:
    size = bytes_text(count * load.block_bytes)
    return f"  {name:<24}{count:>10,} blocks {size:>12}  {_share(count, load.blocks_total)}"


def _blocks(load: pb.Load, count: int) -> str:
    return f"{count:,} blocks, {bytes_text(count * load.block_bytes)}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
