"""What a step costs on a GPU: a roofline over what the step reads and multiplies, and constants for the rest.

    products    max(weight bytes / bandwidth, 2 x parameters x tokens / rate)
    attention   bytes of the KV that single tokens read / bandwidth + products of chunks with their context / rate
    moves       copied blocks over the memory, swapped ones over the host link
    ranks       two all-reduces per layer
    overhead    so much per step, and so much for each row

The numbers of GPUs are their data sheets', dense and for 16-bit types; what share of them kernels reach is a constant
of the model, see `CostModel`. No number here was fitted to this project's own kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. Speeds in bytes or operations per second."""

    name: str
    memory_bytes: int
    bandwidth: float
    flops: float
    link: float
    """To the host, one way, as copies of megabytes reach it."""
    peers: float
    """To the other GPUs of its machine, one way."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40 * GIB, 1.555e12, 312e12, 24e9, 300e9),
        Gpu("a100-80gb", 80 * GIB, 2.039e12, 312e12, 24e9, 300e9),
        Gpu("h100", 80 * GIB, 3.35e12, 989e12, 52e9, 450e9),
        Gpu("h200", 141 * 10**9, 4.8e12, 989e12, 52e9, 450e9),
    )
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder in a 16-bit type."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    max_model_len: int
    gated: bool = True
    """The MLP has a gate, as Llama's; OPT's has none."""
    tied: bool = False
    """The head is the embedding."""
    learned_positions: int = 0

    @property
    def linear_params(self) -> int:
        """Of the products of all layers and of the head: what a step reads and multiplies."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = self.hidden * self.mlp * (3 if self.gated else 2)
        return self.layers * (attention + mlp) + self.vocab * self.hidden

    @property
    def weight_bytes(self) -> int:
        embeddings = (0 if self.tied else self.vocab) + self.learned_positions
        return 2 * (self.linear_params + embeddings * self.hidden)

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


def _opt(name: str, layers: int, hidden: int, heads: int) -> Shape:
    return Shape(
        name, layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50272, 2048,
        gated=False, tied=True, learned_positions=2050,
    )  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        _opt("opt-13b", 40, 5120, 40),
        _opt("opt-66b", 64, 9216, 72),
        _opt("opt-175b", 96, 12288, 96),
        Shape("llama-13b", 40, 5120, 40, 40, 128, 13824, 32000, 2048),
        Shape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, 131072),
        Shape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256, 131072),
    )
}


class Overhead(NamedTuple):
    """Seconds in which the GPU waits for the host."""

    per_step: float
    per_row: float


GRAPHS = Overhead(0.5e-3, 0.0)
"""Plans made ahead and decode steps replayed from graphs: what is left are gaps between kernels. An assumption."""

PYTHON_2023 = Overhead(6.5e-3, 0.3e-3)
"""The paper's engine, fitted by Little's law to two of its numbers: 30.42 requests in the batch while about 1.9
ShareGPT requests per second were served, and 132.44 at 30 Alpaca requests per second (its Figures 12a and 13)."""


