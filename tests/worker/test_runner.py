"""The runtime, with the KV-sensitive hash model: plans by hand, and random ones in bulk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hash_model import VOCAB_SIZE, HashDecoder, expected_tokens, load_hash_decoder
from transformers import LlamaConfig
from worker_plans import admit, packed, plan, unpacked

from quire.protos import worker_pb2
from quire.worker import memory
from quire.worker.checks import PlanError
from quire.worker.config import WorkerConfig
from quire.worker.host import available_memory, usable_cores
from quire.worker.memory import PoolTooSmall, SwapTooLarge, count_blocks
from quire.worker.parallel import TensorParallel
from quire.worker.runner import Runner, default_threads, load_decoder

CONFIG = dict(model="hash", block_size=4, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64, num_threads=1)


@pytest.fixture(autouse=True)
def threads():
    """A runner sets the threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_runner(loader=load_hash_decoder, num_blocks: int = 40, **config) -> Runner:
    runner = Runner(WorkerConfig(**CONFIG | config), loader=loader)
    runner.load()
    runner.allocate(num_blocks)
    runner.pool.tensor.fill_(torch.nan)  # what nobody wrote, nobody may read
    return runner


def tokens(report: worker_pb2.StepReport) -> list[int]:
    return unpacked(report.token_ids)


def test_one_sequence_gets_the_tokens_that_its_prompt_calls_for():
    runner = make_runner()
    prompt = [7, 8, 9, 10, 11, 12]
    out = tokens(runner.run(plan([3], [6], [admit(3, prompt, [5, 2])])))
    # Two more fit into the second block; the third and the fourth come when they are needed.
    for extend in ([], [], [(3, 9)], [], [], [], [(3, 0)]):
        out += tokens(runner.run(plan([3], extend=extend)))
    assert out == expected_tokens(prompt, 8)


def test_a_report_names_its_plan():
    runner = make_runner()
    report = runner.run(plan([0], [2], [admit(0, [1, 2], [0])], epoch=4, step=9))
    assert (report.epoch, report.step, report.rank, report.incarnation) == (4, 9, 0, runner.incarnation)
    assert report.busy_us > 0
    assert 0 < runner.incarnation < 2**63


def test_a_step_without_rows_returns_no_tokens():
    runner = make_runner()
    runner.run(plan([0], [2], [admit(0, [1, 2], [0])]))
    assert runner.run(plan(retire=[0])).token_ids == b""
    assert runner.run(plan()).token_ids == b""


def test_a_step_in_which_nobody_samples():
    runner = make_runner()
    prompt = list(range(9))
    assert runner.run(plan([0], [5], [admit(0, prompt, [3, 1, 2])])).token_ids == b""
    assert tokens(runner.run(plan([0], [4]))) == expected_tokens(prompt, 1)


def test_readmission_continues_where_it_was():
    """Recompute after preemption, a restart and a shared prefix are all an admission with known tokens."""
    runner = make_runner()
    prompt = [3, 1, 4, 1, 5]
    wanted = expected_tokens(prompt, 8)
    first = tokens(runner.run(plan([0], [5], [admit(0, prompt, [0, 1])])))
    first += tokens(runner.run(plan([0])))
    runner.run(plan(retire=[0]))
    # Into other blocks, from nothing.
    again = admit(1, prompt + first, [7, 6], num_prompt=5)
    third = tokens(runner.run(plan([1], [7], [again])))
    # Beside it, on its first block, which is full and computed.
    beside = admit(2, prompt + first + third, [7, 9], num_prompt=5, num_computed=4)
    assert tokens(runner.run(plan([2, 1], [4, 1], [beside]))) == [wanted[3]] * 2
    assert first + third == wanted[:3]


@pytest.mark.parametrize("fault", ["lost", "stale", "misplaced"])
def test_the_hash_model_notices(fault):
    prompt = list(range(20, 32))
    runner = make_runner(num_blocks=8)
    runner.run(plan([0, 1], [4, 12], [admit(0, [9] * 4, [5]), admit(1, prompt, [0, 1, 2])]))
    blocks = {"lost": [0, 7, 2], "stale": [5, 1, 2], "misplaced": [1, 0, 2]}[fault]
    runner.pool.tensor[7] = 0
    damaged = admit(2, prompt, blocks, num_computed=11)
    whole = admit(3, prompt, [0, 1, 2], num_computed=11)
    out = tokens(runner.run(plan([2, 3], admits=[damaged, whole])))
    assert out[1] == expected_tokens(prompt, 1)[0] != out[0]


