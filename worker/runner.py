"""One rank's runtime: takes plans, launches their steps, reports the tokens.

Invariant: a step is a function of the plan and of what earlier plans left in rows and pool; every rank runs the same
steps in the same order and goes on with the tokens that rank 0 samples. On a GPU a launch waits for nothing: the next
step's may follow at once. Knows neither Ray nor gRPC.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from quire.kernels import kv_cache
from quire.protos import worker_pb2
from quire.worker import pages, programs
from quire.worker.config import WorkerConfig
from quire.worker.counts import TableSize
from quire.worker.graphs import BYTES_PER_GRAPH, padded_sizes, recorder_for
from quire.worker.host import usable_cores
from quire.worker.memory import count_blocks, count_swap_blocks
from quire.worker.models.decoder import Decoder
from quire.worker.models.spec import ModelSpec
from quire.worker.moves import BlockMover
from quire.worker.parallel import TensorParallel
from quire.worker.pool import BlockShape, KVPool
from quire.worker.speed import Speeds, measure_link, measure_prefill
from quire.worker.step import Launched, Model, Stepper
from quire.worker.swap import NoSwap, swap_for
from quire.worker.table import RowTable
from quire.worker.transfer import transfer_for
from quire.worker.weights import load_model

Progress = Callable[[int, int], None]
SCRATCH_BLOCKS = 8
"""Of rehearsals: their rows share these blocks, and read what they like."""

GREEDY = worker_pb2.Sampling(top_p=1, repetition_penalty=1)
COSTLIEST = worker_pb2.Sampling(temperature=1, top_p=0.9, repetition_penalty=1.1, logprobs=1)


Loader = Callable[[WorkerConfig, TensorParallel, Progress | None], Model]


def load_decoder(config: WorkerConfig, tp: TensorParallel, progress: Progress | None) -> Model:
    return load_model(config, ModelSpec.from_pretrained(config.model), tp, progress)


class Pending:
    """A step that has been launched."""

    def __init__(self, launched: Launched, line: int, report: worker_pb2.StepReport, launch_us: int) -> None:
        self.epoch, self.step = report.epoch, report.step
        self.line = line
        self.launch_us = launch_us
        """What the launch took on the host; on a CPU that is the step."""
        self._launched: Launched | None = launched
        self._report = report
        self._error: Exception | None = None
        self._waiting = threading.Lock()

    def wait(self) -> worker_pb2.StepReport:
        """Returns when the step is over, from whatever thread; raises what has become of it on the device."""
        with self._waiting:
            if self._launched is not None:
                try:
                    self._finish(self._launched)
                except Exception as error:
                    self._error = error
                self._launched = None
        if self._error is not None:
            raise self._error
        return self._report

    def _finish(self, launched: Launched) -> None:
        arrays = launched.arrival.wait()
        busy_us = launched.arrival.busy_us
        self._report.busy_us = self.launch_us if busy_us is None else busy_us
        if arrays:
            self._report.token_ids = arrays[0].astype("<i4", copy=False).tobytes()
        if launched.scores is not None:
            self._report.logprobs.extend(launched.scores.messages(arrays[1:]))


class Runner:
    """In this order: load, measure, allocate, warm_up, and then launches for ever. On several ranks every one of these
    is called on all of them."""

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
        if self._device.type == "cpu":
            pages.gather()
        self._block_shape = BlockShape(
            self.decoder.spec.num_layers,
            self.config.block_size,
            self.decoder.num_local_kv_heads,
            self.decoder.spec.head_dim,
            kv_cache.DTYPES[self.config.kv_cache_dtype or self.config.dtype],
        )

    def measure(self) -> int:
        """How many blocks fit here; the pool may have no more than the least of all ranks."""
        return count_blocks(self.config, self._block_shape.num_bytes, self._worst_step, self._graph_bytes)

    def allocate(self, num_blocks: int) -> None:
        """The pool, and the swap space, of which every rank has as many slots."""
        self.pool = KVPool(self._block_shape, num_blocks, self._device)
        self.table = RowTable(self._table_size(num_blocks), self._device)
        num_slots = 0
        if self.config.swap_space_bytes:
            num_slots = count_swap_blocks(self.config, self._block_shape.num_bytes, num_blocks)
            num_slots = self.tp.least(num_slots, self._device)
        self._mover = BlockMover(self.pool.tensor, swap_for(self.pool.tensor, num_slots))
        self._speeds = Speeds()
        self._stepper = self._stepper_over(self.table, self.pool, self._mover)
        self._lines = deque(range(self._stepper.num_lines))
        self._launched: deque[Pending] = deque()
        self._ahead = pages.Ahead(self.pool.tensor) if self._device.type == "cpu" else None

    def warm_up(self) -> None:
        """Computes prompts, then single tokens, of made-up sequences in a table and a pool of their own, records decode
        steps where they are replayed, and measures what preemption is decided by, where there is a choice."""
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
        recorder = recorder_for(config)
        if recorder is not None:
            self._stepper.record(recorder, self._graph_sizes)
        elif programs.are_used(config) and isinstance(self.decoder, Decoder):
            self._stepper.program()
        if self._mover.swap.num_slots:
            self._speeds = self._measure_speeds()
        if self._ahead is not None:
            self._ahead.reach(0)

    def launch(self, plan: worker_pb2.StepPlan) -> Pending:
        """Issues a step; on a CPU, computes it. Raises PlanError, before anything has changed, for a plan that does
        not fit the rows. Called from one thread."""
        started = time.perf_counter_ns()
        line = self._take_line()
        try:
            launched = self._stepper.launch(plan, line)
        except BaseException:
            self._lines.append(line)
            raise
        report = worker_pb2.StepReport(
            epoch=plan.epoch, incarnation=self.incarnation, step=plan.step, rank=self.config.rank
        )
        pending = Pending(launched, line, report, (time.perf_counter_ns() - started) // 1000)
        self._launched.append(pending)
        if self._ahead is not None:
            self._ahead.reach(self.table.num_blocks_seen * self._block_shape.num_bytes)
        return pending

    def run(self, plan: worker_pb2.StepPlan) -> worker_pb2.StepReport:
        """Launches a step and waits for its end."""
        return self.launch(plan).wait()

    def reset(self) -> None:
        """Empties all rows: what a new controller starts from."""
        self.table.clear()
        self._mover.clear()

    def _take_line(self) -> int:
        """Of the steps under way the oldest gives up its line when all are taken, whether or not somebody waits for
        it: its report stays with it."""
        if not self._lines:
            oldest = self._launched.popleft()
            oldest.wait()
            self._lines.append(oldest.line)
        return self._lines.popleft()

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
            num_swap_blocks=self._mover.swap.num_slots,
            link_bytes_per_s=self._speeds.link_bytes_per_s,
            prefill_tokens_per_s=self._speeds.prefill_tokens_per_s,
        )

    def _table_size(self, num_blocks: int) -> TableSize:
        return TableSize(
            num_rows=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            block_size=self.config.block_size,
            num_blocks=num_blocks,
            vocab_size=self.decoder.spec.vocab_size,
        )

    @property
    def _graph_sizes(self) -> list[int]:
        return padded_sizes(min(self.config.max_num_seqs, self.config.max_num_batched_tokens))

    def _graph_bytes(self) -> int:
        """What recordings will take: that of the largest step, made over a scratch pool and forgotten, measured, and an
        allowance for each of the others, which share its memory."""
        recorder = recorder_for(self.config)
        if recorder is None:
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
        stepper = self._scratch_stepper()
        stepper.record(recorder, self._graph_sizes[-1:])
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken = before - torch.cuda.mem_get_info()[0]
        del stepper, recorder
        torch.cuda.empty_cache()
        return max(0, taken) + BYTES_PER_GRAPH * (len(self._graph_sizes) - 1)

    def _scratch_stepper(self) -> Stepper:
        table = RowTable(self._table_size(SCRATCH_BLOCKS), self._device)
        pool = KVPool(self._block_shape, SCRATCH_BLOCKS, self._device)
        return self._stepper_over(table, pool, BlockMover(pool.tensor, NoSwap()))

    def _stepper_over(self, table: RowTable, pool: KVPool, mover: BlockMover) -> Stepper:
        transfer = transfer_for(self._device)
        return Stepper(table, pool, mover, self.decoder, self.tp, transfer, self.config.deterministic)

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

    def _measure_speeds(self) -> Speeds:
        config, stepper = self.config, self._scratch_stepper()

        def compute(num_tokens: int) -> None:
            self._rehearse([(num_tokens, 0)], GREEDY, num_decodes=0, stepper=stepper)

        most = min(config.max_num_batched_tokens, config.max_model_len)
        return Speeds(measure_link(self._mover, self.pool), measure_prefill(compute, most, self.tp, self._device))

    def _rehearse(
        self,
        sequences: Sequence[tuple[int, int]],
        sampling: worker_pb2.Sampling,
        num_decodes: int,
        stepper: Stepper | None = None,
    ) -> None:
        """Prompts, given by length and how much of it counts as computed, in one step; then steps of one token each."""
        stepper = stepper or self._scratch_stepper()
        stepper.table.clear()
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
        plans = [worker_pb2.StepPlan(admits=admits, rows=rows, num_tokens=num_tokens)]
        for plan in plans + [worker_pb2.StepPlan(rows=rows)] * num_decodes:
            stepper.launch(plan, line=0).arrival.wait()


def default_threads(num_ranks: int) -> int:
    """The cores that this process may use, divided by the ranks on the machine."""
    return max(1, usable_cores() // num_ranks)