class Work(NamedTuple):
    """What a step does."""

    rows: int
    tokens: int
    """All tokens computed."""
    read: int
    """Context tokens whose KV is read by rows that compute one token, summed over these rows."""
    pairs: int = 0
    """(token, context token) pairs of the chunks of more than one token."""
    copied: int = 0
    """Blocks copied inside the pool."""
    swapped: int = 0
    """Blocks moved to or from the host."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a step of one model on `num_gpus` of one kind, which share it by tensor parallelism."""

    gpu: Gpu
    shape: Shape
    num_gpus: int = 1
    block_size: int = 16
    overhead: Overhead = GRAPHS
    bandwidth_share: float = 0.85
    """Of the data sheet's bandwidth that kernels reach. Public decode kernels: 0.7 to 0.9 of it."""
    flops_share: float = 0.65
    """Of the data sheet's rate that large products reach. Public figures: 0.6 to 0.8."""
    gather_tokens: float = 2.0
    """Attention over blocks of B tokens reads B / (B + this) of what it could: each block costs a look at the table and
    the start of a new range. 2 gives the paper's 20 to 26 % at short contexts the right order at B = 16."""
    reduce_latency: float = 10e-6
    """Seconds of an all-reduce of nothing."""
    copy_latency: float = 8e-6
    """Seconds that starting one copy over the host link takes."""
    copies_per_block: int = 1
    """Copies that moving a block over the host link takes: one here, where a block is one range of memory; two for each
    layer where every layer has a pool for keys and one for values, as in the paper's engine."""

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"the number of GPUs must be at least 1, not {self.num_gpus}")

    @property
    def block_bytes(self) -> int:
        """Of all ranks together."""
        return self.block_size * self.shape.kv_bytes

    @property
    def bandwidth(self) -> float:
        return self.gpu.bandwidth * self.bandwidth_share * self.num_gpus

    @property
    def flops(self) -> float:
        return self.gpu.flops * self.flops_share * self.num_gpus

    def seconds(self, work: Work) -> float:
        shape = self.shape
        products = max(2 * shape.linear_params / self.bandwidth, 2 * shape.linear_params * work.tokens / self.flops)
        attention = (
            work.read * shape.kv_bytes / (self.bandwidth * self.block_size / (self.block_size + self.gather_tokens))
            + 4 * shape.layers * shape.heads * shape.head_dim * work.pairs / self.flops
        )
        seconds = products + attention + self.overhead.per_step + self.overhead.per_row * work.rows
        if self.num_gpus > 1:
            seconds += self._reduce(work.tokens)
        if work.copied:
            seconds += 2 * work.copied * self.block_bytes / self.bandwidth
        if work.swapped:
            seconds += self.swap_seconds(work.swapped)
        return seconds

    def _reduce(self, tokens: int) -> float:
        """A ring: every rank sends and receives 2 (n - 1) / n of what there is, twice per layer."""
        share = 2 * (self.num_gpus - 1) / self.num_gpus
        bytes_ = share * 2 * tokens * self.shape.hidden
        return 2 * self.shape.layers * (self.reduce_latency + bytes_ / (self.gpu.peers * self.bandwidth_share))

    def swap_seconds(self, num_blocks: int) -> float:
        """To move so many blocks one way; every rank moves its share of each."""
        return num_blocks * (
            self.copies_per_block * self.copy_latency + self.block_bytes / self.num_gpus / self.gpu.link
        )

    def prefill_seconds(self, num_tokens: int) -> float:
        """To compute so many tokens of one prompt, alone."""
        return self.seconds(Work(1, num_tokens, 0, num_tokens * (num_tokens + 1) // 2))

    def pool_tokens(self, memory_share: float = 0.9, activation_bytes: int = 2 * GIB) -> int:
        """Token slots that fit beside the weights; 0 or less where the weights do not fit."""
        room = self.num_gpus * (self.gpu.memory_bytes * memory_share - activation_bytes) - self.shape.weight_bytes
        return int(room // self.shape.kv_bytes)


class PaperSetup(NamedTuple):
    """A row of the paper's Table 1."""

    shape: Shape
    gpu: Gpu
    num_gpus: int
    kv_bytes: int
    """Memory for keys and values, bytes."""
    slots: int
    """As the paper states them, rounded to hundreds."""


PAPER_SETUPS = {
    "opt-13b": PaperSetup(SHAPES["opt-13b"], GPUS["a100-40gb"], 1, 12 * GIB, 15_700),
    "opt-66b": PaperSetup(SHAPES["opt-66b"], GPUS["a100-40gb"], 4, 21 * GIB, 9_700),
    "opt-175b": PaperSetup(SHAPES["opt-175b"], GPUS["a100-80gb"], 8, 264 * GIB, 60_100),
}