class Driver:
    """A controller of few words: keeps the truth, and drives a runner at random."""

    def __init__(self, seed: int, num_rows: int = 8, num_blocks: int = 60) -> None:
        self.rng = np.random.default_rng(seed)
        self.config = WorkerConfig(**CONFIG)
        self.runner = make_runner(num_blocks=num_blocks)
        self.free = list(self.rng.permutation(num_blocks))
        self.rows: dict[int, dict] = {}
        self.waiting: list[dict] = []
        self.done = 0

    def step(self) -> None:
        retire, admits, extend, rows, counts = [], [], [], [], []
        for row in list(self.rows):
            if self.rng.random() < 0.1:
                retire.append(row)
                self.release(row)
        for row in sorted(set(range(8)) - set(self.rows)):
            if self.rng.random() < 0.5:
                admits.append(self.admit(row))
        budget = self.config.max_num_batched_tokens
        for row in self.rng.permutation(list(self.rows)):
            sequence = self.rows[row]
            missing = len(sequence["tokens"]) - sequence["computed"]
            count = min(int(self.rng.integers(1, missing + 1)), budget)
            while count and len(sequence["blocks"]) * 4 < sequence["computed"] + count:
                if not self.free:
                    count = 0
                    break
                sequence["blocks"].append(self.free.pop())
                extend.append((row, sequence["blocks"][-1]))
            if count and sequence["computed"] + count < self.config.max_model_len:
                rows.append(row)
                counts.append(count)
                budget -= count
        report = self.runner.run(plan(rows, [] if set(counts) == {1} else counts, admits, retire, extend))
        self.apply(rows, counts, tokens(report))

    def admit(self, row: int) -> worker_pb2.Admit:
        if self.waiting and self.rng.random() < 0.7:
            sequence = self.waiting.pop()
        else:
            prompt = self.rng.integers(0, VOCAB_SIZE, self.rng.integers(1, 30)).tolist()
            sequence = dict(tokens=prompt, prompt=len(prompt))
        sequence |= dict(computed=0, blocks=[])
        self.rows[row] = sequence
        return admit(row, sequence["tokens"], [], num_prompt=sequence["prompt"])

    def release(self, row: int) -> None:
        sequence = self.rows.pop(row)
        self.free += sequence["blocks"]
        self.rng.shuffle(self.free)
        if len(sequence["tokens"]) < self.config.max_model_len - 2:
            self.waiting.append(sequence)

    def apply(self, rows: list[int], counts: list[int], sampled: list[int]) -> None:
        for row, count in zip(rows, counts, strict=True):
            sequence = self.rows[row]
            sequence["computed"] += count
            if sequence["computed"] == len(sequence["tokens"]):
                sequence["tokens"].append(sampled.pop(0))
        assert not sampled

    def check(self) -> None:
        for sequence in [*self.rows.values(), *self.waiting]:
            prompt, output = sequence["tokens"][: sequence["prompt"]], sequence["tokens"][sequence["prompt"] :]
            assert output == expected_tokens(prompt, len(output))
            self.done += len(output)


@pytest.mark.parametrize("seed", range(5))
def test_random_plans(seed):
    """Chunks, preemption, recompute and reuse of blocks, in any mixture: the tokens are the prompt's own."""
    driver = Driver(seed)
    for _ in range(300):
        driver.step()
    driver.check()
    assert driver.done > 100


def run_alone(sequence: list[int], settings: dict, n: int, row: int = 0, **config) -> list[int]:
    runner = make_runner(**config)
    out = tokens(runner.run(plan([row], [len(sequence)], [admit(row, sequence, range(16), **settings)])))
    while len(out) < n:
        out += tokens(runner.run(plan([row])))
    return out


HOT = dict(temperature=60.0, seed=11)


def test_sampling_does_not_depend_on_batch_order_or_restart():
    prompt = list(range(10))
    wanted = run_alone(prompt, HOT, 12)
    assert wanted != expected_tokens(prompt, 12)
    runner = make_runner(num_blocks=60)
    others = [admit(row, [row] * 8, range(20 + 5 * row, 25 + 5 * row), temperature=9.0, seed=11) for row in range(1, 4)]
    mine = admit(5, prompt, [9, 8, 7, 6, 5], **HOT)
    out = [tokens(runner.run(plan([1, 5, 2, 3], [8, 10, 8, 8], [*others, mine])))[1]]
    for _ in range(4):
        out.append(tokens(runner.run(plan([3, 2, 1, 5])))[3])
    # Lost with its worker, and continued elsewhere from the tokens already sent.
    runner = make_runner(num_blocks=60)
    again = admit(2, prompt + out, range(30, 40), num_prompt=10, **HOT)
    out += tokens(runner.run(plan([2], [15], [again])))
    while len(out) < 12:
        out += tokens(runner.run(plan([2])))
    assert out == wanted


