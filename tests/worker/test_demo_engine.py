"""The bundled model as a test of attention: it recalls facts from its prompt while the block tables are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire.cluster.llm import LLM, SamplingParams
from quire.cluster.local import LocalExecutor
from quire.scheduler.plan import StepPlan, StepResult
from quire.worker.demo import stories

FOLDER = Path(stories.__file__).resolve().parent
BLOCK_SIZE = 16
DISTANCE = 80
"""Tokens between fact and question: more than a step computes, so that the fact lies in the pool when it is read."""
BOUND = 0.9
MISLED_BOUND = 0.5
"""Chance is at most a third."""
ANSWER_TOKENS = 8


@pytest.fixture(scope="module")
def examples() -> list[stories.Example]:
    return stories.held_out_recall(24, seed=21, distance=DISTANCE)


@pytest.fixture(scope="module")
def prompts(examples: list[stories.Example]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return [tokenizer.encode(example.prompt) for example in examples]


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setattr("quire.worker.runner.default_threads", lambda num_ranks: 1)
    with LLM(
        device="cpu", block_size=BLOCK_SIZE, max_model_len=400, max_num_seqs=8, max_num_batched_tokens=64,
        num_gpu_blocks_override=29,
    ) as llm:  # fmt: skip
        yield llm


def _answers(llm: LLM, prompts: Sequence[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.scheduler.audit()
    return [output.outputs[0].token_ids for output in outputs]


def _accuracy(llm: LLM, examples: Sequence[stories.Example], answers: Sequence[list[int]]) -> float:
    assert llm.tokenizer is not None
    texts = [llm.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    right = sum(text.startswith(example.answer) for text, example in zip(texts, examples, strict=True))
    return right / len(examples)


@torch.no_grad()
def test_it_recalls_what_transformers_recalls(
    llm: LLM, examples: list[stories.Example], prompts: list[list[int]]
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    answers = _answers(llm, prompts)
    assert llm.scheduler.counters.num_preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=ANSWER_TOKENS)
        assert answer == out[0, len(prompt) :].tolist()
    assert _accuracy(llm, examples, answers) >= BOUND


@dataclass
class Misleading:
    """An `Executor` that gives each sequence, once its fact is written, another block in the place of the fact's."""

    executor: LocalExecutor
    facts: dict[tuple[int, ...], range]
    """The tokens in which a prompt's fact stands."""
    blocks_off: int
    exchanged: int = 0
    _waiting: dict[int, range] = field(default_factory=dict)

    def submit(self, plan: StepPlan) -> None:
        self._waiting = {row: fact for row, fact in self._waiting.items() if row not in plan.retired}
        table = self.executor._runner.table
        for row, fact in list(self._waiting.items()):
            if table.counts.num_computed[row] >= fact.stop:
                columns = range(fact.start // BLOCK_SIZE, (fact.stop - 1) // BLOCK_SIZE + 1)
                table.block_table[row, list(columns)] += self.blocks_off
                table.block_table[row] %= self.executor.num_blocks
                self.exchanged += 1
                del self._waiting[row]
        for admission in plan.admitted:
            self._waiting[admission.row] = self.facts[admission.token_ids[: admission.num_prompt_tokens]]
        self.executor.submit(plan)

    def collect(self) -> StepResult:
        return self.executor.collect()


@pytest.mark.parametrize("blocks_off", [0, 1, 17])
def test_with_a_wrong_block_it_can_only_guess(
    blocks_off: int, llm: LLM, examples: list[stories.Example], prompts: list[list[int]]
) -> None:
    facts = {
        tuple(prompt): _tokens_of(llm, prompt, example.fact) for prompt, example in zip(prompts, examples, strict=True)
    }
    misleading = Misleading(llm._executor, facts, blocks_off)
    llm._engine.executor = misleading
    llm._executor._runner.pool.tensor.zero_()  # a block that nobody has written yet may be among the wrong ones
    accuracy = _accuracy(llm, examples, _answers(llm, prompts))
    assert misleading.exchanged >= len(prompts)
    assert accuracy >= BOUND if blocks_off == 0 else accuracy <= MISLED_BOUND


def _tokens_of(llm: LLM, prompt: list[int], fact: str) -> range:
    """Where the fact's tokens are."""
    assert llm.tokenizer is not None
    for stop in range(1, len(prompt) + 1):
        if fact in llm.tokenizer.decode(prompt[:stop]):
            start = max(start for start in range(stop) if fact in llm.tokenizer.decode(prompt[start:stop]))
            assert start < stop <= len(prompt) - 64
            return range(start, stop)
    raise AssertionError(f"{fact!r} is not in the prompt")
