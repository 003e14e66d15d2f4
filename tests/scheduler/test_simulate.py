"""Simulated time: the cost model, the executor that follows plans, and what a run reports."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.params import InvalidRequest
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.simulate import HASH_TOKENS, Report, Simulation, percentile, prompt_of, requests_of, sustained_rate
from quire.scheduler.simulation import traces
from quire.scheduler.simulation.baselines import FasterTransformer, Orca, Reserve
from quire.scheduler.simulation.costs import GPUS, PAPER_SETUPS, PYTHON_2023, SHAPES, CostModel, Overhead, Work
from quire.scheduler.simulation.gpu import SimulatedGpu
from quire.scheduler.simulation.likelihoods import Likelihoods
from quire.scheduler.simulation.traces import SYNTHETIC, Job

OPT = SHAPES["opt-13b"]
A100 = GPUS["a100-40gb"]


class Seconds(CostModel):
    """Every step takes one second; remembers what the steps did."""

    def __init__(self) -> None:
        super().__init__(A100, OPT)
        object.__setattr__(self, "seen", [])

    def seconds(self, work: Work) -> float:
        self.seen.append(work)  # type: ignore[attr-defined]
        return 1.0


def config(**changes: object) -> SchedulerConfig:
    values = dict(
        num_blocks=64, block_size=4, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=32, watermark=0.0
    )
    return SchedulerConfig(**{**values, **changes})  # type: ignore[arg-type]


def run(jobs: list[Job], scheduler: object = None, **settings: object) -> Report:
    return Simulation(jobs, scheduler or Scheduler(config()), SimulatedGpu(Seconds()), **settings).run()  # type: ignore[arg-type]


# -- the cost model


def test_slots_are_those_of_table_1() -> None:
    slots = {name: setup.kv_bytes // setup.shape.kv_bytes for name, setup in PAPER_SETUPS.items()}
    assert slots == {"opt-13b": 15728, "opt-66b": 9557, "opt-175b": 60074}
    assert [round(setup.shape.weight_bytes / 1e9) for setup in PAPER_SETUPS.values()] == [26, 131, 349]


@pytest.mark.parametrize("name, params", [("llama-3.1-8b", 8.03e9), ("llama-3.1-70b", 70.55e9), ("llama-13b", 13.02e9)])
def test_shapes_have_as_many_parameters_as_their_models(name: str, params: float) -> None:
    assert SHAPES[name].weight_bytes / 2 == pytest.approx(params, rel=2e-3)


def test_a_step_is_bound_by_memory_or_by_products() -> None:
    cost = CostModel(A100, OPT, overhead=Overhead(0.0, 0.0), bandwidth_share=1.0, flops_share=1.0, gather_tokens=0.0)
    weights = 2 * OPT.linear_params
    assert cost.seconds(Work(1, 1, 0)) == pytest.approx(weights / 1.555e12)
    assert cost.seconds(Work(1, 4096, 0)) == pytest.approx(weights * 4096 / 312e12)
    read = cost.seconds(Work(8, 8, 10_000)) - cost.seconds(Work(8, 8, 0))
    assert read == pytest.approx(10_000 * 819_200 / 1.555e12)
    copied = cost.seconds(Work(8, 8, 0, copied=3)) - cost.seconds(Work(8, 8, 0))
    assert copied == pytest.approx(2 * 3 * 16 * 819_200 / 1.555e12)
    swapped = cost.seconds(Work(8, 8, 0, swapped=3)) - cost.seconds(Work(8, 8, 0))
    assert swapped == pytest.approx(3 * (8e-6 + 16 * 819_200 / 24e9))


def test_ranks_share_the_work_and_pay_for_it() -> None:
    shape, gpu = SHAPES["llama-3.1-70b"], GPUS["h100"]
    one, four = CostModel(gpu, shape, 1), CostModel(gpu, shape, 4)
    work = Work(64, 64, 64_000)
    assert one.seconds(work) / 4 < four.seconds(work) < one.seconds(work) / 3
    assert one.pool_tokens() < 0 < CostModel(gpu, shape, 2).pool_tokens() < four.pool_tokens()
    with pytest.raises(ValueError, match="at least 1"):
        CostModel(gpu, shape, 0)


def test_the_fitted_overhead_gives_the_two_step_times_it_was_fitted_to() -> None:
    """By Little's law: batch / (requests per second x tokens per request)."""
    cost = CostModel(A100, OPT, overhead=PYTHON_2023)
    assert cost.seconds(Work(30, 45, 15_146)) == pytest.approx(30.42 / (1.9 * 337.99), rel=0.05)
    assert cost.seconds(Work(132, 176, 11_000)) == pytest.approx(132.44 / (30 * 58.45), rel=0.05)


