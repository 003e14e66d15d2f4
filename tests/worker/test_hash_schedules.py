"""Two thousand random lives of an engine on the real runner, with a KV-sensitive model, all plans over the wire."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hash_model import VOCAB_SIZE, expected_tokens, load_hash_decoder
from wire_executor import WireExecutor

from quire.protos import worker_pb2
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.engine import Engine
from quire.scheduler.params import SamplingParams
from quire.scheduler.request import ModelLimits, Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import FinishReason
from quire.worker.config import WorkerConfig
from quire.worker.graphs import padded_sizes
from quire.worker.runner import Runner

LIVES = 2000
LIVES_PER_RUNNER = 25


@dataclass
class Sample:
    """What a sequence must become, and what has come of it."""

    expected: list[int]
    stops: frozenset[int]
    received: list[int] = field(default_factory=list)
    end: FinishReason | None = None
    is_cancelled: bool = False

    def check(self) -> None:
        assert self.received == self.expected[: len(self.received)]
        if not self.is_cancelled:
            stopped = self.received[-1] in self.stops
            assert self.end is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            assert stopped or len(self.received) == len(self.expected)


@pytest.mark.parametrize("part", range(4))
def test_every_token_is_right_whatever_the_schedule(part: int) -> None:
    lives = preemptions = 0
    for number in range(part, LIVES // LIVES_PER_RUNNER, 4):
        runner = _random_runner(random.Random(number))
        # What an earlier life wrote stays in the pool: a stale slot may look right but for its token.
        for life in range(LIVES_PER_RUNNER):
            preemptions += _live(random.Random(1000 * number + life), runner)
            lives += 1
    assert lives == LIVES // 4
    assert preemptions > 200  # the pools are small enough to matter


def _random_runner(rng: random.Random) -> Runner:
    block_size, max_num_seqs = rng.choice([1, 2, 4, 8]), rng.randint(1, 6)
    max_model_len = rng.randint(8, 24)
    least = -(-max_model_len // block_size)
    config = WorkerConfig(
        model="",
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.randint(0, 12),
        num_gpu_blocks_override=least + rng.randint(0, least),
        num_threads=1,
    )
    runner = Runner(config, loader=load_hash_decoder)
    runner.load()
    runner.allocate(runner.measure())
    runner.pool.tensor.zero_()  # an empty slot is no position
    return runner


def _live(rng: random.Random, runner: Runner) -> int:
    """From the first request to the last; returns the number of preemptions."""
    runner.reset()
    config = runner.config
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=runner.pool.num_blocks,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            watermark=rng.choice([0.0, 0.1]),
        )
    )
    engine = Engine(scheduler, WireExecutor(runner), run_ahead=rng.choice([0, 1, 2, 4]))
    samples: dict[tuple[str, int], Sample] = {}
    requests = _requests(rng, config.max_model_len)
    upcoming = next(requests, None)
    for _ in range(1000):
        while upcoming and rng.random() < 0.4:
            scheduler.add(upcoming)
            samples.update(_samples(upcoming))
            upcoming = next(requests, None)
        if samples and rng.random() < 0.03:
            key = rng.choice(list(samples))
            samples[key].is_cancelled |= scheduler.cancel(*key)
        for event in engine.step():
            sample = samples[event.sequence.request.request_id, event.sequence.index]
            assert not sample.is_cancelled and sample.end is None
            sample.received.append(event.token_id)
            sample.end = event.finish_reason
        scheduler.audit()
        if not upcoming and not scheduler.has_work:
            break
    assert not scheduler.has_work and scheduler.pool.num_free == scheduler.pool.num_blocks
    for sample in samples.values():
        sample.check()
    return scheduler.counters.num_preemptions


def _requests(rng: random.Random, max_model_len: int) -> Iterator[Request]:
    for number in range(rng.randint(2, 5)):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, max_model_len - 1))]
        room = max_model_len - len(prompt)
        # Every third request meets its end of sequence on the way.
        eos = rng.choice(expected_tokens(prompt, room)) if rng.random() < 0.3 else rng.randrange(VOCAB_SIZE)
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2]),
            max_tokens=rng.choice([None, rng.randint(1, room)]),
            # The model is so sure that a temperature of 1 does not change its tokens.
            temperature=rng.choice([0.0, 0.0, 0.0, 1.0]),
            stop_token_ids=(rng.randrange(VOCAB_SIZE),),
        )
        limits = ModelLimits(VOCAB_SIZE, max_model_len, (eos,))
        yield Request.checked(str(number), prompt, params, rng.getrandbits(64), limits)


def _samples(request: Request) -> dict[tuple[str, int], Sample]:
    expected = expected_tokens(list(request.prompt_token_ids), request.max_len - len(request.prompt_token_ids))
    return {(request.request_id, index): Sample(expected, request.stop_token_ids) for index in range(request.params.n)}


def test_padded_replays_and_late_results_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lives on the Triton forms of what surrounds the model, decode steps replayed with padding, results read
    as late as they may be."""
    pytest.importorskip("triton")
    from emulated_gpu import emulate

    recorder = emulate(monkeypatch, graphs=True)
    preemptions = 0
    for number in range(8):
        runner = _random_runner(random.Random(number))
        runner._stepper.record(recorder, padded_sizes(runner.config.max_num_seqs))
        for life in range(3):
            preemptions += _live(random.Random(1000 * number + life), runner)
    assert preemptions > 5 and recorder.num_replays > 300


@pytest.mark.parametrize("fault", ["another's block", "one block twice"])
def test_one_wrong_entry_of_a_block_table_is_noticed(fault: str) -> None:
    """The check of the check: the same lives fail when the worker's table is not the scheduler's."""
    failures = 0
    for number in range(20):
        runner = _random_runner(random.Random(number))
        table, check = runner.table, runner.table.apply

        def corrupted(plan: worker_pb2.StepPlan) -> object:
            work = check(plan)
            row = int(table.counts.num_blocks.argmax())
            if work.rows.size and table.counts.num_computed[row] > runner.config.block_size:
                blocks = table.block_table[row]
                blocks[0] = (blocks[0] + 1) % runner.pool.num_blocks if fault == "another's block" else blocks[1]
            return work

        table.apply = corrupted  # type: ignore[method-assign,assignment]
        try:
            _live(random.Random(number), runner)
        except AssertionError:
            failures += 1
    assert failures > 10
