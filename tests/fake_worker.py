"""A worker without tensors whose next token depends on every slot it reaches through the block table.

Computing token t at position p stores (p, t) in its slot; a sampled token is a hash of the slots that the table leads
to. One lost, stale or misplaced block changes the next token. Slots keep what was written last. Every rule that a plan
must keep (scheduler/plan.py) is asserted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from quire.scheduler.plan import Admission, Fork, Logprobs, StepPlan, StepResult

VOCAB = 97
_MASK = (1 << 61) - 1
_UNIT = 1 << 20


def mix(value: int, position: int, token: int) -> int:
    return (value * 0x9E3779B97F4A7C15 + position * 1_000_003 + token + 1) & _MASK


def hash_of(tokens: Iterable[int]) -> int:
    value = 0
    for position, token in enumerate(tokens):
        value = mix(value, position, token)
    return value


def expected_output(prompt: list[int], seed: int, count: int) -> list[int]:
    """What a request must get, from its own tokens alone."""
    tokens, value = list(prompt), hash_of(prompt)
    for _ in range(count):
        tokens.append((value ^ seed) % VOCAB)
        value = mix(value, len(tokens) - 1, tokens[-1])
    return tokens[len(prompt) :]


def expected_candidates(tokens: list[int], k: int) -> list[tuple[int, float]]:
    """The k likeliest next tokens after these, best first, with their log-probabilities; at most VOCAB."""
    value = hash_of(tokens)
    return [_candidate(value, place) for place in range(k)]


def expected_logprob(tokens: list[int], token: int) -> float:
    """The log-probability of this token after those."""
    value = hash_of(tokens)
    return _candidate(value, _place(value, token))[1]


def _numbers(value: int) -> tuple[int, int]:
    """Likeliest token, and the step from each candidate to the next: VOCAB is prime, so that any but 0 meets all."""
    return value % VOCAB, 1 + (value >> 20) % (VOCAB - 1)


def _candidate(value: int, place: int) -> tuple[int, float]:
    assert 0 <= place < VOCAB
    first, step = _numbers(value)
    base, gap = (value >> 7) % _UNIT, (value >> 33) % _UNIT
    return (first + place * step) % VOCAB, -(0.05 + base / _UNIT + place * (0.05 + gap / _UNIT))


def _place(value: int, token: int) -> int:
    """Among all candidates."""
    first, step = _numbers(value)
    return (token - first) * pow(step, -1, VOCAB) % VOCAB


@dataclass
class _Row:
    tokens: list[int]
    computed: int
    blocks: list[int]
    seed: int
    num_prompt: int
    logprobs: int | None
    is_beam: bool
    """It takes the likeliest token; others take one by their seed."""

    def copy(self, seed: int) -> _Row:
        return replace(self, tokens=self.tokens.copy(), blocks=self.blocks.copy(), seed=seed)


@dataclass
class FakeWorker:
    """An `Executor`. Plans wait in a queue until they are collected: a pipeline of any depth."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_swap_blocks: int = 0
    plans: list[StepPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows: dict[int, _Row] = {}
        self.slots: list[tuple[int, int] | None] = [None] * (self.num_blocks * self.block_size)
        self.swap: dict[int, list[tuple[int, int] | None]] = {}
        self.num_copied = 0
        self._users = [0] * self.num_blocks
        """Rows whose tables name the block."""
        self._queue: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self._queue.append(plan)

    def collect(self) -> StepResult:
        return self.run(self._queue.popleft())

    def run(self, plan: StepPlan) -> StepResult:
        self._change_rows(plan)
        self._move_blocks(plan)
        counts = plan.num_tokens or (1,) * len(plan.rows)
        assert len(counts) == len(plan.rows) == len(set(plan.rows))
        assert sum(counts) <= self.max_num_batched_tokens and all(count > 0 for count in counts)
        assert counts or plan.swapped_out, "a step without work"
        for row, count in zip(plan.rows, counts, strict=True):
            self._compute(row, count)
        sampling = [row for row in plan.rows if self.rows[row].computed == len(self.rows[row].tokens)]
        for fork in plan.branched:
            assert fork.parent in sampling, f"row {fork.parent} branches but does not sample"
            self._copy_row(fork)
        sampling += [fork.child for fork in plan.branched]
        assert len(sampling) == plan.num_sampled
        drawn = [self._sample(row) for row in sampling]
        logprobs = {position: scores for position, (_, scores) in enumerate(drawn) if scores is not None}
        return StepResult(plan.step, tuple(token for token, _ in drawn), logprobs)

    # -- rows

    def _change_rows(self, plan: StepPlan) -> None:
        for row in plan.retired:
            self._use(self.rows.pop(row).blocks, -1)
        for admission in plan.admitted:
            self._admit(admission)
        admitted = {admission.row for admission in plan.admitted}
        children = {fork.child for fork in plan.forked}
        for fork in plan.forked:
            assert fork.parent not in admitted | children, f"row {fork.parent} is new in this step and forked"
            self._copy_row(fork)
        assert len({row for row, _ in plan.told}) == len(plan.told)
        for index, token in plan.told:
            row = self.rows[index]
            assert index not in admitted and len(row.tokens) == row.computed + 1 > row.num_prompt
            assert 0 <= token < VOCAB
            row.tokens[-1] = token
        assert len({(row, index) for row, index, _ in plan.replaced}) == len(plan.replaced)
        for index, entry, block in plan.replaced:
            table = self.rows[index].blocks
            assert 0 <= entry < len(table), f"row {index} has {len(table)} blocks; entry {entry} is replaced"
            self._use(table[entry : entry + 1], -1)
            table[entry] = block
            self._use([block], 1)
        for index, block in plan.extended:
            self.rows[index].blocks.append(block)
            self._use([block], 1)

    def _admit(self, admission: Admission) -> None:
        assert admission.row not in self.rows and 0 <= admission.row < self.max_num_seqs
        assert 0 <= admission.num_computed <= len(admission.token_ids)
        self.rows[admission.row] = _Row(
            list(admission.token_ids), admission.num_computed, list(admission.block_ids), admission.seed,
            admission.num_prompt_tokens, admission.logprobs, admission.params.beam_width is not None,
        )  # fmt: skip
        self._use(admission.block_ids, 1)

    def _copy_row(self, fork: Fork) -> None:
        assert fork.child not in self.rows and 0 <= fork.child < self.max_num_seqs, f"{fork}: the child is not empty"
        self.rows[fork.child] = self.rows[fork.parent].copy(fork.seed)
        self._use(self.rows[fork.child].blocks, 1)

    def _use(self, blocks: Iterable[int], change: int) -> None:
        for block in blocks:
            assert 0 <= block < self.num_blocks
            self._users[block] += change

    # -- blocks

    def _move_blocks(self, plan: StepPlan) -> None:
        slots_out = [slot for _, slot in plan.swapped_out]
        slots_in = [slot for slot, _ in plan.swapped_in]
        assert all(0 <= slot < self.num_swap_blocks for slot in slots_out + slots_in)
        assert not (slots_out and slots_in), "nobody comes back in the step in which somebody goes"
        assert len(set(slots_out)) == len(slots_out)
        assert len({block for _, block in plan.swapped_in}) == len(set(slots_in)) == len(slots_in)
        for block, slot in plan.swapped_out:
            self.swap[slot] = self.slots[self._range(block)]
        for slot, block in plan.swapped_in:
            assert slot in self.swap, f"slot {slot} holds nothing"
            self.slots[self._range(block)] = self.swap.pop(slot)
        sources, destinations = {pair[0] for pair in plan.copied}, {pair[1] for pair in plan.copied}
        assert len(destinations) == len(plan.copied) and sources.isdisjoint(destinations)
        for source, destination in plan.copied:
            self.slots[self._range(destination)] = self.slots[self._range(source)]
        self.num_copied += len(plan.copied)

    def _range(self, block: int) -> slice:
        assert 0 <= block < self.num_blocks
        return slice(block * self.block_size, (block + 1) * self.block_size)

    # -- computing

    def _compute(self, index: int, count: int) -> None:
        row = self.rows[index]
        assert row.computed + count <= len(row.tokens)
        for position in range(row.computed, row.computed + count):
            block = row.blocks[position // self.block_size]
            assert self._users[block] == 1 or self._is_read_only(index, position), (
                f"row {index} writes position {position} into block {block}, which {self._users[block]} rows share"
            )
            self.slots[self._slot(row, position)] = (position, row.tokens[position])
        row.computed += count

    def _is_read_only(self, index: int, position: int) -> bool:
        """Whether the others who use the row's block count this position as computed: they were admitted to a prefix
        that is computed in this very step, and everything is written before anything is read."""
        block = self.rows[index].blocks[position // self.block_size]
        others = [row for i, row in self.rows.items() if i != index and block in row.blocks]
        return all(row.computed > position for row in others)

    def _sample(self, index: int) -> tuple[int, Logprobs | None]:
        row = self.rows[index]
        value = 0
        for position in range(row.computed):
            stored = self.slots[self._slot(row, position)]
            assert stored is not None and stored[0] == position, f"row {index} reads {stored} at position {position}"
            value = mix(value, *stored)
        token = _candidate(value, 0)[0] if row.is_beam else (value ^ row.seed) % VOCAB
        row.tokens.append(token)
        if row.logprobs is None:
            return token, None
        place = _place(value, token)
        entries = [_candidate(value, place), *(_candidate(value, i) for i in range(row.logprobs))]
        ids, values = zip(*entries, strict=True)
        return token, Logprobs(ids, values, place + 1)

    def _slot(self, row: _Row, position: int) -> int:
        return row.blocks[position // self.block_size] * self.block_size + position % self.block_size
