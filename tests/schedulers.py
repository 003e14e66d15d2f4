"""Short ways to make what the scheduler's tests need."""

from __future__ import annotations

from fake_worker import VOCAB, FakeWorker

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.engine import Engine
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import StepEvents, StepPlan, StepResult
from quire.scheduler.request import ModelLimits, Request
from quire.scheduler.scheduler import Scheduler


def make_request(
    name: str,
    prompt: list[int],
    max_model_len: int = 64,
    seed: int = 0,
    eos: tuple[int, ...] = (),
    cache_salt: str = "",
    **params: object,
) -> Request:
    sampling = SamplingParams(**{"max_tokens": 8, **params})  # type: ignore[arg-type]
    return Request.checked(name, prompt, sampling, seed, ModelLimits(VOCAB, max_model_len, eos), cache_salt)


def make_scheduler(**config: object) -> Scheduler:
    defaults = dict(
        num_blocks=32,
        block_size=4,
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        watermark=0.0,
        enable_prefix_caching=False,
    )
    return Scheduler(SchedulerConfig(**{**defaults, **config}))  # type: ignore[arg-type]


def make_engine(run_ahead: int = 0, **config: object) -> tuple[Engine, FakeWorker]:
    scheduler = make_scheduler(**config)
    limits = scheduler.config
    worker = FakeWorker(limits.num_blocks, limits.block_size, limits.max_num_seqs, limits.max_num_batched_tokens)
    return Engine(scheduler, worker, run_ahead), worker


def answer(scheduler: Scheduler, plan: StepPlan, token: int = 5) -> StepEvents:
    """Apply a result in which every sampling row got `token`."""
    return scheduler.apply(StepResult(plan.step, (token,) * plan.num_sampled, {}))
