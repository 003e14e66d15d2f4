"""One rank's runtime: takes a plan, computes it, reports the tokens.

Invariant: a step is a function of the plan and of what earlier plans left in rows and pool; every rank runs the same
steps in the same order and goes on with the tokens that rank 0 samples. Knows neither Ray nor gRPC.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from quire.protos import worker_pb2
from quire.worker.batch import Batch, build_batch
from quire.worker.config import WorkerConfig
from quire.worker.host import usable_cores
from quire.worker.memory import count_blocks
from quire.worker.models.spec import ModelSpec
from quire.worker.parallel import TensorParallel
from quire.worker.pool import BlockShape, KVPool
from quire.worker.table import RowTable, TableSize, Work
from quire.worker.weights import load_model

Progress = Callable[[int, int], None]
SCRATCH_BLOCKS = 8
"""Of rehearsals: their rows share these blocks, and read what they like."""

KV_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
GREEDY = worker_pb2.Sampling(top_p=1, repetition_penalty=1)
NO_TOKENS = np.empty(0, np.int64)
COSTLIEST = worker_pb2.Sampling(temperature=1, top_p=0.9, repetition_penalty=1.1, logprobs=1)


class Structure(Protocol):
    """What of a model's structure the runtime needs."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Model(Protocol):
    """A decoder as the runtime sees it."""

    @property
    def spec(self) -> Structure: ...
    @property
    def num_local_kv_heads(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    def forward(self, batch: Batch, kv: torch.Tensor) -> torch.Tensor: ...
    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


Loader = Callable[[WorkerConfig, TensorParallel, Progress | None], Model]


def load_decoder(config: WorkerConfig, tp: TensorParallel, progress: Progress | None) -> Model:
    return load_model(config, ModelSpec.from_pretrained(config.model), tp, progress)


class Runner:
    """In this order: load, measure, allocate, warm_up, and then run for ever. On several ranks every one of these is
    called on all of them."""

    def __init__(self, config: WorkerConfig, tp: TensorParallel | None = None, loader: Loader = load_decoder) -> None:
        self.config = config
        self.tp = tp or TensorParallel.single()
        assert (self.tp.rank, self.tp.size) == (config.rank, config.tensor_parallel_size)
        self.incarnation = secrets.randbits(63)
        self._loader = loader
        self._device = torch.device(config.device)

    def load(self, progress: Progress | None = None) -> None:
        """The weights. `progress` is called with bytes done and bytes in all."""
        torch.set_num_threads(self.config.num_threads or default_threads(self.config.tensor_parallel_size))
        self.decoder = self._loader(self.config, self.tp, progress)
        self._block_shape = BlockShape(
            self.decoder.spec.num_layers,
            self.config.block_size,
            self.decoder.num_local_kv_heads,
            self.decoder.spec.head_dim,
            KV_DTYPES[self.config.kv_cache_dtype or self.config.dtype],
        )

    def measure(self) -> int:
        """How many blocks fit here; the pool may have no more than the least of all ranks."""
        return count_blocks(self.config, self._block_shape.num_bytes, self._worst_step)

    def allocate(self, num_blocks: int) -> None:
        self.pool = KVPool(self._block_shape, num_blocks, self._device)
        self.table = RowTable(self._table_size(num_blocks), self._device)

    def warm_up(self) -> None:
        """Computes prompts, then single tokens, of made-up sequences in a table and a pool of their own."""
        config = self.config
        longest = min(2 * config.block_size + 1, config.max_model_len - 1, config.max_num_batched_tokens)
        is_room = longest < config.max_num_batched_tokens and config.max_num_seqs > 1
        for sampling in (GREEDY, COSTLIEST):
            lengths = [longest, 1] if is_room else [longest]
            self._rehearse([(length, 0) for length in lengths], sampling, num_decodes=1)
        if self._device.type == "cuda":
            # Kernels are compiled at their first use: also those of contexts that are cut, and of prefixes that four
            # rows share, as all rows of a rehearsal share their blocks.
            longest = config.max_model_len
            self._rehearse([(longest, longest - 1)], GREEDY, num_decodes=0)
            self._rehearse([(min(longest, 512), min(longest, 512) - 1)] * min(4, config.max_num_seqs), GREEDY, 0)

    @torch.inference_mode()
    def run(self, plan: worker_pb2.StepPlan) -> worker_pb2.StepReport:
        """Raises PlanError, before anything has changed, for a plan that does not fit the rows."""
        started = time.perf_counter_ns()
        tokens, logprobs = self._step(self.table, self.pool, plan)
        report = worker_pb2.StepReport(
            epoch=plan.epoch, incarnation=self.incarnation, step=plan.step, rank=self.config.rank
        )
        if self.config.rank == 0:
            report.token_ids = tokens.astype("<i4").tobytes()
            report.logprobs.extend(logprobs)
        report.busy_us = (time.perf_counter_ns() - started) // 1000
        return report

    def reset(self) -> None:
        """Empties all rows: what a new controller starts from."""
        self.table.clear()

    def describe(self) -> worker_pb2.WorkerDescription:
        return worker_pb2.WorkerDescription(
            incarnation=self.incarnation,
            rank=self.config.rank,
            tensor_parallel_size=self.config.tensor_parallel_size,
            device=self.config.device,
            dtype=self.config.dtype,
            num_blocks=self.pool.num_blocks,
            block_size=self.config.block_size,
            bytes_per_block=self._block_shape.num_bytes,
            weight_bytes=self.decoder.weight_bytes,
        )

    def _step(
        self, table: RowTable, pool: KVPool, plan: worker_pb2.StepPlan
    ) -> tuple[np.ndarray, list[worker_pb2.RowLogprobs]]:
        """Tokens [S] on the host, and, on rank 0, log-probabilities of the rows that asked."""
        work = table.apply(plan)
        if not work.rows.size:
            return NO_TOKENS, []
        hidden = self.decoder.forward(build_batch(table, work, self.config.deterministic), pool.tensor)
        tokens, logprobs = self._sample(table, work, hidden)
        table.advance(work, tokens)
        # Every rank waits here: a report says that the step is over.
        return tokens.cpu().numpy(), logprobs

    def _sample(
        self, table: RowTable, work: Work, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, list[worker_pb2.RowLogprobs]]:
        rows = work.sampling_rows
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        logprobs: list[worker_pb2.RowLogprobs] = []
        if not rows.size:
            return tokens, logprobs
        logits = self.decoder.logits(hidden)
        if self.config.rank == 0:
            known = table.num_known[rows]
            tokens, logprobs = table.sampler.sample(logits, rows, table.num_prompt[rows], known, table.token_ids)
        return self.tp.broadcast(tokens), logprobs

    def _table_size(self, num_blocks: int) -> TableSize:
        return TableSize(
            num_rows=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            block_size=self.config.block_size,
            num_blocks=num_blocks,
            vocab_size=self.decoder.spec.vocab_size,
        )

    def _worst_step(self) -> None:
        """The steps that need the most memory, every row sampling in the costliest way: as many rows and tokens as a
        step can have; the last chunk of the longest prompt; and single tokens after contexts of all lengths."""
        config = self.config
        longest = config.max_model_len
        rows = min(config.max_num_seqs, config.max_num_batched_tokens)
        each, more = divmod(min(config.max_num_batched_tokens, rows * longest), rows)
        self._rehearse([(each + (i < more), 0) for i in range(rows)], COSTLIEST, num_decodes=0)
        self._rehearse([(longest, max(0, longest - config.max_num_batched_tokens))], COSTLIEST, num_decodes=0)
        lengths = [max(1, longest // (1 + i)) for i in range(rows)]
        self._rehearse([(length, length - 1) for length in lengths], COSTLIEST, num_decodes=0)

    @torch.inference_mode()
    def _rehearse(self, sequences: Sequence[tuple[int, int]], sampling: worker_pb2.Sampling, num_decodes: int) -> None:
        """Prompts, given by length and how much of it counts as computed, in one step; then steps of one token each."""
        table = RowTable(self._table_size(SCRATCH_BLOCKS), self._device)
        pool = KVPool(self._block_shape, SCRATCH_BLOCKS, self._device)
        admits = []
        for row, (length, num_computed) in enumerate(sequences):
            num_blocks = -(-(length + num_decodes) // self.config.block_size)
            admits.append(
                worker_pb2.Admit(
                    row=row,
                    token_ids=bytes(4 * length),
                    num_prompt_tokens=length,
                    num_computed_tokens=num_computed,
                    block_ids=(np.arange(num_blocks, dtype="<i4") % SCRATCH_BLOCKS).tobytes(),
                    sampling=sampling,
                )
            )
        rows = np.arange(len(sequences), dtype="<i4").tobytes()
        num_tokens = np.array([length - num_computed for length, num_computed in sequences], "<i4").tobytes()
        self._step(table, pool, worker_pb2.StepPlan(admits=admits, rows=rows, num_tokens=num_tokens))
        for _ in range(num_decodes):
            self._step(table, pool, worker_pb2.StepPlan(rows=rows))


def default_threads(num_ranks: int) -> int:
    """The cores that this process may use, divided by the ranks on the machine."""
    return max(1, usable_cores() // num_ranks)
