"""What a user asks for, and what is then in force.

`EngineConfig` and `ServeConfig` hold the choices as given, None where the choice is ours; `resolve` looks at the model
and the machine and returns a `ResolvedEngine`, in which nothing is left open. Whatever cannot work is refused here, in
one sentence and before a process is started. Cheap to import: the standard library and our own plain modules.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import quire.worker.config
from quire.scheduler.config import PREEMPTION_MODES, SchedulerConfig
from quire.scheduler.request import ModelLimits
from quire.worker.config import WorkerConfig
from quire.worker.host import packs_bfloat16
from quire.worker.models.checkpoint import open_checkpoint
from quire.worker.models.spec import DTYPES, ModelSpec

if TYPE_CHECKING:
    from quire.cluster.prefixes import Prefix
    from quire.protos import generation_pb2, worker_pb2

DEVICES = ("cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")
LOOPBACK = ("127.0.0.1", "::1", "localhost")

BUNDLED_NAME = "quire-demo"
CPU_MAX_MODEL_LEN = 4096
"""On a CPU a longer context is had by asking for it: its prompts take minutes and its KV cache gigabytes."""
MAX_NUM_SEQS = {"cuda": 256, "cpu": 64}
MAX_NUM_BATCHED_TOKENS = {"cuda": 2048, "cpu": 512}
"""On a CPU larger steps bring no more tokens per second, and who has just come waits for them to end."""
PREFILL_FLOOR = {"cuda": 0, "cpu": 64}
"""On a CPU a token of a prompt costs nearly as much beside decodes as anywhere: a hundred of them beside eight decodes
make a step five times as long."""
RUN_AHEAD = {"cuda": 1, "cpu": 0}
"""On a CPU a plan that waits for the cores hides nothing, while what a step has brought is sent on these same cores;
and without it whoever comes is in the very next step."""
OFFLINE_NUM_BATCHED_TOKENS = 2048
"""Where nobody waits for a first token."""
SWAP_SPACE_GIB = 4.0
MAX_BLOCK_SIZE = 1024
WAITING_PER_SEQUENCE = 8


class ConfigError(ValueError):
    """A setting that cannot work, in one sentence that says what to change."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The model and how to run it."""

    model: str | None = None
    """A local folder, or a name that is in the local Hugging Face cache. None: the bundled model."""
    device: str = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    """auto: as `dtype`; fp8: e4m3."""
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    prefill_floor: int | None = None
    """Tokens of prompts that a step may always compute beside decodes; 0: all that fit. None: by device."""
    max_num_waiting: int | None = None
    swap_space: float | None = None
    """GiB of host memory for each rank's preempted requests. None: 4 on a GPU. On a CPU none, unless preemption is by
    swap: there it is the pool's own memory, and better given to the pool."""
    preemption_mode: str = "auto"
    enable_prefix_caching: bool = True
    seed: int = 0
    load_format: str = "auto"
    deterministic: bool = False
    """What a request gets does not depend on what runs beside it, to the last bit."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    run_ahead: int | None = None
    """Steps sent to the workers beyond the one whose tokens are awaited. None: by device."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """An engine and how it is reached."""

    engine: EngineConfig = EngineConfig()
    served_model_names: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    grpc_port: int = 50051
    """0 takes any free port."""
    address: str | None = None
    """A Ray cluster to join. None: a local one is started."""
    step_timeout: float | None = None
    """Seconds after which a step counts as hung. None: chosen by the device."""
    drain_timeout: float = 60.0
    """Seconds that requests in progress may take to finish after a signal."""
    reserved_prefixes: tuple[Prefix, ...] = ()
    """Kept from the start."""
    record: str | None = None
    """File to which the controller writes what its scheduler is told and decides."""
    enable_admin: bool | None = None
    """Serve the operator's calls on the public port. None: where only this machine reaches it."""

    def __post_init__(self) -> None:
        if not 0 <= self.grpc_port <= 65535:
            raise ConfigError(f"--grpc-port must be from 1 to 65535, or 0 for any free port, not {self.grpc_port}")
        for flag, seconds in (("--step-timeout", self.step_timeout), ("--drain-timeout", self.drain_timeout)):
            if seconds is not None and not 0 <= seconds < math.inf:
                raise ConfigError(f"{flag} must be a number of seconds that is not negative, not {seconds}")
        if self.step_timeout == 0:
            raise ConfigError("--step-timeout must be above 0 seconds: no step is done in no time")
        for name in self.served_model_names:
            if not 0 < len(name) <= 128 or not name.isprintable():
                raise ConfigError(f"--served-model-name must have 1 to 128 printable characters, unlike {name[:128]!r}")
        names = [prefix.name for prefix in self.reserved_prefixes]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two reserved prefixes are named {twice!r}: rename one")

    @property
    def serves_admin(self) -> bool:
        return self.host in LOOPBACK if self.enable_admin is None else self.enable_admin

    def names(self, engine: ResolvedEngine) -> tuple[str, ...]:
        """Names under which clients may ask for the model; the first is shown."""
        return self.served_model_names or (engine.model_name,)