def test_seeds_differ_and_repeat():
    prompt = list(range(5))
    one, two = run_alone(prompt, HOT, 8), run_alone(prompt, HOT | dict(seed=12), 8)
    assert one == run_alone(prompt, HOT, 8) != two
    assert run_alone(prompt, dict(temperature=60.0, seed=2**63 + 11), 8) != one


def test_bias_and_min_tokens():
    prompt = [1, 2, 3]
    natural = expected_tokens(prompt, 1)[0]
    bias = dict(bias_token_ids=[17], bias_values=[31.0])
    assert run_alone(prompt, bias, 4) == [17] * 4
    assert run_alone(prompt, dict(bias_token_ids=[natural], bias_values=[-100.0]), 1)[0] != natural
    # 17 is forbidden until there are three tokens of output.
    held = run_alone(prompt, bias | dict(stop_token_ids=[17], min_tokens=3), 5)
    assert held[:3] == expected_tokens(prompt, 3) and held[3:] == [17, 17]


def test_penalties_count_the_output_from_the_table():
    prompt = [1, 2, 3]
    bias = dict(bias_token_ids=[17, 18], bias_values=[40.0, 39.5])
    assert run_alone(prompt, bias | dict(presence_penalty=1.0), 3) == [17, 18, 17]
    assert run_alone(prompt, bias | dict(frequency_penalty=1.0), 5) == [17, 18, 17, 18, 17]
    assert run_alone([17, 2], bias | dict(repetition_penalty=2.0), 1) == [18]
    assert run_alone([17, 2], bias | dict(presence_penalty=2.0), 1) == [17]
    # After a recompute the output is still output.
    runner = make_runner()
    again = admit(0, [1, 2, 3, 17], range(4), num_prompt=3, presence_penalty=1.0, **bias)
    assert tokens(runner.run(plan([0], [4], [again]))) == [18]


def test_log_probabilities_of_the_rows_that_ask():
    runner = make_runner()
    bias = dict(bias_token_ids=[17], bias_values=[29.0])
    admits = [
        admit(0, [1, 2], [0]),
        admit(1, [1, 2], [1], logprobs=0),
        admit(2, [1, 2], [2], logprobs=2, **bias, temperature=0.01),
    ]
    report = runner.run(plan([2, 0, 1], [2, 2, 2], admits))
    natural = expected_tokens([1, 2], 1)[0]
    assert tokens(report) == [natural] * 3
    first, second = report.logprobs
    assert (first.position, second.position) == (0, 2)
    assert unpacked(first.token_ids) == [natural, natural, 17]
    # Before temperature, after bias: e^30 against e^29, and nothing else that counts.
    np.testing.assert_allclose(np.exp(np.frombuffer(first.values, "<f4")), [0.731, 0.731, 0.269], atol=1e-3)
    assert unpacked(second.token_ids) == [natural] and first.sampled_rank == second.sampled_rank == 1


def test_a_row_with_broken_logits_gets_minus_one_and_the_others_their_tokens():
    class Broken(HashDecoder):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = super().logits(hidden)
            logits[0, 5] = torch.nan
            return logits

    runner = make_runner(loader=lambda *_: Broken())
    admits = [admit(0, [1, 2], [0], temperature=0.5, top_p=0.9, logprobs=1), admit(1, [1, 2], [1], temperature=0.5)]
    report = runner.run(plan([0, 1], [2, 2], admits))
    assert tokens(report) == [-1, expected_tokens([1, 2], 1)[0]]
    assert unpacked(report.logprobs[0].token_ids)[0] == -1
    # Its row holds a token that exists: a step sent ahead can be computed.
    assert runner.table.token_ids[0, 2] == 0
    assert tokens(runner.run(plan([0, 1])))[1] == expected_tokens([1, 2], 2)[1]


def test_ranks_other_than_the_first_take_its_tokens_and_return_none(monkeypatch):
    heard = []

    def broadcast(self, x):
        heard.append((x.shape, x.dtype))
        return x.fill_(77)

    monkeypatch.setattr(TensorParallel, "broadcast", broadcast)
    runner = Runner(
        WorkerConfig(**CONFIG | dict(rank=1, tensor_parallel_size=2)), TensorParallel(1, 2), load_hash_decoder
    )
    runner.load()
    runner.allocate(20)
    monkeypatch.setattr(runner.table.sampler, "sample", lambda *_: pytest.fail("only rank 0 samples"))
    report = runner.run(plan([0], [2], [admit(0, [1, 2], [0], logprobs=1)]))
    assert (report.rank, report.token_ids, list(report.logprobs)) == (1, b"", [])
    assert runner.table.token_ids[0, 2] == 77
    assert heard == [((1,), torch.int64)]


