"""The systems that the paper compares itself with: pools in which a sequence's KV is one contiguous run.

Orca schedules by iteration and reserves slots for all that a request may produce when it is admitted; who knows how
much that will be makes its three variants. FasterTransformer runs batches from their first step to their last. Both
get memory from a buddy allocator (PagedAttention paper, section 6.1), and neither shares any.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import replace

from quire.scheduler.blocks import AuditError, BlockPool
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.groups import Group
from quire.scheduler.params import InvalidRequest
from quire.scheduler.plan import Admission, StepEvents, StepPlan, StepResult
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import FinishReason, Sequence
from quire.scheduler.simulation.buddy import Buddy
from quire.scheduler.stats import Counters, MemoryUse
from quire.scheduler.tables import BlockTables


class Reserve(enum.Enum):
    """How many output slots are kept for a request."""

    ORACLE = "oracle"
    """As many as it will fill."""
    POW2 = "pow2"
    """The next power of two."""
    MAX = "max"
    """What the model's context leaves."""

    def slots(self, request: Request, max_model_len: int) -> int:
        """Of prompt and output together."""
        prompt = len(request.prompt_token_ids)
        output = request.max_len - prompt
        if self is Reserve.POW2:
            return min(prompt + (1 << (output - 1).bit_length()), max_model_len)
        return max_model_len if self is Reserve.MAX else prompt + output


