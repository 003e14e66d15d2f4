"""Two thousand random lives of an engine: every token must be the one that the request's own tokens call for."""

import random

import pytest
from fake_worker import VOCAB, expected_output
from schedulers import make_engine, make_request

from quire.scheduler.sequence import FinishReason


@pytest.mark.parametrize("first_seed", range(0, 2000, 250))
def test_every_token_is_right_whatever_the_schedule(first_seed):
    preemptions = sum(_live(random.Random(seed)) for seed in range(first_seed, first_seed + 250))
    assert preemptions > 100  # the pools are small enough to matter


def _live(rng: random.Random) -> int:
    block_size = rng.choice([1, 2, 4, 8])
    max_model_len = rng.randint(8, 40)
    least = -(-(max_model_len - 1) // block_size)
    max_num_seqs = rng.randint(1, 6)
    engine, _ = make_engine(
        run_ahead=rng.choice([0, 0, 1, 2]),
        num_blocks=least + rng.randint(0, least),
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice([0, rng.randint(0, 12)]),
        watermark=rng.choice([0.0, 0.1]),
    )
    scheduler = engine.scheduler
    expected, received, ended, cancelled = {}, {}, {}, set()
    to_add = rng.randint(2, 10)
    for step in range(2000):
        while to_add and rng.random() < 0.3:
            to_add -= 1
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, max_model_len - 1))]
            n = rng.choice([1, 1, 1, 2])
            request = make_request(
                f"r{to_add}", prompt, max_model_len, seed=rng.randrange(1 << 30), eos=(rng.randrange(VOCAB),),
                n=n, max_tokens=rng.choice([None, rng.randint(1, max_model_len - len(prompt))]),
            )  # fmt: skip
            scheduler.add(request)
            for index in range(n):
                output = expected_output(prompt, request.sample_seed(index), request.max_len - len(prompt))
                expected[request.request_id, index] = (output, request.stop_token_ids)
                received[request.request_id, index] = []
        if received and rng.random() < 0.03:
            name, index = rng.choice(list(received))
            if scheduler.cancel(name, index):
                cancelled.add((name, index))
        for event in engine.step():
            key = event.sequence.request.request_id, event.sequence.index
            assert key not in cancelled and key not in ended
            received[key].append(event.token_id)
            if event.finish_reason:
                ended[key] = event.finish_reason
        scheduler.audit()
        if not to_add and not scheduler.has_work:
            break
    assert not scheduler.has_work and scheduler.pool.num_free == scheduler.pool.num_blocks
    for key, (output, stops) in expected.items():
        tokens = received[key]
        assert tokens == output[: len(tokens)], (key, step)
        if key not in cancelled:
            stopped = tokens[-1] in stops
            assert ended[key] is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            assert stopped or len(tokens) == len(output)
    return scheduler.counters.num_preemptions