@dataclass(frozen=True, slots=True)
class ResolvedEngine:
    """Concrete values, checked against each other."""

    spec: ModelSpec
    model: str
    """Absolute path of the model's folder."""
    model_name: str
    """As the user gave it."""
    device: str
    dtype: str
    kv_cache_dtype: str
    tensor_parallel_size: int
    max_model_len: int
    block_size: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_floor: int
    max_num_waiting: int
    swap_space_bytes: int
    """On each rank; the pool's size is the most that is taken."""
    preemption_mode: str
    enable_prefix_caching: bool
    seed: int
    load_format: str
    deterministic: bool
    enforce_eager: bool
    run_ahead: int
    notes: tuple[str, ...] = ()
    """Choices that a user might not expect, each a sentence to be shown at the start."""

    @property
    def limits(self) -> ModelLimits:
        return ModelLimits(self.spec.vocab_size, self.max_model_len, self.spec.eos_token_ids)

    def worker_config(self, rank: int) -> WorkerConfig:
        return WorkerConfig(
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            load_format=self.load_format,
            rank=rank,
            tensor_parallel_size=self.tensor_parallel_size,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
            num_gpu_blocks_override=self.num_gpu_blocks_override,
            swap_space_bytes=self.swap_space_bytes,
            deterministic=self.deterministic,
            enforce_eager=self.enforce_eager,
            seed=self.seed,
        )

    def scheduler_config(self, num_blocks: int, ranks: Sequence[worker_pb2.WorkerDescription]) -> SchedulerConfig:
        """With what every rank has, and at the pace of the slowest: they do everything together."""
        return SchedulerConfig(
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            prefill_floor=self.prefill_floor,
            max_num_waiting=self.max_num_waiting,
            enable_prefix_caching=self.enable_prefix_caching,
            preemption_mode=self.preemption_mode,
            num_swap_blocks=min(num_blocks, *(rank.num_swap_blocks for rank in ranks)),
            block_bytes=max(rank.bytes_per_block for rank in ranks),
            link_bytes_per_s=min(rank.link_bytes_per_s for rank in ranks),
            prefill_tokens_per_s=min(rank.prefill_tokens_per_s for rank in ranks),
        )

    def model_info(self, config: ServeConfig, num_blocks: int) -> generation_pb2.ModelInfo:
        """What GetModelInfo answers; whether there is a chat template, the gateway knows."""
        from quire.protos import generation_pb2

        return generation_pb2.ModelInfo(
            model=config.names(self)[0],
            architecture=self.spec.architecture,
            max_model_len=self.max_model_len,
            vocab_size=self.spec.vocab_size,
            dtype=self.dtype,
            device=self.device,
            tensor_parallel_size=self.tensor_parallel_size,
            block_size=self.block_size,
            num_blocks=num_blocks,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            eos_token_ids=self.spec.eos_token_ids,
            version=version(),
        )


