"""Samples, beams and blocks that leave and come back, through the runtime, with the KV-sensitive hash model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hash_model import expected_tokens, load_hash_decoder
from worker_plans import admit, plan, unpacked

from quire.protos import worker_pb2
from quire.worker import speed
from quire.worker.checks import PlanError
from quire.worker.config import WorkerConfig
from quire.worker.parallel import TensorParallel
from quire.worker.runner import Runner

CONFIG = dict(model="hash", block_size=4, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64, num_threads=1)
BLOCK_BYTES = 32
HOT = dict(temperature=60.0)
PROMPT = [7, 8, 9, 10, 11, 12]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "launched", "replayed"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a CPU; or on an emulated GPU, on which copies and results are late."""
    if request.param != "cpu":
        pytest.importorskip("triton")
        from emulated_gpu import emulate

        emulate(monkeypatch, graphs=request.param == "replayed")
    return request.param


def make_runner(num_blocks: int = 40, num_slots: int = 10, **config: object) -> Runner:
    values = CONFIG | dict(swap_space_bytes=BLOCK_BYTES * num_slots) | config
    runner = Runner(WorkerConfig(**values), loader=load_hash_decoder)  # type: ignore[arg-type]
    runner.load()
    runner.allocate(num_blocks)
    runner.pool.tensor.fill_(torch.nan)  # what nobody wrote, nobody may read
    from quire.worker import runner as module

    recorder = module.recorder_for(runner.config)
    if recorder is not None:
        runner._stepper.record(recorder, [4])
    return runner


def tokens(report: worker_pb2.StepReport) -> list[int]:
    return unpacked(report.token_ids)


def alone(prompt: list[int], count: int, **settings: object) -> list[int]:
    runner = make_runner()
    out = tokens(runner.run(plan([0], [len(prompt)], [admit(0, prompt, range(12), **settings)])))
    while len(out) < count:
        out += tokens(runner.run(plan([0])))
    return out


@pytest.mark.parametrize(
    "settings",
    [
        HOT,
        HOT | dict(top_k=40, top_p=0.9, frequency_penalty=9.0, presence_penalty=-5.0, repetition_penalty=1.5),
        HOT | dict(bias_token_ids=[3, 4], bias_values=[300.0, 300.0], stop_token_ids=[3], min_tokens=3, logprobs=2),
    ],
)
def test_samples_of_one_prompt_are_those_of_single_requests(form: str, settings: dict) -> None:
    wanted = [alone(PROMPT, 6, seed=seed, **settings) for seed in (5, 6, 2**63)]
    assert wanted[0] != wanted[1] != wanted[2]
    runner = make_runner()
    other = admit(6, [1, 2, 3], [30, 31, 32])
    tokens(runner.run(plan([6], [3], [other])))
    # In two chunks, beside a row that decodes.
    runner.run(plan([6, 2], [1, 4], [admit(2, PROMPT, [3, 4], seed=5, **settings)]))
    report = runner.run(plan([6, 2], [1, 2], extend=[(6, 33)], branches=[(2, 7, 6), (2, 0, 2**63)]))
    out = [[token] for token in tokens(report)[1:]]
    if "logprobs" in settings:
        assert [entry.position for entry in report.logprobs] == [1, 2, 3]
        assert [unpacked(entry.token_ids)[0] for entry in report.logprobs] == tokens(report)[1:]
    rows = [2, 7, 0]
    report = runner.run(plan(rows, copies=[(4, 5), (4, 6)], replaced=[(2, 1, 5), (0, 1, 6)]))
    for sample, token in zip(out, tokens(report), strict=True):
        sample.append(token)
    extend = [(row, 10 + row) for row in rows]
    for step in range(4):
        report = runner.run(plan(rows, extend=extend if step == 1 else []))
        for sample, token in zip(out, tokens(report), strict=True):
            sample.append(token)
    assert out == wanted


