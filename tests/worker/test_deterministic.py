"""With `deterministic`, what a sequence gets is the same to the last bit in whatever company, cut into whatever chunks,
computed again after a preemption, and on however many threads: operation by operation, layer by layer, and, under
random schedules, in the tokens and log-probabilities of whole outputs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from paged_case import Case
from random_models import build_model
from stepper import Stepper
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, OPTConfig, PretrainedConfig, Qwen3Config

from quire.cluster import wire
from quire.kernels.activation import gelu, relu, silu_and_mul
from quire.kernels.attention import PagedRows, paged_attention
from quire.kernels.rotary import apply_rotary, cos_sin_table
from quire.kernels.sampling import Columns, log_probabilities, pick
from quire.protos import worker_pb2
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.engine import Engine
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import Logprobs, StepPlan, StepResult
from quire.scheduler.request import ModelLimits, Request
from quire.scheduler.scheduler import Scheduler
from quire.worker.config import WorkerConfig
from quire.worker.layers import attention as layers
from quire.worker.layers.embedding import Head
from quire.worker.layers.linear import Linear
from quire.worker.layers.norm import LayerNorm, RMSNorm
from quire.worker.models.decoder import Decoder
from quire.worker.models.spec import ModelSpec
from quire.worker.parallel import TensorParallel
from quire.worker.runner import Runner
from quire.worker.weights import load_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
THREADS = (1, 2, 3)
SINGLE = TensorParallel.single()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Tests here change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also where both are NaN, and not where one is -0."""
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# -- single operations

NUM_ROWS = 67
WIDTH = 1031
"""Neither fills whole vectors; together they are more elements than torch leaves to one thread."""

Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Rows [T, ...] and their numbers [T], by which a row finds its own settings, to results [T, ...]."""


def _filled(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape).to(parameter.dtype)
    return module


def _linear(inputs: int, outputs: int, bias: bool) -> Callable[[torch.dtype], Operation]:
    def make(dtype: torch.dtype) -> Operation:
        layer = _filled(Linear(inputs, outputs, bias, dtype, CPU))
        layer.pack(deterministic=True)
        return lambda x, _: layer(x[:, :inputs])

    return make


def _head(dtype: torch.dtype) -> Operation:
    head = _filled(Head(201, WIDTH, SINGLE, dtype, CPU))
    head.pack(deterministic=True)
    return lambda x, _: head(x)


def _rms_norm(dtype: torch.dtype) -> Operation:
    norm = _filled(RMSNorm(WIDTH, 1e-5, dtype, CPU))
    return lambda x, _: torch.cat([norm(x), *norm.add(x, x.flip(-1))], -1)


def _head_norm(dtype: torch.dtype) -> Operation:
    """Of single heads, which lie apart in the fused projection's output."""
    norm = _filled(RMSNorm(13, 1e-6, dtype, CPU))
    return lambda x, _: norm(x[:, : 13 * 15].unflatten(-1, (-1, 13)).split((9, 6), 1)[0])


def _layer_norm(affine: bool) -> Callable[[torch.dtype], Operation]:
    def make(dtype: torch.dtype) -> Operation:
        norm = _filled(LayerNorm(WIDTH, 1e-5, affine, dtype, CPU))
        return lambda x, _: torch.cat([norm(x), *norm.add(x, x.flip(-1))], -1)

    return make


