"""The same engine in one process, without Ray and without gRPC: for the offline API, tests and benchmarks.

With more than one rank, rank 0 stays here and each other rank is a child process that is fed the same bytes through a
pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection

from quire.cluster import wire
from quire.cluster.config import ConfigError
from quire.protos import worker_pb2
from quire.scheduler.plan import StepPlan, StepResult
from quire.worker.config import WorkerConfig

_RESET = b""
"""In a plan's place; no plan is empty, as every one has a number."""


class LocalExecutor:
    """An `Executor` whose plans have been launched when submit() returns; on a CPU they have run by then."""

    def __init__(self, config: WorkerConfig, progress: Callable[[int, int], None] | None = None) -> None:
        """Loads the model, sizes the pool and warms up. Raises ModelError for a model that cannot be served."""
        self._launched: deque[Callable[[], worker_pb2.StepReport]] = deque()
        """Of the plans under way, the oldest first, what waits for its report."""
        self._is_mid_step = False
        self._peers: list[_Peer] = []
        self._exit = ExitStack()
        try:
            self._start(config, progress)
        except BaseException:
            for peer in self._peers:
                peer.kill()  # it may wait for a rank that never comes
            self.close()
            raise

    def _start(self, config: WorkerConfig, progress: Callable[[int, int], None] | None) -> None:
        from quire.worker.compiled import choose_folders

        choose_folders()
        # The lazy import that keeps torch out of every process that computes nothing.
        from quire.worker.parallel import TensorParallel
        from quire.worker.runner import Runner

        with tempfile.TemporaryDirectory() as folder:
            init_method = f"file://{folder}/rendezvous"
            size = config.tensor_parallel_size
            devices = _visible_gpus(size) if config.device == "cuda" and size > 1 else [None] * size
            for rank in range(1, size):
                with _seeing(devices[rank]):
                    self._peers.append(_Peer(replace(config, rank=rank), init_method))
            parallel = TensorParallel.start(0, size, init_method, config.device)
            self._exit.callback(parallel.close)
            self._runner = Runner(replace(config, rank=0), parallel)
            self._runner.load(progress)
            theirs = (int.from_bytes(peer.receive(), "little") for peer in self._peers)
            capacities = [self._runner.measure(), *theirs]
        self.num_blocks = min(capacities)
        for peer in self._peers:
            peer.send(self.num_blocks.to_bytes(8, "little"))
        self._runner.allocate(self.num_blocks)
        self._runner.warm_up()
        others = (worker_pb2.WorkerDescription.FromString(peer.receive()) for peer in self._peers)
        self.descriptions = [self._runner.describe(), *others]

    def submit(self, plan: StepPlan) -> None:
        if self._is_mid_step and self._peers:
            raise RuntimeError("a step was interrupted while the ranks depended on each other; start them anew")
        message = wire.encode_plan(plan, epoch=1)
        self._is_mid_step = True
        if self._peers:
            payload = message.SerializeToString()
            for peer in self._peers:
                peer.send(payload)
        launched = self._runner.launch(message)
        self._is_mid_step = False
        self._launched.append(launched.wait)

    def collect(self) -> StepResult:
        return wire.decode_report(self._launched.popleft()())

    def reset(self) -> None:
        """Forget all sequences. A step that an exception cut short is forgotten too, unless there are several ranks."""
        self._launched.clear()
        self._runner.reset()
        if not self._peers:
            self._is_mid_step = False
        elif not self._is_mid_step:
            for peer in self._peers:
                peer.send(_RESET)

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        self._exit.close()


def _visible_gpus(num_ranks: int) -> list[str]:
    """Of each rank, for CUDA_VISIBLE_DEVICES; rank 0 takes the first by itself."""
    from quire.worker.parallel import visible_gpus

    names = visible_gpus()
    if len(names) < num_ranks:
        raise ConfigError(
            f"--tensor-parallel-size {num_ranks} takes as many GPUs, and {len(names)} can be seen: lower it, or name"
            " more of them in CUDA_VISIBLE_DEVICES"
        )
    return names


@contextmanager
def _seeing(device: str | None) -> Iterator[None]:
    """A process started here has this GPU alone, whatever it imports first. None: all, as here."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield
    finally:
        if device is not None:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


class _Peer:
    """One further rank in a child process."""

    def __init__(self, config: WorkerConfig, init_method: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve_rank, args=(config, init_method, theirs), name=f"quire-rank-{config.rank}", daemon=True
        )
        self._process.start()
        theirs.close()

    def send(self, payload: bytes) -> None:
        self._pipe.send_bytes(payload)

    def receive(self) -> bytes:
        try:
            return self._pipe.recv_bytes()
        except EOFError:
            raise RuntimeError(f"{self._process.name} failed while it loaded; what it wrote says why") from None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


def _serve_rank(config: WorkerConfig, init_method: str, pipe: Connection) -> None:
    """A child's life: load, tell how many blocks fit, allocate them and tell what it is, then run every plan until the
    pipe closes."""
    from quire.worker.parallel import TensorParallel
    from quire.worker.runner import Runner

    # Ctrl-C in a terminal reaches every process; what becomes of the ranks is for the first one to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parallel = TensorParallel.start(config.rank, config.tensor_parallel_size, init_method, config.device)
    runner = Runner(config, parallel)
    runner.load()
    pipe.send_bytes(runner.measure().to_bytes(8, "little"))
    try:
        runner.allocate(int.from_bytes(pipe.recv_bytes(), "little"))
        runner.warm_up()
        pipe.send_bytes(runner.describe().SerializeToString())
        while True:
            payload = pipe.recv_bytes()
            if payload == _RESET:
                runner.reset()
            else:
                runner.launch(worker_pb2.StepPlan.FromString(payload))
    except (EOFError, ConnectionError):
        os._exit(0)  # the parent has gone or closed: nothing is left to be torn down in order
