"""Beam search and best_of through the scheduler: whatever the pool, the mode of preemption, the company and the depth,
every request gets what its own tokens decide, computed here without any scheduler."""

from __future__ import annotations

import random

import pytest
from fake_worker import VOCAB, FakeWorker, expected_candidates, expected_logprob, expected_output
from schedulers import make_request, make_scheduler

from quire.scheduler.beam import BeamSearch
from quire.scheduler.engine import Engine
from quire.scheduler.params import InvalidRequest
from quire.scheduler.plan import Answer, StepEvents
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import FinishReason

Sample = tuple[tuple[int, ...], FinishReason]
Ranked = list[tuple[tuple[int, ...], FinishReason, float]]
"""With the score, best first."""


def beams_of(request: Request) -> Ranked:
    search = BeamSearch.of(request)
    beams = [list(request.prompt_token_ids)]
    while (moves := search.step([expected_candidates(beam, search.num_candidates) for beam in beams])) is not None:
        beams = [[*beams[move.parent], move.token] for move in moves]
    return [(answer.token_ids, answer.finish_reason, answer.score) for answer in search.answers()]


def sample_of(request: Request, index: int) -> Sample:
    prompt = list(request.prompt_token_ids)
    output = expected_output(prompt, request.sample_seed(index), request.max_len - len(prompt))
    ends = [place for place, token in enumerate(output) if token in request.stop_token_ids]
    if ends:
        return tuple(output[: ends[0] + 1]), FinishReason.STOP
    return tuple(output), FinishReason.LENGTH


def best_of(request: Request) -> Ranked:
    """By the mean log-probability."""
    first = len(request.prompt_token_ids)
    samples = []
    for index in range(request.params.num_sequences):
        tokens, reason = sample_of(request, index)
        known = [*request.prompt_token_ids, *tokens]
        total = sum(expected_logprob(known[:place], known[place]) for place in range(first, len(known)))
        samples.append((tokens, reason, total / len(tokens)))
    return sorted(samples, key=lambda sample: -sample[2])[: request.params.n]