def _rotary(dtype: torch.dtype) -> Operation:
    table = cos_sin_table(torch.rand(7), NUM_ROWS)

    def rotate(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        q, k = x[:, : 14 * 9].unflatten(-1, (-1, 14)).split((6, 3), 1)
        return torch.cat(apply_rotary(q, k, number, table), 1)

    return rotate


OPERATIONS: dict[str, Callable[[torch.dtype], Operation]] = {
    "linear": _linear(WIDTH, 203, bias=False),
    "linear with bias": _linear(131, 517, bias=True),
    "linear, whole vectors": _linear(256, 128, bias=True),
    "head": _head,
    "RMS norm": _rms_norm,
    "RMS norm of heads": _head_norm,
    "layer norm": _layer_norm(affine=True),
    "plain layer norm": _layer_norm(affine=False),
    "rotary": _rotary,
    "silu and mul": lambda dtype: lambda x, _: silu_and_mul(x[:, :-1], deterministic=True),
    "silu and mul, wide": lambda dtype: lambda x, _: silu_and_mul(torch.cat([x, x.flip(-1)], -1), deterministic=True),
    "gelu": lambda dtype: lambda x, _: gelu(x, deterministic=True),
    "gelu by tanh": lambda dtype: lambda x, _: gelu(x, tanh=True, deterministic=True),
    "relu": lambda dtype: lambda x, _: relu(x),
    "sum": lambda dtype: lambda x, _: x + x.flip(-1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_row_does_not_depend_on_its_neighbours(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    _check_rows(OPERATIONS[name](dtype), (3 * torch.randn(NUM_ROWS, WIDTH)).to(dtype))


@pytest.mark.parametrize("vocab_size", [151, 1031, 40009])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_s_log_probabilities_do_not_depend_on_its_neighbours(vocab_size: int, dtype: torch.dtype) -> None:
    """Nor on how many of them the greediest row wants; logits that were 16-bit numbers are often equal."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(11, vocab_size)).to(dtype).float()
    tokens, wanted = logits.argmin(-1), torch.arange(len(logits)) % 7

    def scored(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        ids, values, ranks = log_probabilities(x, tokens[number], int(wanted[number].max()))
        columns = torch.arange(8)
        own = columns <= wanted[number, None]
        ids, values = (F.pad(part, (0, 8 - part.shape[1])).masked_fill(~own, 0) for part in (ids, values))
        return torch.cat([ids, values.view(torch.int32).long(), ranks[:, None]], -1)

    _check_rows(scored, logits)


@pytest.mark.parametrize("vocab_size", [151, 1031, 40009])
def test_a_row_s_pick_does_not_depend_on_its_neighbours(vocab_size: int) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(18, vocab_size)
    rng = np.random.default_rng(0)

    def choose(*values: float) -> np.ndarray:
        return rng.choice(np.array(values, np.float32), len(logits))

    columns = Columns(
        temperature=choose(0, 0.7, 1, 1.3),
        top_k=choose(0, 0, 3, 50).astype(np.int32),
        top_p=choose(1, 0.5, 0.9),
        min_p=choose(0, 0, 0.01),
        seed=rng.integers(1 << 63, size=len(logits)).astype(np.uint64),
        position=rng.integers(1000, size=len(logits)),
    )

    def picked(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        own = {name: getattr(columns, name)[number.numpy()] for name in Columns.__slots__}
        return pick(x, Columns(**own))

    _check_rows(picked, logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "uncompiled", "window", "alibi", "float8", "one key-value head"])
def test_a_token_s_attention_does_not_depend_on_its_chunk(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "window": dict(window=19), "alibi": dict(alibi=True), "float8": dict(float8=True),
        "one key-value head": dict(heads=(3, 1), size=13, block_size=8),
    }.get(name, {})  # fmt: skip
    if name == "uncompiled":
        monkeypatch.setattr("quire.kernels.cpu.attention._compiled_loops", lambda: None)
    case = Case([(300, 40), (7, 1), (64, 64), (530, 1), (257, 3)], dtype=dtype, deterministic=True, **options)
    owner = np.repeat(np.arange(len(case.rows.seq_lens)), np.diff(case.rows.query_starts))
    ends = (case.rows.seq_lens - case.rows.query_starts[1:])[owner] + np.arange(len(owner)) + 1

    def attend(tokens: list[int]) -> torch.Tensor:
        """Of tokens that follow each other in the case; those of a row are a chunk."""
        rows, starts, lengths = np.unique(owner[tokens], return_index=True, return_counts=True)
        part = PagedRows(
            case.rows.block_tables[torch.from_numpy(rows)],
            np.array([*starts, len(tokens)], np.int32),
            ends[tokens][starts + lengths - 1].astype(np.int32),
            deterministic=True,
        )
        arguments = (part, case.scale, case.window, case.slopes, case.kv_scales)
        return paged_attention(case.q[tokens], case.kv_layer, *arguments)

    torch.set_num_threads(1)
    count = len(owner)
    alone = torch.cat([attend([token]) for token in range(count)])
    for threads, (start, stop) in itertools.product(THREADS, [(0, count), (1, 17), (17, 50), (40, count)]):
        torch.set_num_threads(threads)
        same = same_bits(attend(list(range(start, stop))), alone[start:stop])
        assert same, f"on {threads} threads, tokens {start} to {stop} together"


def _check_rows(operation: Operation, x: torch.Tensor) -> None:
    """Each row alone, on one thread, against batches of all kinds on several numbers of threads."""
    number = torch.arange(len(x))
    torch.set_num_threads(1)
    alone = torch.cat([operation(x[i : i + 1].clone(), number[i : i + 1]) for i in range(len(x))])
    total = len(x)
    batches = [number, number[1:], number[2:5], number[4:], number[: total // 2], torch.randperm(total)]
    for count, rows in itertools.product(THREADS, batches):
        torch.set_num_threads(count)
        got = operation(x[rows], rows)
        wrong = [int(row) for i, row in enumerate(rows) if not same_bits(got[i], alone[row])]
        assert not wrong, f"on {count} threads, in a batch of {len(rows)}, rows {wrong} differ"


# -- whole models

SMALL: dict[str, Any] = dict(
    vocab_size=199, hidden_size=56, intermediate_size=77, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=384,
)  # fmt: skip
OPT: dict[str, Any] = dict(
    vocab_size=203, hidden_size=52, ffn_dim=91, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=384, dropout=0.0,
)  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    # Its MLP has so many elements that torch shares them out among threads.
    "llama": lambda: LlamaConfig(**SMALL | dict(intermediate_size=1031)),
    "qwen3": lambda: Qwen3Config(
        **SMALL, head_dim=18, attention_bias=True, tie_word_embeddings=True, use_sliding_window=True,
        sliding_window=43, layer_types=WINDOWS,
    ),
    "opt": lambda: OPTConfig(**OPT, activation_function="gelu"),
    "opt, norms last": lambda: OPTConfig(
        **OPT, activation_function="gelu_new", do_layer_norm_before=False, word_embed_proj_dim=20
    ),
}  # fmt: skip
CASES = [
    ("llama", "float32"), ("llama", "bfloat16"), ("qwen3", "float32"), ("qwen3", "bfloat16"),
    ("opt", "float32"), ("opt", "bfloat16"), ("opt, norms last", "float32"), ("opt, norms last", "float16"),
]  # fmt: skip
LIVES = 12
"""Random schedules of each case: 108 in all."""

MAX_MODEL_LEN = 264
BLOCK_SIZE = 4
LENGTHS = (250, 1, 50, 33, 24, 17, 9)
"""Of the prompts; attention cuts a context at multiples of 256 tokens, which the first one passes."""
NUM_TOKENS = (8, 24, 12, 20, 18, 24, 24)
"""Of output."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("model")
        build_model(config(), folder)
        made[name] = str(folder)
    return made


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_no_layer_notices_how_tokens_are_batched(name: str, dtype: str, folders: dict[str, str]) -> None:
    """What goes into and comes out of every layer, for each token by itself and in chunks beside another sequence."""
    torch.set_num_threads(1)
    spec = ModelSpec.from_pretrained(folders[name])
    model = load_model(WorkerConfig(folders[name], dtype=dtype, deterministic=True), spec, SINGLE)
    texts = {row: [(i * i + 7 * row) % spec.vocab_size for i in range(length)] for row, length in enumerate((90, 41))}
    alone: dict[int, list[dict[str, torch.Tensor]]] = {}
    for row, text in texts.items():
        stepper = Stepper(model)
        alone[row] = [_trace(stepper, {row: [token]}) for token in text]
    together = Stepper(model, seed=1)
    done = dict.fromkeys(texts, 0)
    for chunks in ((64, 1), (1, 7), (0, 3), (2, 30), (23, 0)):
        new = {row: texts[row][done[row] : done[row] + n] for row, n in enumerate(chunks) if n}
        torch.set_num_threads(sum(chunks) % 3 + 1)
        seen = _trace(together, new)
        tokens = [(row, done[row] + i) for row, text in new.items() for i in range(len(text))]
        for place, values in seen.items():
            for i, (row, position) in enumerate(tokens):
                assert same_bits(values[i], alone[row][position][place][0]), (place, row, position)
        for row, text in new.items():
            done[row] += len(text)
    assert done == {row: len(text) for row, text in texts.items()}


def _trace(stepper: Stepper, new: dict[int, list[int]]) -> dict[str, torch.Tensor]:
    """Inputs and results of all layers, in the order in which they are computed, a row for each token of the step."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [stepper.model.register_forward_pre_hook(_make_deterministic)]
    for name, module in stepper.model.named_modules():
        if not name or not list(module.children()):
            hooks += _watch(name, module, seen)
    seen["logits"] = stepper.step(new, sample="all")
    for hook in hooks:
        hook.remove()
    return seen


def _watch(name: str, module: nn.Module, seen: dict[str, torch.Tensor]) -> list[Any]:
    def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(arguments[0], torch.Tensor):
            seen[f"what goes into {name}"] = arguments[0].clone()

    def after(_: nn.Module, __: tuple[Any, ...], result: torch.Tensor) -> None:
        seen[f"what comes out of {name or 'the decoder'}"] = result.clone()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _make_deterministic(_: nn.Module, arguments: tuple[Any, ...]) -> None:
    arguments[0].rows.deterministic = True


# -- whole outputs, under random schedules


@dataclass(frozen=True, slots=True)
class Token:
    token_id: int
    logprob_ids: tuple[int, ...]
    logprob_bits: bytes
    rank: int

    @classmethod
    def of(cls, token_id: int, logprobs: Logprobs | None) -> Token:
        assert logprobs is not None
        return cls(token_id, logprobs.token_ids, np.array(logprobs.values, np.float32).tobytes(), logprobs.rank)


Outputs = dict[tuple[str, int], list[Token]]
"""By request and sample."""


@dataclass
class RunnerExecutor:
    """An `Executor` on a runner in this process; plans wait in a queue, as deep as the engine runs ahead."""

    runner: Runner

    def __post_init__(self) -> None:
        self.queue: list[worker_pb2.StepPlan] = []

    def submit(self, plan: StepPlan) -> None:
        self.queue.append(wire.encode_plan(plan, epoch=1))

    def collect(self) -> StepResult:
        return wire.decode_report(self.runner.run(self.queue.pop(0)))


@pytest.mark.parametrize(
    ("name", "dtype", "kv_cache_dtype"), [*((*case, None) for case in CASES), ("llama", "float32", "fp8")]
)
def test_outputs_are_equal_to_the_last_bit_under_random_schedules(
    name: str, dtype: str, kv_cache_dtype: str | None, folders: dict[str, str]
) -> None:
    runner = make_runner(folders[name], dtype, deterministic=True, kv_cache_dtype=kv_cache_dtype)
    requests = make_requests(runner)
    expected = one_by_one(runner, requests)
    preemptions = 0
    for number in range(LIVES):
        rng = random.Random(f"{name} {dtype} {number}")
        got, preempted = live(rng, runner, requests)
        preemptions += preempted
        for key, tokens in got.items():
            assert tokens == expected[key], f"schedule {number}: {describe(key, tokens, expected[key])}"
    assert preemptions >= LIVES // 4  # the pools are small enough to matter


def test_without_the_flag_outputs_do_depend_on_the_schedule(folders: dict[str, str]) -> None:
    """The same check sees what the flag is there for; a machine on which plain products agree has nothing to show."""
    for name, dtype in CASES:
        runner = make_runner(folders[name], dtype, deterministic=False)
        requests = make_requests(runner)
        expected = one_by_one(runner, requests)
        for number in range(3):
            got, _ = live(random.Random(number), runner, requests)
            if any(tokens != expected[key] for key, tokens in got.items()):
                return
    pytest.skip("plain products happen to agree here")


@pytest.mark.parametrize("fault", ["a product", "attention"])
def test_one_operation_that_looks_at_the_batch_is_noticed(
    fault: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the check: the smallest difference, in one layer, for tokens that are not alone in their step."""
    runner = make_runner(folders["llama"], "float32", deterministic=True)
    requests = make_requests(runner)
    expected = one_by_one(runner, requests)
    decoder = runner.decoder
    assert isinstance(decoder, Decoder)
    layer = decoder.layers[0]
    if fault == "attention":
        attend = layers.paged_attention
        monkeypatch.setattr(
            layers, "paged_attention", lambda q, *rest: attend(q, *rest) * (1 + 2.0**-23 * (len(q) % 2))
        )
    else:
        product = layer.mlp.down.product
        layer.mlp.down.product = lambda x, weight, bias: product(x, weight, bias) * (1 + 2.0**-23 * (len(x) % 2))
    got, _ = live(random.Random(0), runner, requests)
    assert any(tokens != expected[key] for key, tokens in got.items())


def make_runner(folder: str, dtype: str, deterministic: bool, kv_cache_dtype: str | None = None) -> Runner:
    config = WorkerConfig(
        folder,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=len(LENGTHS) + 1,
        max_num_batched_tokens=600,
        num_gpu_blocks_override=3 * MAX_MODEL_LEN // BLOCK_SIZE,
        num_threads=1,
        deterministic=deterministic,
    )
    runner = Runner(config)
    runner.load()
    runner.allocate(runner.measure())
    runner.pool.tensor.fill_(torch.nan)
    return runner


def make_requests(runner: Runner) -> list[Request]:
    """One for each way of sampling, one of them with two samples."""
    ways: list[dict[str, Any]] = [
        dict(temperature=0, logprobs=3),
        dict(temperature=1.2, logprobs=0),
        dict(temperature=0.9, top_p=0.9, logprobs=2),
        dict(temperature=1, top_k=20, top_p=0.95, n=2, logprobs=1),
        dict(temperature=0, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=5),
        dict(temperature=0.8, min_p=0.05, presence_penalty=0.5, logprobs=1),
        dict(temperature=0, logit_bias={5: 2.5, 11: -1.5}, min_tokens=4, stop_token_ids=(5,), logprobs=2),
    ]
    vocab_size = runner.decoder.spec.vocab_size
    limits = ModelLimits(vocab_size, MAX_MODEL_LEN, (1,))
    rng = random.Random(0)
    return [
        Request.checked(
            str(number),
            [rng.randrange(vocab_size) for _ in range(length)],
            SamplingParams(max_tokens=max_tokens, **way),
            seed=rng.getrandbits(64),
            limits=limits,
        )
        for number, (length, max_tokens, way) in enumerate(zip(LENGTHS, NUM_TOKENS, ways, strict=True))
    ]


def one_by_one(runner: Runner, requests: list[Request]) -> Outputs:
    """What each sample is when nothing else runs, on one thread: prompts whole, and one token at a time after that."""
    torch.set_num_threads(1)
    outputs: Outputs = {}
    config = SchedulerConfig(
        num_blocks=runner.pool.num_blocks, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN, max_num_seqs=1,
        max_num_batched_tokens=512,
    )  # fmt: skip
    for request in requests:
        runner.reset()
        engine = Engine(Scheduler(config), RunnerExecutor(runner))
        engine.scheduler.add(request)
        while engine.scheduler.has_work:
            note(engine, outputs)
    return outputs


def live(rng: random.Random, runner: Runner, requests: list[Request]) -> tuple[Outputs, int]:
    """Most of the requests in some order under a random schedule; also returns the number of preemptions."""
    runner.reset()
    few = rng.random() < 0.75  # without the long one the pool may be smaller
    upcoming = rng.sample(requests[few:], len(requests) - few - rng.choice([0, 0, 1, 2]))
    longest = max(request.max_len for request in upcoming)
    max_num_seqs = rng.choice([2, 4, 8, 8])
    config = SchedulerConfig(
        num_blocks=-(-longest // BLOCK_SIZE) + rng.choice([0, 0, 1, 30]),
        block_size=BLOCK_SIZE,
        max_model_len=longest,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice([0, rng.randint(1, 15), rng.randint(16, 90), 500]),
        watermark=rng.choice([0.0, 0.05]),
    )
    engine = Engine(Scheduler(config), RunnerExecutor(runner), run_ahead=rng.choice([0, 1, 2]))
    haste = rng.choice([0.2, 1.0, 1.0])
    outputs: Outputs = {}
    while upcoming or engine.scheduler.has_work:
        while upcoming and (rng.random() < haste or not engine.scheduler.has_work):
            engine.scheduler.add(upcoming.pop())
        # Not often: where other processes have the cores, two threads wait for each other longer than they compute.
        torch.set_num_threads(2 if rng.random() < 0.1 else 1)
        note(engine, outputs)
    return outputs, engine.scheduler.counters.num_preemptions


def note(engine: Engine, outputs: Outputs) -> None:
    for event in engine.step():
        key = event.sequence.request.request_id, event.sequence.index
        outputs.setdefault(key, []).append(Token.of(event.token_id, event.logprobs))


def describe(key: tuple[str, int], got: list[Token], want: list[Token]) -> str:
    index = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    pair = [[*tokens, None][index] if index <= len(tokens) else None for tokens in (got, want)]
    return f"request {key[0]}, sample {key[1]}, token {index}: {pair[0]} instead of {pair[1]}"