class RunPool(BlockPool):
    """A pool whose blocks are taken and given back in runs."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.buddy = Buddy(num_blocks)

    def allocate_run(self, num_blocks: int) -> range:
        run = self.buddy.allocate(num_blocks)
        self.num_free = self.buddy.num_free
        return run

    def free_run(self, start: int) -> None:
        self.buddy.free(start)
        self.num_free = self.buddy.num_free

    def allocate(self) -> int:
        raise AuditError("a contiguous table never grows: all that it may need was kept for it")

    def ref_count(self, block: int) -> int:  # noqa: ARG002
        """Nothing is shared."""
        return 1


class ContiguousTables(BlockTables):
    """Each table is one run of blocks, kept from admission to end."""

    pool: RunPool

    def __init__(self, num_blocks: int, block_size: int, reserve: Reserve, max_model_len: int) -> None:
        super().__init__(RunPool(num_blocks), block_size)
        self.num_needed = 0
        """Slots that the sequences will have filled when they end."""
        self.num_kept = 0
        """Slots that are kept for them; blocks lost to rounding not counted."""
        self._reserve = reserve
        self._max_model_len = max_model_len

    def slots_for(self, request: Request) -> int:
        return self._reserve.slots(request, self._max_model_len)

    def has_run_for(self, request: Request) -> bool:
        return self.pool.buddy.fits(self.blocks_for(self.slots_for(request)))

    def needed_to_begin(self, sequences: list[Sequence], found: list[int], shares: list[int] | None) -> int:  # noqa: ARG002
        """Where no run is long enough: more than there are."""
        return 0 if self.has_run_for(sequences[0].request) else self.pool.num_blocks + 1

    def reserve(self, sequence: Sequence) -> None:
        """The caller has asked `has_run_for`."""
        slots = self.slots_for(sequence.request)
        run = self.pool.allocate_run(self.blocks_for(slots))
        sequence.block_ids.extend(run)
        sequence.capacity = len(run) * self.block_size
        self.num_entries += len(run)
        self.num_needed += sequence.max_computed
        self.num_kept += slots

    def free(self, sequence: Sequence) -> None:
        if not sequence.block_ids:
            return
        self.pool.free_run(sequence.block_ids[0])
        self.num_entries -= len(sequence.block_ids)
        self.num_computed -= sequence.num_computed
        self.num_needed -= sequence.max_computed
        self.num_kept -= self.slots_for(sequence.request)
        sequence.block_ids.clear()
        sequence.capacity = 0

    def audit(self, sequences: list[Sequence], kept: list[int]) -> None:
        """Raises AuditError unless runs and tables agree."""
        self.pool.buddy.audit()
        entries = [block for sequence in sequences for block in sequence.block_ids]
        if kept or len(set(entries)) != len(entries) or self.pool.num_free + len(entries) != self.pool.num_blocks:
            raise AuditError(f"{len(entries)} entries and {self.pool.num_free} free blocks do not make up the pool")
        if self.num_needed != sum(s.max_computed for s in sequences if s.block_ids) or self.num_kept < self.num_needed:
            raise AuditError(f"{self.num_needed} slots needed and {self.num_kept} kept do not add up")


class Orca(Scheduler):
    """The shipped scheduler over contiguous tables. Nobody is ever preempted: a request is let in when a run for all of
    it is free. One sequence per request."""

    def __init__(self, config: SchedulerConfig, reserve: Reserve) -> None:
        """Nothing is left free for those who run, who have all that they need, and nothing is found again."""
        config = replace(config, watermark=0.0, enable_prefix_caching=False)
        tables = ContiguousTables(config.num_blocks, config.block_size, reserve, config.max_model_len)
        super().__init__(config, tables=tables)

    def add(self, request: Request) -> None:
        if request.params.num_sequences > 1:
            raise InvalidRequest("n", "a contiguous pool shares nothing; send a request for each sample")
        super().add(request)


class FasterTransformer:
    """Batch-level scheduling: the earliest requests form a batch, as many as there is room for were all as long as can
    be; their prompts are padded to the longest, and all are answered when the longest answer is complete."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.tables = ContiguousTables(config.num_blocks, config.block_size, Reserve.MAX, config.max_model_len)
        self.counters = Counters()
        self.waiting: deque[Sequence] = deque()
        self.batch: list[Sequence] = []
        self._num_arrived = 0
        self._step = 0
        self._begin = 0
        """The first step of the batch."""
        self._retired: tuple[int, ...] = ()

    def add(self, request: Request) -> None:
        self.waiting.append(Sequence(Group(request, self._num_arrived), 0, self._num_arrived))
        self._num_arrived += 1

    def schedule(self) -> StepPlan | None:
        if self.batch:
            return self._plan((), ())
        while self.waiting and len(self.batch) < self.config.max_num_seqs:
            if not self.tables.has_run_for(self.waiting[0].request):
                break
            sequence = self.waiting.popleft()
            self.tables.reserve(sequence)
            sequence.row = len(self.batch)
            self.batch.append(sequence)
        if not self.batch:
            return None
        longest = max(sequence.num_prompt_tokens for sequence in self.batch)
        self._begin = self._step
        return self._plan(tuple(_admission(s, longest) for s in self.batch), (longest,) * len(self.batch))

    def _plan(self, admitted: tuple[Admission, ...], num_tokens: tuple[int, ...]) -> StepPlan:
        self._step += 1
        rows = tuple(range(len(self.batch)))
        plan = StepPlan(self._step, self._retired, admitted, (), rows, num_tokens, len(rows))
        self._retired = ()
        self.counters.count_plan(plan)
        return plan

    def apply(self, result: StepResult) -> StepEvents:
        """Nothing until the last step of the batch, then the end of everybody."""
        if self._step - self._begin < max(s.request.max_len - s.num_prompt_tokens for s in self.batch):
            return StepEvents()
        ended, self.batch = tuple(self.batch), []
        for sequence in ended:
            self.tables.free(sequence)
        self._retired = tuple(sequence.row for sequence in ended)
        return StepEvents(ended, result.token_ids, dict.fromkeys(range(len(ended)), FinishReason.LENGTH))

    def slots_kept_for_preempted(self) -> int:
        """Nobody is preempted."""
        return 0

    def memory(self) -> MemoryUse:
        pool, size = self.tables.pool, self.config.block_size
        used = pool.num_blocks - pool.num_free
        steps = self._step - self._begin
        filled = sum(min(s.num_prompt_tokens + steps - 1, s.max_computed) for s in self.batch)
        return MemoryUse(pool.num_blocks, pool.num_free, 0, used, 0, filled, used * size - filled, 0, 0, 0)


def _admission(sequence: Sequence, prompt_tokens: int) -> Admission:
    request = sequence.request
    return Admission(
        row=sequence.row,
        token_ids=(0,) * prompt_tokens,
        num_prompt_tokens=prompt_tokens,
        num_computed=0,
        block_ids=tuple(sequence.block_ids),
        params=request.params,
        seed=request.seed,
        stop_token_ids=request.stop_token_ids,
    )
