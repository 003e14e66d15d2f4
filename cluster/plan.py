"""Will it fit? Bytes by cause on one rank, and what they leave for the KV cache, before any weight is loaded.

`make_plan` is a pure function of a resolved engine and the memory of a device; `render` writes its answer for people.
Weights and KV cache are exact, from the same tables that loading uses. Activations are estimated: on a GPU the worker
measures a worst-case step when it starts, and that measurement decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from quire.cluster.config import ResolvedEngine
from quire.cluster.sizes import bytes_text
from quire.worker.host import CPU_SHARE, cpu_pool_bytes, packs_bfloat16
from quire.worker.models.checkpoint import DTYPE_BYTES, bytes_by_group, kv_head_share
from quire.worker.models.spec import ModelError

_UTILIZATION = 0.95
"""The highest share of a device's memory that is ever advised."""

_LOGITS_BYTES = 16
"""Per row and token of the vocabulary: float32 logits, a sorted copy of them and its 64-bit indices."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Of the rank with the most to hold."""

    engine: ResolvedEngine
    weights: tuple[tuple[str, int], ...]
    """Bytes by group of tensors."""
    activations: int
    """Bytes of the largest step between two layers, estimated."""
    sampling: int
    """Bytes for choosing the next tokens of all sequences, estimated."""
    kv_bytes_per_token: int
    budget: int | None
    """Bytes that all of it may take together; ranks on a CPU share what is available. None where memory was not told.
    """
    num_blocks: int | None
    """Of the KV pool; None where its size was not told and cannot be derived. At least 0."""
    advice: tuple[str, ...] = ()
    """What to change when it does not fit; each alone is enough."""

    @property
    def weight_bytes(self) -> int:
        return sum(size for _, size in self.weights)

    @property
    def bytes_per_block(self) -> int:
        return self.kv_bytes_per_token * self.engine.block_size

    @property
    def blocks_per_sequence(self) -> int:
        """For one sequence of max_model_len."""
        return -(-self.engine.max_model_len // self.engine.block_size)

    @property
    def pool_bytes(self) -> int | None:
        return None if self.num_blocks is None else self.num_blocks * self.bytes_per_block

    @property
    def swap_bytes(self) -> int | None:
        """Host memory for what is preempted: never more than the pool."""
        return None if self.pool_bytes is None else min(self.engine.swap_space_bytes, self.pool_bytes)

    @property
    def capacity_tokens(self) -> int | None:
        return None if self.num_blocks is None else self.num_blocks * self.engine.block_size

    @property
    def max_concurrency(self) -> int | None:
        """Sequences of max_model_len that fit at once."""
        if self.num_blocks is None:
            return None
        return min(self.num_blocks // self.blocks_per_sequence, self.engine.max_num_seqs)

    @property
    def required_bytes(self) -> int:
        """The least with which one sequence of max_model_len can be served."""
        return self._without_pool() + self.blocks_per_sequence * self.bytes_per_block

    @property
    def fits(self) -> bool | None:
        """None: not to be said without the memory's size."""
        if self.num_blocks is None:
            return None
        pool = self.num_blocks * self.bytes_per_block
        if self.engine.device == "cpu":
            pool += self.swap_bytes or 0  # it is the same memory
        in_budget = self.budget is None or self._without_pool() + pool <= self.budget
        return in_budget and self.num_blocks >= self.blocks_per_sequence

    def _without_pool(self) -> int:
        return self.weight_bytes + self.activations + self.sampling


def make_plan(engine: ResolvedEngine, memory: int | None = None, host_memory: int | None = None) -> Plan:
    """`memory`: bytes of one GPU, of which gpu_memory_utilization may be used. `host_memory`: what is available on this
    machine, which ranks on a CPU share."""
    memory = host_memory if engine.device == "cpu" else memory
    plan = _measure(engine, memory)
    return replace(plan, advice=tuple(_advice(plan, memory))) if plan.fits is False else plan


def _measure(engine: ResolvedEngine, memory: int | None) -> Plan:
    spec, size = engine.spec, engine.tensor_parallel_size
    packed = engine.device == "cpu" and engine.dtype == "bfloat16" and packs_bfloat16()
    by_rank = [bytes_by_group(spec, engine.dtype, rank, size, packed) for rank in range(size)]
    most = max(by_rank, key=lambda groups: sum(groups.values()))
    start, stop = kv_head_share(spec.num_kv_heads, 0, size)
    per_token = spec.num_layers * 2 * (stop - start) * spec.head_dim * DTYPE_BYTES[engine.kv_cache_dtype]
    plan = Plan(
        engine=engine,
        weights=tuple((group.value, bytes_) for group, bytes_ in most.items()),
        activations=_activations(engine),
        sampling=engine.max_num_seqs * spec.vocab_size * _LOGITS_BYTES,
        kv_bytes_per_token=per_token,
        budget=None if memory is None else _budget(engine, memory),
        num_blocks=None,
    )
    return replace(plan, num_blocks=_num_blocks(plan))


def _budget(engine: ResolvedEngine, memory: int) -> int:
    if engine.device == "cpu":
        return memory // engine.tensor_parallel_size
    return int(memory * engine.gpu_memory_utilization)


def _num_blocks(plan: Plan) -> int | None:
    engine = plan.engine
    if engine.num_gpu_blocks_override is not None:
        return engine.num_gpu_blocks_override
    if engine.kv_cache_memory_bytes is not None:
        return engine.kv_cache_memory_bytes // plan.bytes_per_block
    if plan.budget is None:
        return None
    if engine.device == "cpu":
        # As a worker chooses: a share of what its weights leave, no more than its rows can use.
        room = cpu_pool_bytes(max(plan.budget - plan.weight_bytes, 0), 1)
        return min(room // plan.bytes_per_block, engine.max_num_seqs * plan.blocks_per_sequence)
    left = plan.budget - plan.weight_bytes - plan.activations - plan.sampling
    return max(left, 0) // plan.bytes_per_block


def _activations(engine: ResolvedEngine) -> int:
    """The wider half of a layer: what enters it (twice: the residual, normed), what is between, and what leaves it."""
    spec, size = engine.spec, engine.tensor_parallel_size
    start, stop = kv_head_share(spec.num_kv_heads, 0, size)
    heads = spec.num_heads // size
    attention = (heads + 2 * (stop - start) + heads) * spec.head_dim
    mlp = -(-spec.intermediate_size // size) * (3 if spec.gated else 2)
    width = 3 * spec.hidden_size + max(attention, mlp)
    return engine.max_num_batched_tokens * width * DTYPE_BYTES[engine.dtype]


# -- what to change


def _advice(plan: Plan, memory: int | None) -> Iterator[str]:
    engine = plan.engine
    capacity = plan.capacity_tokens or 0
    shorter = replace(engine, max_model_len=capacity)
    if capacity >= 2 and _measure(shorter, memory).fits:
        yield f"lower --max-model-len to {capacity}"
    tokens = engine.max_num_batched_tokens // 2
    while tokens >= max(engine.max_num_seqs, engine.block_size):
        if _measure(replace(engine, max_num_batched_tokens=tokens), memory).fits:
            yield f"lower --max-num-batched-tokens to {tokens}"
            break
        tokens //= 2
    # Ranks on a CPU share one memory: more of them do not help.
    for size in range(engine.tensor_parallel_size + 1, engine.spec.num_heads + 1) if engine.device != "cpu" else ():
        if _can_cut(engine, size) and _measure(replace(engine, tensor_parallel_size=size), memory).fits:
            yield f"raise --tensor-parallel-size to {size}"
            break
    if memory is not None and engine.device != "cpu" and engine.gpu_memory_utilization < _UTILIZATION:
        fuller = replace(engine, gpu_memory_utilization=_UTILIZATION)
        if _measure(fuller, memory).fits:
            yield f"raise --gpu-memory-utilization to {_UTILIZATION}"
    yield from _more_memory(plan)


def _more_memory(plan: Plan) -> Iterator[str]:
    engine = plan.engine
    if engine.kv_cache_memory_bytes is not None and (plan.num_blocks or 0) < plan.blocks_per_sequence:
        yield f"raise --kv-cache-memory-bytes to {plan.blocks_per_sequence * plan.bytes_per_block}"
    if plan.budget is not None and engine.device == "cpu":
        yield f"make {bytes_text(_needed_on_cpu(plan) * engine.tensor_parallel_size)} of memory available"
    elif plan.budget is not None:
        needed = -(-plan.required_bytes // engine.gpu_memory_utilization)
        yield f"take devices of at least {bytes_text(int(needed))}"


def _needed_on_cpu(plan: Plan) -> int:
    """By one rank, for one sequence of max_model_len."""
    if plan.engine.kv_cache_memory_bytes is not None or plan.engine.num_gpu_blocks_override is not None:
        blocks = max(plan.num_blocks or 0, plan.blocks_per_sequence)
        pool = blocks * plan.bytes_per_block
        return plan.weight_bytes + plan.activations + plan.sampling + pool + min(plan.engine.swap_space_bytes, pool)
    others, swap = plan.activations + plan.sampling, plan.engine.swap_space_bytes
    # What the pool leaves holds the rest, and a swap space as large as it was given or as large as the pool.
    beside = min((others + swap) / (1 - CPU_SHARE), others / (1 - 2 * CPU_SHARE))
    with_pool = plan.blocks_per_sequence * plan.bytes_per_block / CPU_SHARE
    return plan.weight_bytes + int(max(with_pool, beside)) + 1


def _can_cut(engine: ResolvedEngine, size: int) -> bool:
    try:
        engine.spec.check_parallel(size)
    except ModelError:
        return False
    return True


# -- for people


def render(plan: Plan) -> str:
    engine = plan.engine
    lines = [
        f"{engine.model_name}: {engine.spec.architecture}, {engine.dtype}, on each of"
        f" {engine.tensor_parallel_size} {engine.device} rank(s):",
        *(_row(f"weights, {group}", size) for group, size in plan.weights if size),
        _row("weights, together", plan.weight_bytes),
        _row("activations (estimate)", plan.activations, f"steps of {engine.max_num_batched_tokens:,} tokens"),
        _row("sampling (estimate)", plan.sampling, f"{engine.max_num_seqs:,} sequences"),
        _row("KV cache per token", plan.kv_bytes_per_token),
        *_pool_rows(plan),
    ]
    if plan.advice:
        lines += ["It does not fit. Any one of these helps:", *(f"  {advice}" for advice in plan.advice)]
    return "\n".join(lines)


def _pool_rows(plan: Plan) -> Iterator[str]:
    length = f"max_model_len {plan.engine.max_model_len:,}"
    if plan.num_blocks is None or plan.pool_bytes is None:
        yield _row("least memory", plan.required_bytes, f"one sequence of {length}")
        yield "  The KV pool's size is measured at start; --gpu-memory tells it before."
        return
    blocks = f"{plan.num_blocks:,} blocks of {plan.engine.block_size} = {plan.capacity_tokens:,} tokens"
    yield _row("KV pool", plan.pool_bytes, blocks)
    if plan.swap_bytes:
        yield _row("swap space (host)", plan.swap_bytes, "for what is preempted")
    if plan.budget is not None:
        yield _row("may be used", plan.budget)
    yield f"  {plan.max_concurrency:,} request(s) of {length} fit at once."


def _row(name: str, size: int, remark: str = "") -> str:
    return f"  {name:<24}{bytes_text(size):>12}  {remark}".rstrip()
