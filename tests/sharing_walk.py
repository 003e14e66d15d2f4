"""A random life of a scheduler in which everything is mixed: samples, rankings, beams, shared and reserved prefixes,
both kinds of preemption, cancellation, plans made ahead. After each operation the books must balance, and every token
that comes out must be the one that its request's own tokens call for.

    python tests/sharing_walk.py 1000000

walks that many operations and says what it met.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from dataclasses import dataclass, field

from fake_worker import VOCAB, FakeWorker, expected_candidates, expected_logprob, expected_output
from schedulers import make_request

from quire.scheduler.beam import BeamSearch
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.engine import Engine
from quire.scheduler.params import InvalidRequest, QueueFull
from quire.scheduler.plan import Answer
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import FinishReason

LIFETIME = 400
"""Operations after which a scheduler is run to its end, and another begins."""


@dataclass
class _Expected:
    request: Request
    received: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, FinishReason] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    answers: tuple[Answer, ...] = ()


class Life:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.met: Counter[str] = Counter()
        block_size = rng.choice([1, 2, 4, 4, 8])
        self.max_model_len = rng.randint(8, 40)
        least = -(-self.max_model_len // block_size)
        rows = rng.randint(1, 8)
        num_blocks = least + rng.randint(0, 2 * least)
        config = SchedulerConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=rows,
            max_num_batched_tokens=rows + rng.choice([0, rng.randint(0, 12), 64]),
            max_num_waiting=16,
            watermark=rng.choice([0.0, 0.1]),
            enable_prefix_caching=rng.random() < 0.7,
            preemption_mode=rng.choice(["auto", "swap", "swap", "recompute"]),
            num_swap_blocks=rng.choice([0, rng.randint(1, num_blocks), num_blocks]),
            block_bytes=1024,
            link_bytes_per_s=1024.0,
            prefill_tokens_per_s=rng.choice([0.5, 2.0]) * block_size,
        )
        self.scheduler = Scheduler(config)
        worker = FakeWorker(
            num_blocks, block_size, rows, config.max_num_batched_tokens, num_swap_blocks=config.num_swap_blocks
        )
        self.engine = Engine(self.scheduler, worker, run_ahead=rng.choice([0, 0, 1, 2]))
        self.worker = worker
        self.expected: dict[str, _Expected] = {}
        self.num_prefixes = 0
        self.stems = [self._tokens(self.max_model_len - 1) for _ in range(3)]

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(count)]

    def _prompt(self) -> list[int]:
        """Often it begins as others do."""
        length = self.rng.randint(1, self.max_model_len - 1)
        shared = self.rng.randint(0, length) if self.rng.random() < 0.7 else 0
        return self.rng.choice(self.stems)[:shared] + self._tokens(length - shared)

    # -- operations

    def submit(self) -> None:
        rng, prompt = self.rng, self._prompt()
        room = self.max_model_len - len(prompt)
        params: dict[str, object] = {"max_tokens": rng.choice([None, rng.randint(1, room)])}
        kind = rng.choice(["one", "one", "n", "best_of", "beam"])
        if kind == "n":
            params["n"] = rng.randint(2, 5)
        elif kind == "best_of":
            params["best_of"] = rng.randint(2, 4)
            params["n"] = rng.randint(1, params["best_of"])
        elif kind == "beam":
            params["beam_width"] = rng.randint(1, 4)
            params["n"] = rng.randint(1, params["beam_width"])
            params["length_penalty"] = rng.choice([0.0, 1.0, 2.0])
            params["early_stopping"] = rng.choice([True, False, "never"])
        name = f"r{len(self.expected)}"
        eos = tuple(rng.sample(range(VOCAB), rng.choice([0, 1, 1, 12])))
        salt = rng.choice(["", "", "tenant"])
        request = make_request(name, prompt, self.max_model_len, rng.randrange(1 << 30), eos, cache_salt=salt, **params)
        try:
            self.scheduler.add(request)
        except (InvalidRequest, QueueFull):
            self.met["refused"] += 1
            return
        self.met[kind] += 1
        self.expected[name] = _Expected(request, {index: [] for index in range(request.params.n)})

    def cancel(self) -> None:
        if not self.expected:
            return
        name = self.rng.choice(list(self.expected))
        expected = self.expected[name]
        index = self.rng.choice([None, *range(expected.request.params.n)])
        if self.scheduler.cancel(name, index):
            self.met["cancelled"] += 1
            expected.cancelled.update(expected.received if index is None else [index])

    def reserve(self) -> None:
        tokens = self.rng.choice(self.stems)[: self.rng.randint(1, self.max_model_len - 1)]
        try:
            self.scheduler.reserve_prefix(f"p{self.num_prefixes}", tokens, self.rng.choice(["", "tenant"]))
        except InvalidRequest:
            return
        self.met["reserved"] += 1
        self.num_prefixes += 1

    def release(self) -> None:
        if self.num_prefixes and self.scheduler.release_prefix(f"p{self.rng.randrange(self.num_prefixes)}"):
            self.met["released"] += 1

    def step(self) -> None:
        events = self.engine.step()
        for event in events:
            expected = self.expected[event.sequence.request.request_id]
            index = event.sequence.index
            assert index not in expected.cancelled and index not in expected.ended
            expected.received[index].append(event.token_id)
            if event.finish_reason is not None:
                expected.ended[index] = event.finish_reason
        for answer in events.answers:
            expected = self.expected[answer.request.request_id]
            assert not expected.cancelled and answer.index == len(expected.answers)
            expected.answers += (answer,)

    def act(self) -> None:
        """One operation, and the audit after it."""
        chance = self.rng.random()
        if chance < 0.10:
            self.submit()
        elif chance < 0.13:
            self.cancel()
        elif chance < 0.14:
            self.reserve()
        elif chance < 0.15:
            self.release()
        else:
            self.step()
        self.scheduler.audit()

    def finish(self) -> None:
        """Run everything to its end and compare what has come with what had to."""
        for _ in range(5000):
            if not self.scheduler.has_work:
                break
            self.step()
            self.scheduler.audit()
        assert not self.scheduler.has_work, "somebody waits for ever"
        for prefix in range(self.num_prefixes):
            self.scheduler.release_prefix(f"p{prefix}")
        self.scheduler.audit()
        memory = self.scheduler.memory()
        assert memory.blocks_used == memory.swap_blocks_used == memory.slots_shared == 0
        for expected in self.expected.values():
            self._check(expected)
        counters = self.scheduler.counters
        self.met["preempted by recompute"] += counters.num_preemptions - counters.num_swap_preemptions
        self.met["preempted by swap"] += counters.num_swap_preemptions
        self.met["blocks copied"] += counters.copied_blocks
        self.met["tokens found"] += counters.prefix_hit_tokens
        self.met["tokens discarded"] += counters.discarded_tokens
        self.met["forks"] += sum(len(plan.forked) + len(plan.branched) for plan in self.worker.plans)

    def _check(self, expected: _Expected) -> None:
        request = expected.request
        if not request.params.is_ranked:
            for index, tokens in expected.received.items():
                output, reason = _sample(request, index)
                assert tokens == output[: len(tokens)], (request.request_id, index)
                if index not in expected.cancelled:
                    assert tokens == output and expected.ended[index] is reason
            return
        if expected.cancelled:
            assert not expected.answers
            return
        wanted = _beams(request) if request.params.beam_width is not None else _best_of(request)
        assert [answer.token_ids for answer in expected.answers] == wanted, request.request_id


def _sample(request: Request, index: int) -> tuple[list[int], FinishReason]:
    prompt = list(request.prompt_token_ids)
    output = expected_output(prompt, request.sample_seed(index), request.max_len - len(prompt))
    for place, token in enumerate(output):
        if token in request.stop_token_ids:
            return output[: place + 1], FinishReason.STOP
    return output, FinishReason.LENGTH


def _best_of(request: Request) -> list[tuple[int, ...]]:
    ranked = []
    for index in range(request.params.num_sequences):
        output, _ = _sample(request, index)
        tokens, total = list(request.prompt_token_ids), 0.0
        for token in output:
            total += expected_logprob(tokens, token)
            tokens.append(token)
        ranked.append((-total / len(output), index, tuple(output)))
    return [output for _, _, output in sorted(ranked)[: request.params.n]]


def _beams(request: Request) -> list[tuple[int, ...]]:
    search = BeamSearch.of(request)
    beams = [list(request.prompt_token_ids)]
    while (moves := search.step([expected_candidates(beam, search.num_candidates) for beam in beams])) is not None:
        beams = [[*beams[move.parent], move.token] for move in moves]
    return [answer.token_ids for answer in search.answers()]


def walk(num_operations: int, seed: int) -> Counter[str]:
    """Lives one after the other; returns what they met. Raises AssertionError, with the life's seed as a note."""
    met: Counter[str] = Counter()
    done = 0
    while done < num_operations:
        life = Life(random.Random(seed))
        try:
            for _ in range(min(LIFETIME, num_operations - done)):
                life.act()
                done += 1
            life.finish()
        except BaseException as error:
            error.add_note(f"in the life with seed {seed}")
            raise
        met += life.met
        seed += 1
    return met


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 40)
    print(f"{count} operations from seed {first}", flush=True)
    for what, times in sorted(walk(count, first).items()):
        print(f"{times:12,} {what}")