# -- the executor


def jobs_of_all_kinds(rng: random.Random, count: int) -> list[Job]:
    jobs, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(0.4)
        kind = rng.choice([{}, {}, {"samples": rng.randint(2, 4)}, {"beam_width": rng.randint(2, 4)}])
        jobs.append(Job(now, rng.randint(1, 30), rng.randint(1, 20), **kind))  # type: ignore[arg-type]
    return jobs


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_sums_kept_in_differences_are_those_of_a_walk(seed: int, mode: str) -> None:
    """After every plan: tokens with KV, table entries, and what the step reads and computes."""
    rng = random.Random(seed)
    swap = {"preemption_mode": mode, "num_swap_blocks": 30 if mode == "swap" else 0}
    scheduler = Scheduler(config(num_blocks=30, **swap))
    cost = Seconds()
    gpu = SimulatedGpu(cost)
    jobs = jobs_of_all_kinds(rng, 25)
    checked = 0
    original = gpu.run

    def checking(plan):  # type: ignore[no-untyped-def]
        nonlocal checked
        by_row = {sequence.row: sequence for sequence in scheduler.running}
        result, seconds = original(plan)
        assert gpu.num_rows == len(by_row)
        assert gpu.num_tokens == sum(sequence.num_computed for sequence in by_row.values())
        assert gpu.num_entries == sum(len(sequence.block_ids) for sequence in by_row.values())
        counts = plan.num_tokens or (1,) * len(plan.rows)
        ends = {row: by_row[row].num_computed for row in plan.rows}
        work = cost.seen[-1]  # type: ignore[attr-defined]
        pairs = zip(plan.rows, counts, strict=True)
        assert work.read == sum(ends[row] for row, count in pairs if count == 1)
        chunks = [(ends[row], count) for row, count in zip(plan.rows, counts, strict=True) if count > 1]
        assert work.pairs == sum(end - place for end, count in chunks for place in range(count))
        assert (work.rows, work.tokens) == (len(plan.rows), plan.total_tokens)
        assert work.copied == len(plan.copied)
        assert work.swapped == len(plan.swapped_out) + len(plan.swapped_in)
        checked += 1
        scheduler.audit()
        return result, seconds

    gpu.run = checking  # type: ignore[method-assign]
    report = Simulation(jobs, scheduler, gpu).run()
    assert checked > 50 and report.counters.num_preemptions > 0
    assert len(report.normalized) == len(jobs)
    assert bool(report.counters.num_swap_preemptions) == (mode == "swap")


def test_likelihoods_are_a_function_of_the_seed_and_add_up() -> None:
    draws = [Likelihoods(7, draws=1).draw(6) for _ in range(2)]
    assert draws[0] == draws[1] != Likelihoods(8, draws=1).draw(6)
    for seed in range(100):
        drawn = Likelihoods(seed, draws=1).draw(6)
        assert drawn.token_ids == (1, 1, 2, 3, 4, 5, 6) and list(drawn.values[1:]) == sorted(
            drawn.values[1:], reverse=True
        )
        assert sum(map(math.exp, drawn.values[1:])) <= 1 + 1e-9


# -- a run


def test_a_request_takes_a_step_for_each_of_its_tokens() -> None:
    report = run([Job(0.0, 5, 10), Job(3.5, 5, 4), Job(100.0, 40, 3)])
    # The second waits half a step; the third's prompt takes two steps of at most 32 tokens.
    assert report.normalized == [4.5 / 4, 1.0, 4 / 3] and report.first_tokens == [1.0, 1.5, 2.0]
    assert (report.seconds, report.num_steps, report.output_tokens) == (104.0, 14, 17)


