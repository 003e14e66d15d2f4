"""How many KV blocks fit on this rank.

In order: the number that was asked for; the bytes that were asked for; on a GPU what a worst-case step leaves of its
share of the memory; on a CPU a share of what is available. Invariant: a pool that cannot hold one sequence of the
greatest length is refused here, and a swap space that the machine cannot hold, with the numbers and what to change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.worker.config import WorkerConfig
from quire.worker.host import CPU_SHARE, available_memory, cpu_pool_bytes
from quire.worker.swap import staging_bytes


class PoolTooSmall(ValueError):
    """Not even one sequence of the greatest length would fit."""


class SwapTooLarge(ValueError):
    """The machine does not have the memory."""


def count_blocks(
    config: WorkerConfig, bytes_per_block: int, worst_step: Callable[[], None], graph_bytes: Callable[[], int]
) -> int:
    """`worst_step` runs the largest step that can come, and `graph_bytes` says what recorded steps will take; both are
    called on a GPU only."""
    per_sequence = -(-config.max_model_len // config.block_size)
    if config.num_gpu_blocks_override is not None:
        blocks, source = config.num_gpu_blocks_override, "num_gpu_blocks_override; raise it"
    elif config.kv_cache_memory_bytes is not None:
        blocks = config.kv_cache_memory_bytes // bytes_per_block
        source = f"kv_cache_memory_bytes of {config.kv_cache_memory_bytes}; raise it"
    elif config.device == "cuda":
        staging = staging_bytes(bytes_per_block) if config.swap_space_bytes else 0
        room, told = _gpu_room(config.gpu_memory_utilization, worst_step, graph_bytes, staging)
        blocks, source = max(room, 0) // bytes_per_block, told
    else:
        room = cpu_pool_bytes(available_memory(), config.tensor_parallel_size)
        blocks = min(room // bytes_per_block, config.max_num_seqs * per_sequence)
        source = f"{room} bytes, {CPU_SHARE:.0%} of the available memory shared by the ranks; free some"
    if blocks < per_sequence:
        shorter = f", or lower max_model_len to at most {blocks * config.block_size}" if blocks else ""
        raise PoolTooSmall(
            f"{per_sequence} KV blocks of {bytes_per_block} bytes are needed for one sequence of max_model_len "
            f"{config.max_model_len}, but {blocks} fit into {source}{shorter}"
        )
    _check_swap_space(config, bytes_per_block, blocks)
    return blocks


def count_swap_blocks(config: WorkerConfig, bytes_per_block: int, num_blocks: int) -> int:
    """Slots of the swap space beside a pool of so many blocks."""
    return min(config.swap_space_bytes // bytes_per_block, num_blocks)


def _check_swap_space(config: WorkerConfig, bytes_per_block: int, num_blocks: int) -> None:
    swap = count_swap_blocks(config, bytes_per_block, num_blocks) * bytes_per_block
    if not swap:
        return
    pool = 0 if config.device == "cuda" else num_blocks * bytes_per_block
    room = available_memory() // config.tensor_parallel_size - pool
    if swap > room:
        raise SwapTooLarge(
            f"{swap} bytes of swap space for each of {config.tensor_parallel_size} ranks do not fit into the {room} "
            "bytes of memory that are left on this machine; lower --swap-space"
        )


def _gpu_room(
    utilization: float, worst_step: Callable[[], None], graph_bytes: Callable[[], int], staging: int
) -> tuple[int, str]:
    """Bytes for the pool, and where they come from."""
    graphs = graph_bytes()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    worst_step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    # What torch did not allocate itself: the context, collectives' buffers, other processes.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    room = int(total * utilization) - peak - graphs - staging - others
    return room, (
        f"{max(room, 0)} bytes: gpu_memory_utilization {utilization} of {total}, less {peak} for weights and the "
        f"largest step, {graphs} for CUDA graphs, {staging} to stage swaps and {others} held by others; raise "
        "gpu_memory_utilization, lower max_num_batched_tokens or max_num_seqs, or set enforce_eager"
    )