def resolve(config: EngineConfig, offline: bool = False) -> ResolvedEngine:
    """Raises ConfigError or ModelError, both ValueErrors, for what cannot be served. `offline`: all requests are there
    at once, and how soon one of them begins does not matter."""
    _check(config)
    folder = find_model(config.model)
    spec = ModelSpec.from_pretrained(folder)
    spec.check_parallel(config.tensor_parallel_size)
    if config.load_format != "dummy":
        open_checkpoint(folder, spec)
    notes: list[str] = []
    device = config.device if config.device != "auto" else "cuda" if gpu_is_visible() else "cpu"
    max_model_len = _max_model_len(config, spec, device, notes)
    max_num_seqs = config.max_num_seqs or MAX_NUM_SEQS[device]
    step_tokens = OFFLINE_NUM_BATCHED_TOKENS if offline else MAX_NUM_BATCHED_TOKENS[device]
    dtype = _dtype(config, spec, device, notes)
    engine = ResolvedEngine(
        spec=spec,
        model=str(folder),
        model_name=config.model.rstrip("/") if config.model is not None else BUNDLED_NAME,
        device=device,
        dtype=dtype,
        kv_cache_dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        tensor_parallel_size=config.tensor_parallel_size,
        max_model_len=max_model_len,
        block_size=config.block_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        num_gpu_blocks_override=config.num_gpu_blocks_override,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or max(step_tokens, max_num_seqs),
        prefill_floor=_prefill_floor(config, device, offline),
        max_num_waiting=config.max_num_waiting
        if config.max_num_waiting is not None
        else WAITING_PER_SEQUENCE * max_num_seqs,
        swap_space_bytes=_swap_space(config, device),
        preemption_mode=config.preemption_mode,
        enable_prefix_caching=config.enable_prefix_caching,
        seed=config.seed,
        load_format=config.load_format,
        deterministic=config.deterministic,
        enforce_eager=config.enforce_eager,
        run_ahead=RUN_AHEAD[device] if config.run_ahead is None else config.run_ahead,
        notes=tuple(notes),
    )
    _check_resolved(engine)
    return engine


# -- single settings


def _check(config: EngineConfig) -> None:
    for flag, value, known in (
        ("--device", config.device, ("auto", *DEVICES)),
        ("--dtype", config.dtype, ("auto", *DTYPES)),
        ("--kv-cache-dtype", config.kv_cache_dtype, ("auto", "fp8")),
        ("--load-format", config.load_format, LOAD_FORMATS),
        ("--preemption-mode", config.preemption_mode, PREEMPTION_MODES),
    ):
        if value not in known:
            raise ConfigError(f"{flag} must be one of {', '.join(known)}, not {value!r}")
    for flag, number in (
        ("--tensor-parallel-size", config.tensor_parallel_size),
        ("--kv-cache-memory-bytes", config.kv_cache_memory_bytes),
        ("--num-gpu-blocks-override", config.num_gpu_blocks_override),
        ("--max-num-seqs", config.max_num_seqs),
        ("--max-num-batched-tokens", config.max_num_batched_tokens),
    ):
        if number is not None and number < 1:
            raise ConfigError(f"{flag} must be at least 1, not {number}")
    if config.prefill_floor is not None and config.prefill_floor < 0:
        raise ConfigError(f"--prefill-floor must be 0, no limit, or a number of tokens, not {config.prefill_floor}")
    if config.max_num_waiting is not None and config.max_num_waiting < 0:
        raise ConfigError(f"--max-num-waiting must not be negative, unlike {config.max_num_waiting}")
    if config.run_ahead is not None and config.run_ahead < 0:
        raise ConfigError(f"--run-ahead must be 0, one step at a time, or more, not {config.run_ahead}")
    if config.swap_space is not None and not 0 <= config.swap_space < 1 << 20:  # not a number is refused too
        raise ConfigError(f"--swap-space must be a number of GiB that is not negative, not {config.swap_space}")
    if config.preemption_mode == "swap" and config.swap_space == 0:
        raise ConfigError("--preemption-mode swap needs a swap space: leave --swap-space 0 out, or choose auto")
    size = config.block_size
    if not 1 <= size <= MAX_BLOCK_SIZE or size & (size - 1):
        raise ConfigError(f"--block-size must be a power of two from 1 to {MAX_BLOCK_SIZE}, not {size}")
    if not 0 < config.gpu_memory_utilization <= 1:  # not a number is refused too
        raise ConfigError(
            f"--gpu-memory-utilization must be above 0 and at most 1, not {config.gpu_memory_utilization}"
        )