def make_company(rng: random.Random, max_len: int) -> list[Request]:
    common = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 14))]
    requests = []
    for number in range(rng.randint(4, 12)):
        prompt = common[: rng.randint(0, len(common))] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
        width, n, room = rng.randint(1, 5), rng.randint(1, 3), max_len - len(prompt)
        kind = rng.choice(["beams", "beams", "best_of", "samples"])
        params: dict[str, object] = {
            "beams": dict(
                beam_width=width,
                n=rng.randint(1, width),
                length_penalty=rng.choice([-1.0, 0.0, 1.0, 2.0]),
                early_stopping=rng.choice([True, False, "never"]),
            ),
            "best_of": dict(best_of=n + rng.randint(1, 2), n=n),
            "samples": dict(n=n),
        }[kind]
        eos = tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 1, 5])))
        requests.append(
            make_request(
                f"{kind}-{number}", prompt, max_len, seed=rng.getrandbits(64), eos=eos,
                max_tokens=rng.choice([1, room // 2, room]), **params,
            )
        )  # fmt: skip
    return requests


def make_tight_engine(rng: random.Random, max_len: int) -> tuple[Engine, FakeWorker]:
    block_size = rng.choice([2, 3, 4])
    num_blocks = int(-(-max_len // block_size) * rng.choice([1.3, 2, 3, 8]))
    num_swap_blocks = rng.choice([0, num_blocks // 2, num_blocks])
    scheduler = make_scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_len,
        max_num_seqs=rng.randint(5, 12),
        max_num_batched_tokens=rng.choice([12, 40]),
        enable_prefix_caching=rng.random() < 0.5,
        preemption_mode="swap" if num_swap_blocks else "recompute",
        num_swap_blocks=num_swap_blocks,
    )
    limits = scheduler.config
    worker = FakeWorker(num_blocks, block_size, limits.max_num_seqs, limits.max_num_batched_tokens, num_swap_blocks)
    return Engine(scheduler, worker, rng.randint(0, 2)), worker


class Walk:
    """A random company, served to its end."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        max_len = rng.choice([24, 36])
        self.engine, self.worker = make_tight_engine(rng, max_len)
        self.scheduler = self.engine.scheduler
        self.requests = [request for request in make_company(rng, max_len) if self._fits(request)]
        self.answers: dict[str, list[Answer]] = {}
        self._tokens: dict[tuple[str, int], list[int]] = {}
        self._ends: dict[tuple[str, int], FinishReason] = {}
        self.cancelled: set[str] = set()
        waiting = list(self.requests)
        while waiting or self.scheduler.has_work:
            while waiting and rng.random() < 0.5:
                self.scheduler.add(waiting.pop(0))
            self._take(self.engine.step())
            self.scheduler.audit()
            if rng.random() < 0.01:
                self._cancel(rng.choice(self.requests).request_id)

    def _cancel(self, name: str) -> None:
        if self.scheduler.cancel(name):
            self.cancelled.add(name)
            self.scheduler.audit()

    def _fits(self, request: Request) -> bool:
        """Whether the scheduler takes it, tried on one that is thrown away."""
        try:
            Scheduler(self.scheduler.config).add(request)
        except InvalidRequest:
            return False
        return True

    def _take(self, events: StepEvents) -> None:
        for event in events:
            assert not event.sequence.request.params.is_ranked
            sample = event.sequence.request.request_id, event.sequence.index
            assert sample not in self._ends
            self._tokens.setdefault(sample, []).append(event.token_id)
            if event.finish_reason is not None:
                self._ends[sample] = event.finish_reason
        for answer in events.answers:
            self.answers.setdefault(answer.request.request_id, []).append(answer)

    def samples(self, request: Request) -> list[Sample]:
        """Those of a request whose answers are not ranked."""
        names = [(request.request_id, index) for index in range(request.params.n)]
        return [(tuple(self._tokens[name]), self._ends[name]) for name in names]


@pytest.mark.parametrize("seed", range(60))
def test_everybody_gets_what_their_tokens_decide(seed: int) -> None:
    walk = Walk(seed)
    for request in walk.requests:
        params = request.params
        if request.request_id in walk.cancelled:
            assert request.request_id not in walk.answers
            continue
        if not params.is_ranked:
            assert walk.samples(request) == [sample_of(request, index) for index in range(params.n)]
            continue
        expected = best_of(request) if params.beam_width is None else beams_of(request)
        answers = walk.answers[request.request_id]
        assert [(answer.token_ids, answer.finish_reason, answer.score) for answer in answers] == expected, request
        assert [answer.index for answer in answers] == list(range(params.n))
    memory = walk.scheduler.memory()
    assert memory.blocks_used == memory.swap_blocks_used == 0


def test_the_walks_meet_what_they_are_for() -> None:
    walks = [Walk(seed) for seed in range(20)]
    names = ("num_preemptions", "num_swap_preemptions", "copied_blocks", "prefix_hit_tokens")
    totals = {name: sum(getattr(walk.scheduler.counters, name) for walk in walks) for name in names}
    assert min(totals.values()) > 20 and totals["num_swap_preemptions"] + 20 < totals["num_preemptions"], totals
    kinds = {request.request_id.split("-")[0] for walk in walks for request in walk.requests}
    assert kinds == {"beams", "best_of", "samples"} and any(walk.cancelled for walk in walks)


def test_beams_that_can_never_run_are_refused() -> None:
    scheduler = make_scheduler(num_blocks=16, max_num_seqs=4)
    with pytest.raises(InvalidRequest, match="beam_width is 5, but at most 4 beams can run here"):
        scheduler.add(make_request("a", [1, 2], beam_width=5))
    with pytest.raises(InvalidRequest, match="4 beams of 22 tokens may need 24 KV blocks, but there are 16"):
        scheduler.add(make_request("a", [1, 2], beam_width=4, max_tokens=20))
    assert not scheduler.has_work
