"""The scheduler's twin, written to be read: every step looks at every running sequence, and nothing is kept ready.

Takes the same requests and results, and must make the same decisions: who is admitted, who is preempted, who gets which
block, who computes how many tokens, and how everybody ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.plan import StepPlan
from quire.scheduler.request import Request
from quire.scheduler.sequence import FinishReason


@dataclass(eq=False)
class NaiveSequence:
    request: Request
    index: int
    tokens: list[int]
    num_computed: int = 0
    num_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    row: int = -1
    is_over: bool = False


@dataclass
class Decisions:
    """What of a plan is decided; rows with their tokens in any order."""

    retired: list[int]
    admitted: list[tuple[int, tuple[int, ...], tuple[int, ...]]]
    """Row, tokens and blocks."""
    extended: list[tuple[int, int]]
    computed: dict[int, int]

    @classmethod
    def of(cls, plan: StepPlan) -> Decisions:
        counts = plan.num_tokens or (1,) * len(plan.rows)
        return cls(
            list(plan.retired),
            [(a.row, a.token_ids, a.block_ids) for a in plan.admitted],
            list(plan.extended),
            dict(zip(plan.rows, counts, strict=True)),
        )


class NaiveScheduler:
    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.free_blocks = list(range(config.num_blocks))
        """The first is the next to be taken."""
        self.free_rows = list(range(config.max_num_seqs))
        self.waiting: list[NaiveSequence] = []
        self.running: list[NaiveSequence] = []
        self.retired: list[int] = []
        self.in_flight: deque[dict[int, NaiveSequence]] = deque()
        """For each plan, by row, the sequences that sampled."""

    def add(self, request: Request) -> None:
        for index in range(request.params.n):
            tokens = list(request.prompt_token_ids)
            self.waiting.append(NaiveSequence(request, index, tokens, num_tokens=len(tokens)))

    def cancel(self, name: str, index: int) -> None:
        for sequence in (*self.running, *self.waiting):
            if (sequence.request.request_id, sequence.index) == (name, index):
                self._end(sequence)

    def schedule(self) -> Decisions | None:
        spare = min(self.config.max_num_batched_tokens - len(self.running), self._most_of_prompts())
        plan, sampled, preempted = Decisions([], [], [], {}), {}, False
        for sequence in list(self.running):
            if sequence not in self.running or sequence.num_computed == sequence.request.max_len - 1:
                continue
            while sequence in self.running and sequence.num_computed == len(sequence.blocks) * self.config.block_size:
                if self.free_blocks:
                    sequence.blocks.append(self.free_blocks.pop(0))
                    plan.extended.append((sequence.row, sequence.blocks[-1]))
                else:
                    preempted = True
                    self._preempt(self.running[-1])
            if sequence in self.running:
                count = min(sequence.num_tokens - sequence.num_computed, spare + 1)
                spare -= count - 1
                self._grant(sequence, count, plan, sampled)
        while self.waiting and self.free_rows and spare > 0 and not preempted:
            sequence = self.waiting[0]
            needed = -(-sequence.num_tokens // self.config.block_size)
            keep = self.config.watermark_blocks if self.running else 0
            if sequence.num_tokens > len(sequence.tokens) or len(self.free_blocks) - needed < keep:
                break
            self.running.append(self.waiting.pop(0))
            sequence.row = self.free_rows.pop(0)
            sequence.blocks = [self.free_blocks.pop(0) for _ in range(needed)]
            plan.admitted.append((sequence.row, tuple(sequence.tokens), tuple(sequence.blocks)))
            count = min(sequence.num_tokens, spare)
            spare -= count
            self._grant(sequence, count, plan, sampled)
        if not plan.computed:
            return None
        plan.retired, self.retired = self.retired, []
        self.in_flight.append(sampled)
        return plan

    def _most_of_prompts(self) -> int:
        gaps = [s.num_tokens - s.num_computed for s in self.running if s.num_computed < s.request.max_len - 1]
        num_decodes = gaps.count(1)
        if not self.config.prefill_floor or not num_decodes:
            return self.config.max_num_batched_tokens
        backlog = sum(gap for gap in gaps if gap > 1) + sum(s.num_tokens for s in self.waiting)
        return max(self.config.prefill_floor, 8 * num_decodes, backlog // 8)

    def _grant(self, sequence: NaiveSequence, count: int, plan: Decisions, sampled: dict[int, NaiveSequence]) -> None:
        plan.computed[sequence.row] = count
        sequence.num_computed += count
        if sequence.num_computed == sequence.num_tokens:
            sequence.num_tokens += 1
            sampled[sequence.row] = sequence

    def apply(self, tokens: dict[int, int]) -> dict[tuple[str, int], tuple[int, FinishReason | None]]:
        """Takes tokens by row; returns token and end by request and sample."""
        events = {}
        for row, sequence in self.in_flight.popleft().items():
            if sequence.is_over:
                continue
            token = tokens[row]
            sequence.tokens.append(token)
            reason = None
            if token < 0:
                reason = FinishReason.ERROR
            elif token in sequence.request.stop_token_ids:
                reason = FinishReason.STOP
            elif len(sequence.tokens) == sequence.request.max_len:
                reason = FinishReason.LENGTH
            events[sequence.request.request_id, sequence.index] = token, reason
            if reason is not None:
                self._end(sequence)
        return events

    def _preempt(self, sequence: NaiveSequence) -> None:
        self._take_back(sequence)
        sequence.num_computed = 0
        self.waiting.insert(0, sequence)

    def _end(self, sequence: NaiveSequence) -> None:
        sequence.is_over = True
        if sequence in self.running:
            self._take_back(sequence)
        else:
            self.waiting.remove(sequence)

    def _take_back(self, sequence: NaiveSequence) -> None:
        self.running.remove(sequence)
        self.free_blocks[:0] = sequence.blocks
        self.free_rows.insert(0, sequence.row)
        self.retired.append(sequence.row)
        sequence.blocks, sequence.row = [], -1
