"""However many steps run ahead, the offline API gives the same: tokens, texts, reasons and log-probabilities, with
everything that makes a step sent ahead compute for nothing, and results read as late as they may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from late_transfer import LateTransfer

from quire.cluster.llm import LLM, SamplingParams

TIGHT: dict[str, Any] = dict(
    device="cpu", max_model_len=96, block_size=8, max_num_seqs=5, max_num_batched_tokens=23, num_gpu_blocks_override=14
)
PROMPTS = ["Once upon a time", "Mia has the red key.", "The", "Tom and Mia went to the park and", "A dog", "One day"]
BASE = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PARAMS = [
    replace(BASE, stop=["the", "."]),  # ends by a cancellation
    replace(BASE, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=2),
    replace(BASE, temperature=1.2, seed=3, top_p=0.9, n=2, presence_penalty=0.4),
    replace(BASE, temperature=0.8, seed=4, stop_token_ids=list(range(30, 60)), min_tokens=4),
    replace(BASE, ignore_eos=False, max_tokens=45),
    replace(BASE, temperature=1.0, seed=5, logprobs=0, logit_bias={40: 3.0, 41: -100.0}),
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("quire.worker.runner.default_threads", lambda num_ranks: 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def serve(**settings: Any) -> tuple[list[Any], int, int]:
    """Two calls, what is said of each sample, preemptions, and steps."""
    said = []
    with LLM(**TIGHT | settings) as llm:
        for _ in range(2):
            for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False):
                said += [(s.text, s.token_ids, s.finish_reason, s.stop_reason, s.logprobs) for s in output.outputs]
            llm.scheduler.audit()
            pool = llm.scheduler.pool
            assert not llm.scheduler.has_work and pool.num_free == pool.num_blocks
        counters = llm.scheduler.counters
        return said, counters.num_preemptions, counters.num_steps


def test_depth_changes_nothing_that_a_user_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    want, preemptions, _ = serve()
    assert preemptions > 0 and {reason for _, _, reason, _, _ in want} == {"stop", "length"}
    monkeypatch.setattr("quire.worker.runner.transfer_for", lambda device: LateTransfer())
    for depth in (0, 1, 2, 4):
        said, preemptions, _ = serve(run_ahead=depth)
        assert said == want, f"run_ahead {depth}"
        assert preemptions > 0


def test_steps_do_run_ahead_when_told() -> None:
    depths = []

    def longest_queue(**settings: Any) -> int:
        with LLM(**TIGHT | settings) as llm:
            executor = llm._executor
            submit, most = executor.submit, [0]

            def noted(plan: Any) -> None:
                submit(plan)
                most[0] = max(most[0], len(executor._launched))

            executor.submit = noted  # type: ignore[method-assign]
            llm.generate("Once upon a time", BASE, use_tqdm=False)
        return most[0]

    depths = [longest_queue(), *(longest_queue(run_ahead=depth) for depth in (0, 1, 3))]
    assert depths == [1, 1, 2, 4]


def test_a_negative_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="--run-ahead must be 0, one step at a time, or more, not -1"):
        LLM(run_ahead=-1)
