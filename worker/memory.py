"""How many KV blocks fit on this rank.

In order: the number that was asked for; the bytes that were asked for; on a GPU what a worst-case step leaves of its
share of the memory; on a CPU a share of what is available. Invariant: a pool that cannot hold one sequence of the
greatest length is refused here, with the numbers and what to change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.worker.config import WorkerConfig
from quire.worker.host import CPU_SHARE, available_memory, cpu_pool_bytes


class PoolTooSmall(ValueError):
    """Not even one sequence of the greatest length would fit."""


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
        room, told = _gpu_room(config.gpu_memory_utilization, worst_step, graph_bytes)
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
    return blocks


def _gpu_room(utilization: float, worst_step: Callable[[], None], graph_bytes: Callable[[], int]) -> tuple[int, str]:
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
    room = int(total * utilization) - peak - graphs - others
    return room, (
        f"{max(room, 0)} bytes: gpu_memory_utilization {utilization} of {total}, less {peak} for weights and the "
        f"largest step, {graphs} for CUDA graphs and {others} held by others; raise gpu_memory_utilization, lower "
        "max_num_batched_tokens or max_num_seqs, or set enforce_eager"
    )