def test_beams_go_on_as_they_are_told(form: str) -> None:
    """Whatever a row sampled, its next token is that of the sequence which it has become."""
    runner = make_runner()
    likeliest = expected_tokens(PROMPT, 1)[0]
    first = admit(4, PROMPT, [3, 9], logprobs=2)
    report = runner.run(plan([4], [6], [first], branches=[(4, 1, 0), (4, 6, 0)]))
    assert tokens(report) == [likeliest] * 3 and [unpacked(e.token_ids)[0] for e in report.logprobs] == [likeliest] * 3

    def check(report: worker_pb2.StepReport, *outputs: list[int]) -> None:
        assert tokens(report) == [expected_tokens(PROMPT + output, 1)[0] for output in outputs]
        assert len(report.logprobs) == 3

    # One token each; two of them copy the last block of the prompt.
    told = [(1, 100), (6, 200)]
    report = runner.run(plan([4, 1, 6], told=told, copies=[(9, 10), (9, 11)], replaced=[(4, 1, 10), (6, 1, 11)]))
    check(report, [likeliest], [100], [200])
    # Row 1 goes on twice, in the place of row 4 too; row 6 once, with the token that it sampled.
    mine = expected_tokens([*PROMPT, 200], 1)[0]
    changed = plan(
        [1, 4, 6], retire=[4], forks=[(1, 4, 0)], told=[(1, 101), (4, 102)], copies=[(9, 8)], replaced=[(4, 1, 8)]
    )
    check(runner.run(changed), [100, 101], [100, 102], [200, mine])
    # The blocks are full. Row 4 is all that goes on: in its own place, and in two that others leave.
    changed = plan(
        [4, 0, 6],
        retire=[1, 6],
        forks=[(4, 0, 0), (4, 6, 0)],
        told=[(4, 103), (0, 104), (6, 105)],
        extend=[(4, 20), (0, 21), (6, 22)],
    )
    check(runner.run(changed), *([100, 102, last] for last in (103, 104, 105)))


def test_swapped_out_and_back(form: str) -> None:
    runner = make_runner(num_blocks=8, num_slots=5)
    wanted = expected_tokens(PROMPT, 8)
    out = tokens(runner.run(plan([3], [6], [admit(3, PROMPT, [5, 2])])))
    out += tokens(runner.run(plan([3])))
    # Another takes row and blocks in the very step in which they leave.
    other = list(range(20, 28))
    report = runner.run(
        plan([3], [8], [admit(3, other, [2, 5])], retire=[3], swap_out=[(5, 4), (2, 1)], extend=[(3, 7)])
    )
    assert tokens(report) == expected_tokens(other, 1)
    back = admit(0, PROMPT + out, [6, 0, 1], num_prompt=6, num_computed=7)
    report = runner.run(plan([3, 0], admits=[back], swap_in=[(1, 0), (4, 6)]))
    assert tokens(report) == [expected_tokens(other, 2)[1], wanted[2]]
    # And all at once: a step that computes nothing.
    assert tokens(runner.run(plan(retire=[3, 0], swap_out=[(6, 0), (0, 2), (1, 3)]))) == []
    runner.pool.tensor.fill_(torch.nan)
    back = admit(7, PROMPT + wanted[:3], [0, 1, 2], num_prompt=6, num_computed=8)
    assert tokens(runner.run(plan([7], admits=[back], swap_in=[(0, 0), (2, 1), (3, 2)]))) == [wanted[3]]


def test_a_step_that_only_copies(form: str) -> None:
    runner = make_runner()
    runner.run(plan([0], [6], [admit(0, PROMPT, [5, 2])]))
    runner.run(plan(copies=[(5, 9), (2, 8)]))
    runner.pool.tensor[[5, 2]] = torch.nan
    assert tokens(runner.run(plan([0], replaced=[(0, 0, 9), (0, 1, 8)]))) == expected_tokens(PROMPT, 2)[1:]


def test_a_refused_plan_moves_nothing() -> None:
    runner = make_runner()
    out = tokens(runner.run(plan([0], [6], [admit(0, PROMPT, [5, 2])])))
    for change, message in (
        (dict(swap_out=[(5, 0)], rows=[1]), "row 1 is computed but empty"),
        (dict(retire=[0], swap_out=[(5, 0)], copies=[(5, 5)]), "block 5 is both"),
        (dict(retire=[0], swap_in=[(0, 5)]), "swap slot 0 is read but holds nothing"),
    ):
        with pytest.raises(PlanError, match=message):
            runner.run(plan(**change))
    out += tokens(runner.run(plan([0])))
    assert out == expected_tokens(PROMPT, 2)