def test_a_refused_plan_changes_nothing():
    runner = make_runner()
    out = tokens(runner.run(plan([0], [2], [admit(0, [1, 2], [0])])))
    with pytest.raises(PlanError, match="row 1 is computed but empty"):
        runner.run(plan([0, 1]))
    assert out + tokens(runner.run(plan([0]))) == expected_tokens([1, 2], 2)


@pytest.mark.parametrize("config", [{}, {"max_num_seqs": 1}, {"max_num_batched_tokens": 1}, {"max_model_len": 4}])
def test_warm_up_leaves_no_trace(config):
    runner = make_runner(**config)
    runner.warm_up()
    assert not runner.table.counts.num_known.any()
    assert runner.pool.tensor.isnan().all()


def num_sampled(batch) -> int:
    return len(batch.token_ids if batch.sample_index is None else batch.sample_index)


def test_the_costliest_step_fits_the_limits():
    runner = make_runner(max_num_seqs=5, max_num_batched_tokens=63)
    steps = []

    def forward(batch, _):
        steps.append((np.diff(batch.rows.query_starts).tolist(), batch.rows.seq_lens.tolist()))
        return torch.zeros(num_sampled(batch)).long()

    runner.decoder.forward = forward
    runner._worst_step()
    assert steps == [
        ([13, 13, 13, 12, 12], [13, 13, 13, 12, 12]),
        ([63], [64]),
        ([1] * 5, [64, 32, 21, 16, 12]),
    ]


@pytest.mark.parametrize("config", [{"max_num_seqs": 1}, {"max_num_batched_tokens": 8}, {"max_model_len": 2}])
def test_every_rehearsal_fits_the_limits(config):
    runner = make_runner(**config)
    runner.decoder.forward = lambda batch, _: torch.zeros(num_sampled(batch)).long()
    runner._worst_step()


def test_reset_empties_the_rows():
    runner = make_runner()
    runner.run(plan([0], [2], [admit(0, [1, 2], [0])]))
    runner.reset()
    assert tokens(runner.run(plan([0], [2], [admit(0, [1, 2], [0])]))) == expected_tokens([1, 2], 1)


def test_describe_and_pool():
    runner = make_runner(num_blocks=30)
    description = runner.describe()
    assert (description.num_blocks, description.block_size, description.bytes_per_block) == (30, 4, 4 * 2 * 4)
    assert (description.device, description.dtype, description.tensor_parallel_size) == ("cpu", "float32", 1)
    assert description.incarnation == runner.incarnation
    assert runner.pool.tensor.shape == (30, 1, 2, 4, 1, 1)
    assert runner.pool.tensor[3].is_contiguous()


def test_threads_are_the_cores_divided(monkeypatch):
    monkeypatch.setattr("quire.worker.runner.usable_cores", lambda: 12)
    assert (default_threads(1), default_threads(5), default_threads(99)) == (12, 2, 1)


def test_cores_are_those_of_the_affinity_and_the_control_group(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    for limit, cores in (
        (None, 12), ("max 100000", 12), ("250000 100000", 3), ("20000 100000", 1), ("9900000 100000", 12)
    ):  # fmt: skip
        if limit is not None:
            (tmp_path / "cpu.max").write_text(f"{limit}\n")
        assert usable_cores(tmp_path) == cores


def measure(**config) -> int:
    return count_blocks(WorkerConfig(**CONFIG | config), 1000, *[lambda: pytest.fail("on a CPU")] * 2)


def test_the_number_of_blocks_on_a_cpu(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 200_000)
    assert measure() == 80
    assert measure(tensor_parallel_size=2) == 40
    assert measure(max_num_seqs=4) == 64  # what four sequences of 64 tokens can use
    assert measure(kv_cache_memory_bytes=50_500) == 50
    assert measure(kv_cache_memory_bytes=50_500, num_gpu_blocks_override=17) == 17


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({"num_gpu_blocks_override": 15}, "15 fit into num_gpu_blocks_override; raise it.*at most 60"),
        ({"kv_cache_memory_bytes": 15_999}, "16 KV blocks of 1000 bytes.*kv_cache_memory_bytes of 15999; raise it"),
        ({}, "12000 bytes, 40% of the available memory"),
    ],
)
def test_a_pool_too_small_is_refused_with_what_to_change(monkeypatch, config, advice):
    monkeypatch.setattr(memory, "available_memory", lambda: 30_000)
    with pytest.raises(PoolTooSmall, match=advice):
        measure(**config)