def test_means_are_over_the_time_in_which_steps_run() -> None:
    report = run([Job(0.0, 4, 10), Job(5.0, 4, 10), Job(1000.0, 4, 1)])
    # 5 steps of one row, 5 of two, 5 of one
    assert report.averages.rows == pytest.approx(20 / 15) and report.averages.seconds == 15
    late = run([Job(0.0, 4, 10), Job(5.0, 4, 10), Job(1000.0, 4, 1)], warm_up=5.0)
    assert late.averages.rows == pytest.approx(15 / 10)
    mean = report.averages
    assert mean.filled + mean.reserved + mean.internal + mean.other == pytest.approx(mean.slots)


def test_the_same_trace_gives_the_same_report() -> None:
    jobs = jobs_of_all_kinds(random.Random(1), 30)
    first, second = run(jobs), run(jobs)
    assert first == second


def test_samples_share_and_divided_ones_do_not() -> None:
    jobs = [Job(0.0, 16, 10, samples=3), Job(20.0, 4, 1)]
    shared = run(jobs)
    # 4 blocks of prompt, used thrice while three samples have 1 to 3 blocks of their own.
    assert shared.output_tokens == 31 and shared.averages.saved > 0.4
    divided = run(jobs, Scheduler(config(enable_prefix_caching=False)), divide=True)
    assert divided.output_tokens == 31 and divided.averages.saved == 0


def test_giving_up_is_certain_and_early() -> None:
    jobs = [Job(0.0, 8, 20) for _ in range(40)]
    whole = run(jobs)
    assert whole.finished and whole.normalized_latency > 2
    early = run(jobs, limit=2.0)
    assert not early.finished and early.normalized_latency == math.inf and early.num_steps < whole.num_steps
    assert run(jobs, limit=whole.normalized_latency * 1.001).normalized_latency == whole.normalized_latency


def test_a_rate_is_found_to_the_tolerance() -> None:
    tried = []

    def at(rate: float) -> Report:
        tried.append(rate)
        return Report(1, normalized=[0.1 if rate <= 7.3 else 9.0])

    found = sustained_rate(at, 0.2, guess=1.0, tolerance=0.02)
    assert 7.3 / 1.02 <= found.rate <= 7.3 and list(found.tried) == sorted(tried)
    assert found.report is found.tried[found.rate]
    nothing = sustained_rate(lambda _: Report(1, normalized=[9.0]), 0.2, guess=1.0)
    assert nothing.rate == 0.0 and nothing.report is None


def test_prompts_are_alike_exactly_as_far_as_they_should_be() -> None:
    shared = (1, 2, 3)
    one, two = (prompt_of(Job(0.0, 10, 1, prefix=shared), number) for number in (0, 1))
    assert one[:3] == two[:3] == shared and len(one) == 10 and not set(one[3:]) & set(two[3:])
    chained = [Job(0.0, 2 * HASH_TOKENS + 5, 1, prefix_hashes=(4, 5, last)) for last in (6, 7)]
    three, four = (prompt_of(job, number) for number, job in enumerate(chained))
    assert len(three) == 2 * HASH_TOKENS + 5 and three[: 2 * HASH_TOKENS] == four[: 2 * HASH_TOKENS]
    assert three[-1] != four[-1]
    requests = list(requests_of(Job(0.0, 3, 2, beam_width=4), 9, divide=True))
    assert len({request.request_id for request in requests}) == 4 and requests[0].params.num_sequences == 1


def test_percentiles() -> None:
    assert [percentile([3.0, 1.0, 2.0], p) for p in (0, 50, 99)] == [1.0, 2.0, 3.0] and math.isnan(percentile([], 50))


# -- the systems it is compared with


def sharegpt(count: int, rate: float) -> list[Job]:
    return traces.poisson(traces.sample(SYNTHETIC["sharegpt"].draw(4000), count), rate)


def paper_config(**changes: object) -> SchedulerConfig:
    return config(
        num_blocks=15728 // 16,
        block_size=16,
        max_model_len=2048,
        max_num_seqs=256,
        max_num_batched_tokens=2560,
        **changes,
    )