def test_a_new_controller_finds_no_slot_filled() -> None:
    runner = make_runner()
    runner.run(plan([0], [6], [admit(0, PROMPT, [5, 2])], swap_out=[(5, 0)]))
    runner.reset()
    with pytest.raises(PlanError, match="swap slot 0 is read but holds nothing"):
        runner.run(plan(swap_in=[(0, 5)]))


def test_every_rank_branches_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def broadcast(self: TensorParallel, x: torch.Tensor) -> torch.Tensor:
        heard.append(x.shape)
        return x.copy_(torch.arange(70, 70 + len(x)))

    monkeypatch.setattr(TensorParallel, "broadcast", broadcast)
    config = WorkerConfig(**CONFIG | dict(rank=1, tensor_parallel_size=2))  # type: ignore[arg-type]
    runner = Runner(config, TensorParallel(1, 2), load_hash_decoder)
    runner.load()
    runner.allocate(20)
    report = runner.run(plan([0], [2], [admit(0, [1, 2], [0], **HOT)], branches=[(0, 3, 4), (0, 1, 5)]))
    assert report.token_ids == b"" and heard == [(3,)]
    assert [int(runner.table.token_ids[row, 2]) for row in (0, 3, 1)] == [70, 71, 72]


def test_the_swap_space_has_as_many_slots_as_blocks_fit() -> None:
    def slots(num_blocks: int, **config: object) -> int:
        return make_runner(num_blocks, **config).describe().num_swap_blocks

    assert slots(20, swap_space_bytes=0) == 0
    assert slots(20, swap_space_bytes=BLOCK_BYTES - 1) == 0
    assert slots(20, swap_space_bytes=5 * BLOCK_BYTES + 7) == 5
    assert slots(20, swap_space_bytes=1 << 30) == 20


def test_the_ranks_agree_on_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(TensorParallel, "least", lambda self, number, device: told.append(number) or 3)
    assert make_runner(20, swap_space_bytes=5 * BLOCK_BYTES).describe().num_swap_blocks == 3 and told == [5]


def test_speeds_are_measured_where_there_is_a_choice() -> None:
    runner = make_runner(num_slots=0)
    runner.warm_up()
    assert runner.describe().link_bytes_per_s == runner.describe().prefill_tokens_per_s == 0
    runner = make_runner()
    runner.warm_up()
    assert runner.describe().link_bytes_per_s > 0 and runner.describe().prefill_tokens_per_s > 0
    assert not runner.table.counts.num_known.any() and runner.pool.tensor.isnan().all()
    with pytest.raises(PlanError, match="holds nothing"):
        runner.run(plan(swap_in=[(0, 5)]))


@pytest.mark.parametrize(
    ("step_s", "token_s", "most", "longest", "measured"),
    [
        (0.0, 1e-9, 2048, 512, 1e9),
        (0.06, 1.3e-3, 2048, 64, 1 / 1.3e-3),  # a small model on a CPU
        (1e-2, 1e-5, 2048, 512, 2 * 512 / (1e-2 + 512e-5)),  # a device that such prompts do not fill
        (0.0, 0.1, 2048, 32, 10),
        (0.0, 1e-3, 7, 7, 1e3),
        (0.0, 1e-3, 50, 50, 1e3),
    ],
)
def test_prompts_are_timed_until_one_takes_a_while(
    step_s: float, token_s: float, most: int, longest: int, measured: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, lengths = [0.0], []

    def compute(num_tokens: int) -> None:
        lengths.append(num_tokens)
        now[0] += step_s + num_tokens * token_s

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    found = speed.measure_prefill(compute, most, TensorParallel.single(), torch.device("cpu"))
    assert found == pytest.approx(measured, rel=1e-3)
    assert lengths[-1] == longest == max(lengths)
    assert now[0] < max(0.3, 40 * token_s)