def test_a_swap_space_that_the_machine_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 100_000)
    pool = dict(num_gpu_blocks_override=40)
    assert measure(**pool, swap_space_bytes=1 << 40) == 40  # no more is used than the pool has
    monkeypatch.setattr(memory, "available_memory", lambda: 79_999)
    with pytest.raises(SwapTooLarge, match=r"40000 bytes of swap space .* into the 39999 bytes .* lower --swap-space"):
        measure(**pool, swap_space_bytes=1 << 40)
    with pytest.raises(SwapTooLarge, match=r"for each of 2 ranks .* -1 bytes"):
        measure(**pool, swap_space_bytes=1000, tensor_parallel_size=2)
    assert measure(**pool, swap_space_bytes=39_999) == 40


def test_memory_that_is_available(tmp_path):
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\n")
    assert available_memory(meminfo, group) == 500 * 1024
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    assert available_memory(meminfo, group) == 500 * 1024
    (group / "memory.max").write_text("100000\n")
    (group / "memory.current").write_text("70000\n")
    (group / "memory.stat").write_text("anon 10000\nactive_file 20000\ninactive_file 15000\n")
    assert available_memory(meminfo, group) == 65_000
    assert available_memory() > 0


def test_the_number_of_blocks_on_a_gpu(monkeypatch):
    steps = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 300_000)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 250_000)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (700_000, 1_000_000))
    config = WorkerConfig(**CONFIG | dict(device="cuda", gpu_memory_utilization=0.9))
    # 900 000 less 300 000 at the peak, 50 000 of others and 40 000 of graphs.
    assert count_blocks(config, 1000, lambda: steps.append(1), lambda: 40_000) == 510
    assert steps == [1]
    monkeypatch.setattr(memory, "staging_bytes", lambda block_bytes: 20 * block_bytes)
    swapping = WorkerConfig(**CONFIG | dict(device="cuda", gpu_memory_utilization=0.9, swap_space_bytes=1))
    assert count_blocks(swapping, 1000, lambda: None, lambda: 40_000) == 490
    with pytest.raises(PoolTooSmall, match=r"16 KV blocks of 100000 bytes.*0.9 of 1000000.*40000 for CUDA graphs"):
        count_blocks(config, 100_000, lambda: None, lambda: 40_000)


def test_measure_uses_the_models_own_block():
    runner = Runner(WorkerConfig(**CONFIG | dict(kv_cache_memory_bytes=32 * 100)), loader=load_hash_decoder)
    runner.load()
    assert runner.measure() == 100


def test_packed_counts_that_are_all_one_are_a_decode_batch():
    runner = make_runner()
    runner.run(plan([0, 1], [2, 3], [admit(0, [1, 2], [0]), admit(1, [1, 2, 3], [1])]))
    explicit = plan([0, 1])
    explicit.num_tokens = packed([1, 1])
    assert tokens(runner.run(explicit)) == [expected_tokens(list(range(1, 3 + i)), 2)[1] for i in range(2)]


def test_a_real_decoder_computes_the_same_whole_in_chunks_and_anywhere_in_the_pool(make_model):
    folder, _ = make_model(
        LlamaConfig(
            vocab_size=120,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    runner = make_runner(loader=load_decoder, model=str(folder), num_blocks=60)
    prompt = np.random.default_rng(0).integers(0, 120, 17).tolist()

    admits = [admit(0, prompt, range(8), logprobs=3), admit(1, prompt, range(30, 20, -1), logprobs=3)]
    report = runner.run(plan([0, 1], [17, 9], admits))
    whole, wholes = tokens(report), [report.logprobs[0]]
    report = runner.run(plan([1, 0], [8, 1]))
    parts, more = tokens(report)
    chunks, wholes = [parts], [*wholes, report.logprobs[1]]
    values = [report.logprobs[0]]
    whole.append(more)
    for _ in range(10):
        report = runner.run(plan([1, 0]))
        chunks.append(tokens(report)[0])
        whole.append(tokens(report)[1])
        values.append(report.logprobs[0])
        wholes.append(report.logprobs[1])
    assert chunks == whole[:-1] and len(set(whole)) > 3
    for mine, other in zip(values, wholes, strict=False):
        np.testing.assert_allclose(
            np.frombuffer(mine.values, "<f4"), np.frombuffer(other.values, "<f4"), atol=1e-4, rtol=0
        )
