"""What one worker needs to know to start. Standard library only, so that anything above may import it.

Everything "auto" has been resolved before this value exists; a worker never guesses.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Settings of one rank. Equal on all ranks but for `rank`."""

    model: str
    """Folder with config.json and safetensors."""

    device: str = "cpu"
    """"cpu" or "cuda"; on a GPU the process sees exactly one device."""

    dtype: str = "float32"
    """Weights and activations: "float32", "float16" or "bfloat16"."""

    kv_cache_dtype: str | None = None
    """Keys and values as they are stored; None: as `dtype`; "fp8": e4m3, half the memory of a 16-bit type."""

    load_format: str = "auto"
    """"auto" reads safetensors, "dummy" draws random-normal weights (equal for every tensor-parallel size)."""

    rank: int = 0
    tensor_parallel_size: int = 1

    block_size: int = 16
    """Tokens per KV block."""

    max_model_len: int = 2048
    """Longest sequence, prompt and output together, in tokens."""

    max_num_seqs: int = 256
    """Rows of the persistent table: sequences that can run at once."""

    max_num_batched_tokens: int = 2048
    """Tokens of the largest step."""

    gpu_memory_utilization: float = 0.9
    """Share of the device's memory that weights, activations and KV cache may take together (CUDA only)."""

    kv_cache_memory_bytes: int | None = None
    """Bytes of this rank's KV pool; None: measured by a worst-case step on a GPU, a share of free memory on a CPU."""

    num_gpu_blocks_override: int | None = None
    """Exact number of KV blocks; wins over every other way of sizing the pool."""

    swap_space_bytes: int = 0
    """Bytes of host memory to which blocks of this rank's pool can be moved; never more than the pool's are used."""

    deterministic: bool = False
    """A row's numbers depend neither on the rows beside it nor on how its tokens were cut into steps nor on threads."""

    enforce_eager: bool = False
    """Decode steps are launched kernel by kernel; none is recorded and replayed."""

    num_threads: int | None = None
    """Compute threads of this rank on a CPU; None: the machine's cores divided by the ranks on it."""

    seed: int = 0
    """Seed of dummy weights."""
