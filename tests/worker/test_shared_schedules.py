"""Random lives in which samples, rankings and beams share a small pool on the real runner, with swap and recompute:
every sample is the one that a request of its own gets, every beam the one that the tokens call for."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
import torch
from hash_model import VOCAB_SIZE, HashDecoder, expected_tokens, hidden_of
from wire_executor import WireExecutor

from quire.kernels.sampling import log_probabilities_by_sorting
from quire.scheduler.beam import BeamSearch
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.engine import Engine
from quire.scheduler.params import InvalidRequest, SamplingParams
from quire.scheduler.plan import StepPlan
from quire.scheduler.request import ModelLimits, Request
from quire.scheduler.scheduler import Scheduler
from quire.worker import runner as runner_module
from quire.worker import swap
from quire.worker.config import WorkerConfig
from quire.worker.runner import Runner

LIVES = 60
MAX_MODEL_LEN = 28
BLOCK_BYTES = 8
"""Of one token's."""

Outputs = dict[int, list[int]]


class Uncertain(HashDecoder):
    """Beside the next token three others are likely, by the same hash: beams have something to choose from."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden)
        best = logits.argmax(dim=-1)
        for i, (step, factor) in enumerate(((101, 7), (211, 13), (307, 19))):
            below = 0.2 + i + (hidden * factor % 1009).float() / 1009
            logits[torch.arange(len(best)), (best + step) % VOCAB_SIZE] = logits.amax(dim=-1) - below
        return logits


def make_runner(block_size: int, num_blocks: int, num_slots: int, rows: int = 6) -> Runner:
    config = WorkerConfig(
        model="",
        block_size=block_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=rows,
        max_num_batched_tokens=rows + 10,
        num_gpu_blocks_override=num_blocks,
        swap_space_bytes=num_slots * block_size * BLOCK_BYTES,
        num_threads=1,
    )
    runner = Runner(config, loader=lambda *_: Uncertain())
    runner.load()
    runner.allocate(runner.measure())
    runner.pool.tensor.zero_()  # an empty slot is no position
    recorder = runner_module.recorder_for(config)
    if recorder is not None:
        runner._stepper.record(recorder, [3, rows])
    assert runner.describe().num_swap_blocks == num_slots
    return runner


class Counting(WireExecutor):
    met: Counter[str]

    def submit(self, plan: StepPlan) -> None:
        for name in ("forked", "branched", "told", "replaced", "copied", "swapped_out", "swapped_in"):
            self.met[name] += len(getattr(plan, name))
        super().submit(plan)


def live(
    rng: random.Random, runner: Runner, requests: list[Request], met: Counter[str], **settings: object
) -> dict[str, Outputs]:
    """What each request gets, by sample or rank."""
    runner.reset()
    config = runner.config
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=runner.pool.num_blocks,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_swap_blocks=runner.describe().num_swap_blocks,
            **settings,  # type: ignore[arg-type]
        )
    )
    executor = Counting(runner)
    executor.met = met
    engine = Engine(scheduler, executor, run_ahead=rng.choice([0, 1, 2]))
    outputs: dict[str, Outputs] = {request.request_id: {} for request in requests}
    upcoming = requests[::-1]
    for _ in range(2000):
        while upcoming and rng.random() < 0.5:
            request = upcoming.pop()
            try:
                scheduler.add(request)
            except InvalidRequest:  # more beams than the pool can hold
                del outputs[request.request_id]
        events = engine.step()
        for event in events:
            mine = outputs[event.sequence.request.request_id]
            mine.setdefault(event.sequence.index, []).append(event.token_id)
        for answer in events.answers:
            outputs[answer.request.request_id][answer.index] = list(answer.token_ids)
        scheduler.audit()
        if not upcoming and not scheduler.has_work:
            break
    assert not scheduler.has_work
    met["preemptions"] += scheduler.counters.num_preemptions
    met["swaps"] += scheduler.counters.num_swap_preemptions
    return outputs


def make_requests(rng: random.Random) -> list[Request]:
    stem = [rng.randrange(VOCAB_SIZE) for _ in range(MAX_MODEL_LEN)]
    requests = []
    for number in range(rng.randint(3, 6)):
        length = rng.randint(1, MAX_MODEL_LEN - 4)
        shared = rng.choice([0, rng.randint(0, length)])
        prompt = stem[:shared] + [rng.randrange(VOCAB_SIZE) for _ in range(length - shared)]
        params: dict = dict(max_tokens=rng.randint(1, MAX_MODEL_LEN - length), temperature=rng.choice([0.0, 1.0, 9.0]))
        kind = rng.choice(["one", "n", "n", "best_of", "beam", "beam"])
        if kind == "n":
            params |= dict(n=rng.randint(2, 4), frequency_penalty=rng.choice([0.0, 0.0, 1.0]))
        elif kind == "best_of":
            params |= dict(best_of=rng.randint(2, 4))
        elif kind == "beam":
            width = rng.randint(1, 4)
            params |= dict(beam_width=width, n=rng.randint(1, width), length_penalty=rng.choice([0.0, 1.0]))
            params |= dict(temperature=1.0, early_stopping=rng.choice([True, False, "never"]))
        eos = rng.choice(expected_tokens(prompt, 4)) if rng.random() < 0.3 else rng.randrange(VOCAB_SIZE)
        limits = ModelLimits(VOCAB_SIZE, MAX_MODEL_LEN, (eos,))
        requests.append(Request.checked(str(number), prompt, SamplingParams(**params), rng.getrandbits(64), limits))
    return requests


def alone(runner: Runner, request: Request) -> Outputs:
    """Each sample as a request of its own, by its own seed; what is ranked, with nobody beside it."""
    params = request.params
    parts = [request]
    if not params.is_ranked:
        single = dataclasses.replace(params, n=1)
        seeds = [request.sample_seed(index) for index in range(params.n)]
        parts = [dataclasses.replace(request, params=single, seed=seed) for seed in seeds]
    outputs = [
        live(random.Random(0), runner, [part], Counter(), enable_prefix_caching=False)[part.request_id]
        for part in parts
    ]
    return outputs[0] if params.is_ranked else {index: output[0] for index, output in enumerate(outputs)}


def expected_beams(request: Request) -> Outputs:
    """From the tokens alone."""
    model, search = Uncertain(), BeamSearch.of(request)

    def candidates(tokens: list[int]) -> list[tuple[int, float]]:
        logits = model.logits(hidden_of(tokens))
        ids, values, _ = log_probabilities_by_sorting(logits, logits.argmax(dim=-1), search.num_candidates)
        return list(zip(ids[0, 1:].tolist(), values[0, 1:].tolist(), strict=True))

    beams = [list(request.prompt_token_ids)]
    while (moves := search.step([candidates(beam) for beam in beams])) is not None:
        beams = [[*beams[move.parent], move.token] for move in moves]
    return {index: list(answer.token_ids) for index, answer in enumerate(search.answers())}


def check_lives(first: int, count: int) -> Counter[str]:
    met: Counter[str] = Counter()
    large = make_runner(block_size=4, num_blocks=200, num_slots=0)
    for number in range(first, first + count):
        rng = random.Random(number)
        block_size = rng.choice([1, 2, 4])
        least = -(-MAX_MODEL_LEN // block_size)
        num_blocks = least + rng.randint(0, least // 2)
        small = make_runner(block_size, num_blocks, rng.choice([0, num_blocks // 2, num_blocks]))
        requests = make_requests(rng)
        mode = rng.choice(["swap", "swap", "recompute"])
        caching = rng.random() < 0.5
        got = live(rng, small, requests, met, preemption_mode=mode, enable_prefix_caching=caching, watermark=0.0)
        for request in requests:
            if request.request_id in got:
                wanted = expected_beams(request) if request.params.beam_width is not None else alone(large, request)
                assert got[request.request_id] == wanted, (number, request)
    return met


def test_every_answer_is_what_its_request_must_get() -> None:
    met = check_lives(0, LIVES)
    assert min(met.values()) > 10 and len(met) == 9, met


def test_on_an_emulated_gpu_with_late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from emulated_gpu import emulate

    recorder = emulate(monkeypatch, graphs=True)
    monkeypatch.setattr(swap, "_blocks_per_chunk", lambda _: 2)
    met = check_lives(1000, 3)
    assert met["copied"] and met["swapped_in"] and met["forked"] and met["branched"], met
    assert recorder.num_replays > 30