def _check_resolved(engine: ResolvedEngine) -> None:
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens ({engine.max_num_batched_tokens}) must be at least --max-num-seqs"
            f" ({engine.max_num_seqs}): every running sequence takes one token of a step"
        )
    blocks = engine.num_gpu_blocks_override
    if blocks is not None and blocks * engine.block_size < engine.max_model_len:
        raise ConfigError(
            f"--num-gpu-blocks-override {blocks} makes room for {blocks * engine.block_size} tokens, fewer than"
            f" one sequence of {engine.max_model_len}: raise it to {-(-engine.max_model_len // engine.block_size)},"
            f" or lower --max-model-len to {blocks * engine.block_size}"
        )


def _prefill_floor(config: EngineConfig, device: str, offline: bool) -> int:
    """Offline nobody reads along."""
    if config.prefill_floor is not None:
        return config.prefill_floor
    return 0 if offline else PREFILL_FLOOR[device]


def _max_model_len(config: EngineConfig, spec: ModelSpec, device: str, notes: list[str]) -> int:
    longest = spec.max_position_embeddings
    given = config.max_model_len
    if given is None:
        if device == "cpu" and longest > CPU_MAX_MODEL_LEN:
            notes.append(
                f"max_model_len is {CPU_MAX_MODEL_LEN} on a CPU; the model's own is {longest}, to be had with"
                " --max-model-len"
            )
            return CPU_MAX_MODEL_LEN
        return longest
    if given < 2:
        raise ConfigError(f"--max-model-len must be at least 2, a token of prompt and one of output, not {given}")
    if given > longest:
        raise ConfigError(f"--max-model-len {given} is more than the model's {longest} positions: lower it")
    return given


def _swap_space(config: EngineConfig, device: str) -> int:
    """In bytes."""
    if config.preemption_mode == "recompute":
        return 0
    default = SWAP_SPACE_GIB if device == "cuda" or config.preemption_mode == "swap" else 0.0
    return int((default if config.swap_space is None else config.swap_space) * (1 << 30))


def _dtype(config: EngineConfig, spec: ModelSpec, device: str, notes: list[str]) -> str:
    dtype = spec.dtype if config.dtype == "auto" else config.dtype
    if device == "cuda":
        return dtype
    if dtype == "float16" and config.dtype == "auto":
        notes.append("the model's float16 is served as float32, in which a CPU computes faster")
        return "float32"
    if dtype == "bfloat16" and not packs_bfloat16():
        notes.append("bfloat16 is slow on this CPU: --dtype float32 is faster and takes twice the memory")
    return dtype


# -- the model's folder


def find_model(name: str | None) -> Path:
    """The folder of a model that is given by path, by its name in the Hugging Face cache, or not at all."""
    if name is None:
        return Path(quire.worker.config.__file__).parent / "demo"
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(f"there is no folder {name!r}: give the path of a model's folder, with its config.json")
    cache = _hub_cache() / f"models--{name.replace('/', '--')}"
    snapshot = _snapshot(cache)
    if snapshot is None:
        raise ConfigError(
            f"there is no folder {name!r}, and no model of that name in {_hub_cache()}: models are read from"
            f" local folders, so fetch it first (hf download {name})"
        )
    return snapshot


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it has downloaded, by its own environment variables."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{base}/huggingface")).expanduser() / "hub"


def _snapshot(cache: Path) -> Path | None:
    """The revision that `main` names, or the only one."""
    reference = cache / "refs" / "main"
    if reference.is_file():
        named = cache / "snapshots" / reference.read_text(encoding="utf-8").strip()
        if named.is_dir():
            return named
    snapshots = [folder for folder in cache.glob("snapshots/*") if folder.is_dir()]
    return snapshots[0] if len(snapshots) == 1 else None


# -- the machine


def gpu_is_visible(devices: Path = Path("/dev")) -> bool:
    """Whether a GPU of NVIDIA's is there and not hidden, without importing torch, which takes seconds."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()


def version() -> str:
    try:
        return importlib.metadata.version("quire")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