def test_batches_past_saturation_are_those_of_the_paper() -> None:
    """Its Figure 13a: 7.00, 9.81, 13.62 and 30.42 requests, with our own lengths."""
    cost = CostModel(A100, OPT, overhead=PYTHON_2023)
    jobs = sharegpt(300, 3.0)

    def batch(scheduler: object) -> float:
        report = Simulation(jobs, scheduler, SimulatedGpu(cost), warm_up=20).run()  # type: ignore[arg-type]
        return report.averages.rows

    orcas = {reserve: batch(Orca(paper_config(), reserve)) for reserve in Reserve}
    assert orcas[Reserve.MAX] == pytest.approx(7.0, abs=0.01)
    assert orcas[Reserve.POW2] == pytest.approx(9.81, rel=0.15)
    assert orcas[Reserve.ORACLE] == pytest.approx(13.62, rel=0.15)
    assert batch(Scheduler(paper_config())) >= 30.42


@pytest.mark.parametrize("reserve", Reserve)
def test_nobody_is_preempted_who_has_reserved_everything(reserve: Reserve) -> None:
    scheduler = Orca(config(num_blocks=50), reserve)
    gpu = SimulatedGpu(Seconds())
    rng = random.Random(5)
    for number in range(60):
        for request in requests_of(Job(0.0, rng.randint(1, 30), rng.randint(1, 30)), number):
            scheduler.add(request)
    most = 0
    while (plan := scheduler.schedule()) is not None:
        for admission in plan.admitted:
            first, length = admission.block_ids[0], len(admission.block_ids)
            assert admission.block_ids == tuple(range(first, first + length)) and length & (length - 1) == 0
        assert not plan.extended
        most = max(most, len(plan.rows))
        memory, tables = scheduler.memory(), scheduler.tables
        assert memory.slots_filled <= tables.num_needed <= tables.num_kept <= memory.blocks_used * 4
        scheduler.apply(gpu.run(plan)[0])
        scheduler.audit()
    assert scheduler.counters.num_finished == 60 and scheduler.counters.num_preemptions == 0
    assert scheduler.pool.num_free == 50 and most > 2
    assert reserve is not Reserve.MAX or most == 3  # 50 blocks: runs of 32, 16 and 2; 64 tokens take 16 blocks


def test_slots_kept_by_each_policy() -> None:
    (request,) = requests_of(Job(0.0, 10, 25), 0)
    assert {reserve: reserve.slots(request, 2048) for reserve in Reserve} == {
        Reserve.ORACLE: 35, Reserve.POW2: 42, Reserve.MAX: 2048,
    }  # fmt: skip
    (request,) = requests_of(Job(0.0, 10, 32), 0)
    assert Reserve.POW2.slots(request, 2048) == 42
    (request,) = requests_of(Job(0.0, 1500, 520), 0)
    assert Reserve.POW2.slots(request, 2048) == 2048


def test_contiguous_tables_share_nothing() -> None:
    scheduler = Orca(config(), Reserve.ORACLE)
    with pytest.raises(InvalidRequest, match="a request for each sample"):
        scheduler.add(next(requests_of(Job(0.0, 4, 4, samples=2), 0)))


def test_a_batch_of_faster_transformer_ends_with_its_longest_answer() -> None:
    # Room for three of 64 tokens: the fourth waits for the whole batch.
    jobs = [Job(0.0, 4, 5), Job(0.0, 20, 12), Job(0.0, 8, 1), Job(0.0, 4, 2)]
    scheduler = FasterTransformer(config(num_blocks=50, max_num_batched_tokens=256))
    report = run(jobs, scheduler)
    assert report.normalized == [12 / 5, 1.0, 12.0, 7.0] and report.seconds == 14
    assert scheduler.tables.pool.num_free == 50 and scheduler.tables.num_kept == 0


def test_a_padded_batch_computes_the_longest_prompt_for_everybody() -> None:
    cost = Seconds()
    scheduler = FasterTransformer(config(num_blocks=50))
    Simulation([Job(0.0, 4, 2), Job(0.0, 20, 2)], scheduler, SimulatedGpu(cost)).run()
    assert [work.tokens for work in cost.seen] == [40, 2]  # type: ignore[attr-defined]


def test_orca_is_slower_and_never_wrong() -> None:
    jobs = [replace(job, arrival=0.0) for job in jobs_of_all_kinds(random.Random(2), 20)]
    paged = run(jobs, divide=True)
    oracle = run(jobs, Orca(config(), Reserve.ORACLE), divide=True)
    assert oracle.output_tokens == paged.output_tokens and oracle.seconds >= paged.seconds
