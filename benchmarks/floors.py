"""The least time that a step or a workload can take on a machine: bytes at the bandwidth, products at the best rate.

    W   = bytes of all layers' products and of the head        embeddings are looked up, not read
    kv  = bytes of one token's keys and values
    decode step of B rows with contexts c:    max(W / BW, 2 B params / F) + sum(c) kv / BW
    prompt of S tokens:                       (2 S linear params + 2 layers heads dim S^2 + head) / F

Launches, norms and sampling count as nothing, so no engine reaches it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import ceilings, shapes
from benchmarks.workloads import Job

READ_BYTES = 512 << 20
PRODUCT_ROWS, PRODUCT_SIZE = (256, 1024), 2048
SECONDS = 1.5
"""For each of a CPU's ceilings."""


@dataclass(frozen=True, slots=True)
class Machine:
    bandwidth: float
    """Bytes per second, read."""
    flops: float
    """Per second, in the model's type."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model's steps are made of."""

    linear_params: int
    """Of all layers."""
    head_params: int
    weight_bytes: int
    """Of both."""
    kv_bytes: int
    """Of one token's keys and values."""
    attention_size: int
    """Layers x heads x dimension."""

    @classmethod
    def of(cls, model: str, element_bytes: int = 2, kv_element_bytes: int | None = None) -> Cost:
        """`model`: the name of a shape, or a folder."""
        sizes = shapes.sizes(model)
        linear = sizes.layers * sum(prod(shape) for shape in shapes.linears(model).values())
        head = sizes.vocab * sizes.hidden
        kv = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * (kv_element_bytes or element_bytes)
        attention = sizes.layers * sizes.heads * sizes.head_dim
        return cls(linear, head, (linear + head) * element_bytes, kv, attention)

    def decode(self, machine: Machine, rows: int, context_tokens: int) -> float:
        """Seconds of a step of one token for each row; `context_tokens` is the sum over the rows."""
        products = 2 * rows * (self.linear_params + self.head_params) / machine.flops
        return max(self.weight_bytes / machine.bandwidth, products) + context_tokens * self.kv_bytes / machine.bandwidth

    def prefill(self, machine: Machine, tokens: int) -> float:
        """Seconds of a prompt's products, among others that keep the weights coming."""
        attention = 2 * self.attention_size * tokens**2
        return (2 * tokens * self.linear_params + 2 * self.head_params + attention) / machine.flops

    def workload(self, machine: Machine, jobs: Sequence[Job], max_num_seqs: int) -> float:
        """Seconds, where as many sequences as may run at once, in order, and memory for all of them."""
        waiting = deque(job for job in jobs for _ in range(job.n))
        left: list[int] = []
        contexts: list[int] = []
        seconds = 0.0
        while waiting or left:
            while waiting and len(left) < max_num_seqs:
                job = waiting.popleft()
                seconds += self.prefill(machine, len(job.prompt))
                if job.output_tokens > 1:
                    left.append(job.output_tokens - 1)
                    contexts.append(len(job.prompt) + 1)
            if not left:
                continue
            steps = min(left)  # in which nobody ends
            for step in range(steps):
                seconds += self.decode(machine, len(left), sum(contexts) + step * len(left))
            contexts = [context + steps for context, rest in zip(contexts, left, strict=True) if rest > steps]
            left = [rest - steps for rest in left if rest > steps]
        return seconds


def measure(device: torch.device, dtype: str) -> Machine:
    """Of this machine, now. `dtype`: the name of a torch type. On a GPU in a process of its own. Raises RuntimeError
    where it cannot be measured."""
    if device.type == "cuda":
        return from_ceilings(ceilings.separately(device, short=True), dtype)
    return Machine(cpu_bandwidth(), cpu_products(getattr(torch, dtype)))


def from_ceilings(found: dict[str, Any], dtype: str) -> Machine:
    """`found`: what benchmarks.ceilings measured."""
    if "read" not in found["bandwidth"] or not found["products"]:
        raise RuntimeError(f"the GPU's ceilings could not be measured: {found.get('failure', 'nothing came')}")
    return Machine(found["bandwidth"]["read"], ceilings.best_product(found, dtype))


def cpu_bandwidth() -> float:
    """Bytes per second, read by all of torch's threads: by a sum, and in a copy, of which both sides count."""
    x = torch.randn(READ_BYTES // 4)
    y = torch.empty_like(x)
    return max(READ_BYTES / _best(partial(torch.sum, x)), 2 * READ_BYTES / _best(partial(y.copy_, x)))


def cpu_products(dtype: torch.dtype) -> float:
    """Operations per second of a square product of random numbers."""
    weight = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE).to(dtype)
    best = 0.0
    for rows in PRODUCT_ROWS:
        x = torch.randn(rows, PRODUCT_SIZE).to(dtype)
        best = max(best, 2 * rows * PRODUCT_SIZE**2 / _best(partial(F.linear, x, weight)))
    return best


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of many calls: a ceiling is what can be reached."""
    best, end = float("inf"), time.perf_counter() + SECONDS
    call()
    while time.perf_counter() < end:
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


def describe(machine: Machine) -> str:
    return f"reads {machine.bandwidth / 1e9:,.1f} GB/s, products {machine.flops / 1e12:,.2f} TFLOP/s"
