"""The paper's examples of what its KV manager does (arXiv 2309.06180, figures 6 to 10), with the numbers as drawn.

Blocks of four tokens, and words for tokens. The free list begins in the order in which a figure takes its blocks. The
worker stores what it computes and reads all of it before it samples; what it samples is the test's choice.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

import pytest
from fake_worker import FakeWorker
from schedulers import make_request, make_scheduler

from quire.scheduler.plan import Logprobs, StepEvents, StepPlan
from quire.scheduler.sequence import Sequence

Choice = str | dict[str, float]
"""The word that a row samples; or, for a beam, what may follow with its log-probability, best first."""

PROMPT = "Four score and seven years ago our"


class ScriptedWorker(FakeWorker):
    """Reads what the tables lead to, and then says what it was told to."""

    script: list[tuple[int, dict[int, float]]]

    def _sample(self, index: int) -> tuple[int, Logprobs | None]:
        super()._sample(index)
        token, scores = self.script.pop(0)
        self.rows[index].tokens[-1] = token
        if not scores:
            return token, None
        return token, Logprobs((token, *scores), (scores[token], *scores.values()), 1)


class Stage:
    """A scheduler and a worker whose pool hands out its blocks in the given order, then in ascending order."""

    def __init__(self, *order: int, num_blocks: int = 16) -> None:
        self.scheduler = make_scheduler(num_blocks=num_blocks)
        limits = self.scheduler.config
        self.pool = self.scheduler.pool
        self.worker = ScriptedWorker(num_blocks, 4, limits.max_num_seqs, limits.max_num_batched_tokens)
        self._ids: dict[str, int] = {}
        self.arrange(*order)

    def arrange(self, *order: int) -> None:
        """These free blocks are taken next."""
        free = [self.pool.allocate() for _ in range(self.pool.num_free)]
        for block in reversed([*order, *sorted(set(free) - set(order))]):
            self.pool.release(block)

    def ids(self, text: str) -> list[int]:
        return [self._ids.setdefault(word, len(self._ids)) for word in text.split()]

    def text(self, tokens: Several[int]) -> str:
        words = list(self._ids)
        return " ".join(words[token] for token in tokens)

    def add(self, name: str, prompt: str, **params: object) -> None:
        self.scheduler.add(make_request(name, self.ids(prompt), **params))

    def plan(self, *choices: Choice) -> tuple[StepPlan, StepEvents]:
        """One step, in which the rows that sample get these words, in their order."""
        plan = self.scheduler.schedule()
        assert plan is not None
        self.scheduler.audit()
        self.worker.script = [self._scripted(choice) for choice in choices]
        result = self.worker.run(plan)
        assert not self.worker.script
        events = self.scheduler.apply(result)
        self.scheduler.audit()
        return plan, events

    def step(self, *choices: Choice) -> StepPlan:
        return self.plan(*choices)[0]

    def _scripted(self, choice: Choice) -> tuple[int, dict[int, float]]:
        if isinstance(choice, str):
            return self.ids(choice)[0], {}
        scores = {self.ids(word)[0]: score for word, score in choice.items()}
        return next(iter(scores)), scores

    def tables(self) -> list[list[int]]:
        """Of the running sequences: samples in the order of their indices, beams in that of their scores."""
        return [list(sequence.block_ids) for sequence in self._running()]

    def outputs(self) -> list[str]:
        return [self.text(s.token_ids[s.num_prompt_tokens :]) for s in self._running()]

    def _running(self) -> list[Sequence]:
        return [s for group in self.scheduler.state.running.groups for s in group.sequences if s.row >= 0]

    def content(self) -> dict[int, str]:
        """What the worker holds in the blocks of the running sequences."""
        held: dict[int, list[int]] = {}
        for sequence in self._running():
            for index, block in enumerate(sequence.block_ids):
                filled = min(4, max(0, sequence.num_computed - 4 * index))
                slots = self.worker.slots[4 * block : 4 * block + filled]
                tokens = [stored[1] for stored in slots if stored is not None]
                held[block] = max(held.get(block, []), tokens, key=len)
        return {block: self.text(tokens) for block, tokens in held.items()}

    def counts(self, *blocks: int) -> list[int]:
        return [self.pool.ref_count(block) for block in blocks]


def test_figure_6_block_table_translation() -> None:
    stage = Stage(7, 1, 3)
    stage.add("A", PROMPT)
    plan = stage.step("fathers")  # 1: the prompt
    assert plan.admitted[0].block_ids == (7, 1) and plan.num_tokens == (7,)
    assert stage.content() == {7: "Four score and seven", 1: "years ago our"}
    memory = stage.scheduler.memory()
    assert (memory.blocks_used, memory.slots_filled, memory.slots_reserved) == (2, 7, 1)

    plan = stage.step("brought")  # 2: the slot that is left
    assert plan.extended == () and stage.tables() == [[7, 1]]
    assert stage.content() == {7: "Four score and seven", 1: "years ago our fathers"}

    plan = stage.step("forth")  # 3: a new block, when the last is full
    assert plan.extended == ((0, 3),) and stage.tables() == [[7, 1, 3]]
    assert stage.content() == {7: "Four score and seven", 1: "years ago our fathers", 3: "brought"}
    memory = stage.scheduler.memory()
    assert (memory.blocks_used, memory.slots_filled, memory.slots_reserved) == (3, 9, 3)


def test_figure_7_two_requests_at_the_same_time() -> None:
    stage = Stage(7, 1, 5, 2, 3)
    stage.add("A", PROMPT)
    stage.add("B", "It was the best of times")
    plan = stage.step("fathers", "it")
    assert [admission.block_ids for admission in plan.admitted] == [(7, 1), (5, 2)]
    assert plan.num_tokens == (7, 6)  # both prompts in one step
    stage.step("brought", "was")
    plan = stage.step("forth", "the")
    assert plan.extended == ((0, 3),)
    assert stage.tables() == [[7, 1, 3], [5, 2]]
    assert stage.content() == {
        7: "Four score and seven",
        1: "years ago our fathers",
        3: "brought",
        5: "It was the best",
        2: "of times it was",
    }
    assert stage.scheduler.memory().slots_shared == 0


def test_figure_8_parallel_sampling() -> None:
    stage = Stage(7, 1, 3)
    stage.add("A", PROMPT, n=2)
    plan = stage.step("fathers", "mothers")
    assert [(fork.parent, fork.child) for fork in plan.branched] == [(0, 1)]
    assert stage.tables() == [[7, 1], [7, 1]] and stage.counts(7, 1) == [2, 2]
    assert stage.content() == {7: "Four score and seven", 1: "years ago our"}
    assert stage.scheduler.memory().slots_shared == 7

    # Sample A1 writes first, and gets a copy; then nobody else refers to block 1, and A2 writes into it.
    plan = stage.step("brought", "taught")
    assert plan.copied == ((1, 3),) and plan.replaced == ((0, 1, 3),)
    assert stage.tables() == [[7, 3], [7, 1]] and stage.counts(7, 1, 3) == [2, 1, 1]
    assert stage.content() == {7: "Four score and seven", 3: "years ago our fathers", 1: "years ago our mothers"}
    memory = stage.scheduler.memory()
    assert (memory.blocks_used, memory.slots_filled, memory.slots_shared) == (3, 12, 4)

    plan = stage.step("forth", "us")
    assert plan.copied == () and stage.tables() == [[7, 3, 0], [7, 1, 2]]


def likely(score: float, *words: str) -> Choice:
    """About as likely as each other, the first a little more; and nothing else that anybody would go on with."""
    chosen = {word: score - place / 100 for place, word in enumerate(words)}
    return {**chosen, **{f"({place})": -50.0 - place for place in range(4 - len(words))}}


@pytest.mark.parametrize("taken", [(9, 10, 11, 12), (2, 4, 8, 5)], ids=["as drawn", "what was freed is taken first"])
def test_figure_9_beam_search(taken: tuple[int, ...]) -> None:
    stage = Stage(0, 1, 2, 6, 3, 5, 4, 7, 8, num_blocks=32)
    stage.add("A", "p0 p1 p2 p3", beam_width=4, max_tokens=20)
    stage.step(likely(-1, "x4", "y4", "u4", "v4"))
    for position in (5, 6, 7):
        stage.step(*[likely(0, f"{beam}{position}") for beam in "xyuv"])
    # The second block is full. Two of its four versions go on: one with three beams.
    stage.step(likely(0, "a8", "b8", "c8"), likely(-1, "d8"), likely(-9, "u8"), likely(-9, "v8"))
    for position in (9, 10, 11):
        stage.step(*[likely(0, f"{beam}{position}") for beam in "abcd"])
    # And so it is with the third.
    stage.step(likely(0, "a12", "b12", "c12"), likely(-9, "e12"), likely(-9, "f12"), likely(-1, "d12"))
    for position in (13, 14, 15):
        stage.step(*[likely(0, f"{beam}{position}") for beam in "abcd"])
    assert stage.tables() == [[0, 1, 3, 5], [0, 1, 3, 6], [0, 1, 3, 7], [0, 2, 4, 8]]
    assert stage.counts(0, 1, 3, 5, 6, 7, 2, 4, 8) == [4, 3, 3, 1, 1, 1, 1, 1, 1]
    assert stage.scheduler.counters.copied_blocks == 0

    # The dotted line: all that go on come from the candidates 1 and 2.
    stage.step(likely(-9, "a16"), likely(-1, "b16", "B16"), likely(-2, "c16", "C16"), likely(-9, "d16"))
    assert stage.counts(2, 4, 5, 8) == [0, 0, 0, 0] and set(stage.pool.free_blocks()[:4]) == {2, 4, 5, 8}
    assert stage.counts(0, 1, 3, 6, 7) == [4, 4, 4, 2, 2]
    if taken[0] == 9:
        stage.arrange(*taken)
    plan = stage.step(*[likely(0, f"{beam}17") for beam in "bBcC"])
    assert tuple(block for _, block in plan.extended) == taken and plan.copied == ()
    assert stage.tables() == [[0, 1, 3, last, new] for last, new in zip((6, 6, 7, 7), taken, strict=True)]
    words = {block: word for block, word in stage.content().items() if block in taken}
    assert words == dict(zip(taken, ("b16", "B16", "c16", "C16"), strict=True))
    memory = stage.scheduler.memory()
    assert (memory.blocks_used, memory.slots_filled, memory.slots_shared) == (9, 24, 44)


def test_figure_9_what_beams_copy_is_one_block() -> None:
    """Where the paths part within a block, that block is copied once less than there are beams."""
    stage = Stage(0, 1, 2, 3)
    stage.add("A", PROMPT, beam_width=2, max_tokens=8)
    stage.step(likely(-1, "fathers", "mothers"))
    assert stage.tables() == [[0, 1], [0, 1]] and stage.counts(0, 1) == [2, 2]
    plan = stage.step(likely(-1, "brought", "taught"), likely(-9, "gave"))
    assert plan.copied == ((1, 2),) and plan.replaced == ((0, 1, 2),)
    assert stage.tables() == [[0, 2], [0, 2]] and stage.counts(0, 1, 2) == [2, 0, 2]
    plan = stage.step(likely(-1, "forth"), likely(-1, "us"))
    assert plan.copied == () and stage.tables() == [[0, 2, 1], [0, 2, 3]]  # block 2 is full: nobody writes to it
    assert stage.content() == {
        0: "Four score and seven",
        2: "years ago our fathers",
        1: "brought",
        3: "taught",
    }


def test_figure_10_shared_prefix() -> None:
    stage = Stage(num_blocks=32)
    prefix = "Translate English to French: sea otter => loutre de mer"
    stage.scheduler.reserve_prefix("translation", stage.ids(prefix))
    plan, events = stage.plan("peppermint")
    assert plan.num_tokens == (10,) and not events
    assert stage.counts(0, 1, 2) == [1, 1, 1] and not stage.scheduler.has_work

    stage.add("A", prefix + " cheese =>", max_tokens=2)
    stage.add("B", prefix + " I love you =>", max_tokens=4)
    plan = stage.step("fromage", "Je")
    assert plan.num_tokens == (2, 4)  # the prefix is not computed again
    assert stage.tables() == [[0, 1, 3], [0, 1, 4, 5]] and stage.counts(0, 1, 2) == [3, 3, 1]
    assert plan.copied == ((2, 3), (2, 4))  # the last block is partly filled
    assert stage.content() == {
        0: "Translate English to French:",
        1: "sea otter => loutre",
        3: "de mer cheese =>",
        4: "de mer I love",
        5: "you =>",
    }
    memory = stage.scheduler.memory()
    assert (memory.blocks_used, memory.blocks_reserved_prefix, memory.slots_shared) == (6, 3, 16)
    stage.step("<end>", "t'aime")
    stage.step("!")
    stage.step("<end>")
    assert not stage.scheduler.has_work and stage.counts(0, 1, 2) == [1, 1, 1]  # never evicted
    assert stage.scheduler.memory().blocks_used == 3

    stage.scheduler.release_prefix("translation")
    stage.scheduler.audit()
    assert stage.scheduler.memory().blocks_used == 0
