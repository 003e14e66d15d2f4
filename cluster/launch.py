"""From a configuration to a serving replica, and back to nothing: starts or joins Ray, places and wires the processes,
waits, and on a signal or a failure takes everything down again, in order.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from quire.cluster.actors import ControllerActor, GatewayActor, WorkerActor
from quire.cluster.config import LOOPBACK, ResolvedEngine, ServeConfig, resolve
from quire.cluster.controller import ControllerConfig
from quire.cluster.executor import WorkerAddress
from quire.cluster.gateway import GatewayConfig
from quire.cluster.grpc_api import ApiSettings
from quire.cluster.laps import Laps, process_started
from quire.cluster.progress import Progress
from quire.protos import worker_pb2
from quire.worker.compiled import compile_ahead

logger = logging.getLogger(__name__)

NAMESPACE = "quire"
PLACEMENT_TIMEOUT_S = 60.0
PULSE_MISSES = 5
STEP_TIMEOUT_S = {"cuda": 30.0, "cpu": 120.0}
"""A rank that lives but has not finished a step by then is taken to hang; a long prompt on a CPU may take a minute."""


class LaunchError(RuntimeError):
    """Serving could not start. The message says what was missing and what to change."""


def serve(config: ServeConfig) -> int:
    """Serve until a signal comes or a process fails. Returns the exit code: 0 after a signal, 1 after a failure."""
    started = process_started()
    laps, progress = Laps(started), Progress(sys.stderr, started)
    engine = resolve(config.engine)
    _check_port(config.host, config.grpc_port)
    if config.record is not None and config.address is None:
        _check_record(config.record)
    if config.host not in LOOPBACK:
        progress.line(
            f"listening on {config.host}: whoever reaches this port can use the model"
            f"{', reserve and release prefixes' if config.serves_admin else ''}, there is no authentication"
        )
    laps.lap("command")
    if config.address is None:
        compile_ahead(engine.worker_config(0), engine.spec.head_dim)
    # In this order: Ray installs handlers of its own when it starts.
    with connection(config.address, engine.tensor_parallel_size, progress), _signals() as stop:
        laps.lap("Ray")
        if config.address is not None and config.engine.device == "auto":
            # The cluster's devices count, and not those of the machine that the command was typed on.
            device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
            engine = resolve(dataclasses.replace(config.engine, device=device))
        replica = Replica(config, engine, progress, laps)
        try:
            address = replica.start(stop)
            progress.ready(address, engine, replica.num_blocks, laps.seconds)
            reason = replica.wait(stop)
            if reason is not None:
                progress.line(f"stopping: {reason}")
            return 0 if reason is None else 1
        except Stopped:
            return 0
        finally:
            replica.stop()
            progress.line("stopped")


class Stopped(Exception):
    """A signal came while something was being waited for."""


@dataclass
class Replica:
    """The processes of one replica and the resources that they hold."""

    config: ServeConfig
    engine: ResolvedEngine
    progress: Progress
    laps: Laps = field(default_factory=Laps)
    num_blocks: int = 0
    addresses: list[WorkerAddress] = field(default_factory=list)
    descriptions: list[worker_pb2.WorkerDescription] = field(default_factory=list)
    """Of the ranks, as they serve."""
    _token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    _group: PlacementGroup | None = None
    workers: list[Any] = field(default_factory=list)
    controller: Any = None
    _gateway: Any = None

    def start(self, stop: Callable[[], bool]) -> str:
        """Returns the public address. Raises LaunchError, or Stopped when a signal comes first."""
        self._create(self._place(stop))
        # A broken tokenizer is told before the weights are loaded.
        self._get(self._gateway.prepare.remote(self.engine.model), stop, "the gateway")
        self.addresses = self._start_workers(stop)
        controller = self._get(
            self.controller.start.remote(
                self._controller_config(),
                self.engine.model_info(self.config, self.num_blocks),
                self.addresses,
                _epoch(),
                self._token,
            ),
            stop,
            "the controller",
        )
        address = str(self._get(self._gateway.start.remote(self._gateway_config(), controller), stop, "the gateway"))
        self.laps.lap("controller and gateway")
        return address

    def wait(self, stop: Callable[[], bool]) -> str | None:
        """Returns None when a signal came, else why the replica failed."""
        watches = {self.controller.failure.remote(): "controller", self._gateway.failure.remote(): "gateway"}
        head = _Pulse()
        while not stop():
            done, _ = ray.wait(list(watches), num_returns=1, timeout=0.2)
            if done:
                return _outcome(done[0], watches[done[0]])
            if head.is_gone():
                return "Ray's head is gone"
        return None

    def stop(self) -> None:
        """Gateway first, so that nobody is accepted whom nobody would serve; never raises."""
        timeout = self.config.drain_timeout
        if self._gateway is not None:
            _finish([self._gateway.stop.remote(timeout)], timeout + 5)
        if self.controller is not None:
            _finish([self.controller.stop.remote(1.0)], 10)
        _finish([worker.stop.remote() for worker in self.workers], 5)
        if not ray_answers():
            return  # the processes see by themselves that they are orphans
        for actor in (self._gateway, self.controller, *self.workers):
            if actor is not None:
                _quietly(ray.kill, actor)
        if self._group is not None:
            _quietly(remove_placement_group, self._group)

    # -- steps of the start

    def _place(self, stop: Callable[[], bool]) -> PlacementGroup:
        bundle = {"CPU": 1.0, "GPU": 1.0} if self.engine.device == "cuda" else {"CPU": 1.0}
        bundles = [bundle] * self.engine.tensor_parallel_size
        missing = any(ray.cluster_resources().get(name, 0) < len(bundles) for name in bundle)
        if missing and self.config.address is None:
            raise LaunchError(_describe_shortage(bundles))  # a Ray of our own does not grow
        if missing:
            self.progress.line(f"waiting for room for {len(bundles)} worker(s)")
        group: PlacementGroup = placement_group(bundles, strategy="PACK")
        self._group = group
        try:
            self._get(group.ready(), stop, "the placement group", PLACEMENT_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            raise LaunchError(_describe_shortage(bundles)) from None
        return group

    def _create(self, group: PlacementGroup) -> None:
        on_gpu = self.engine.device == "cuda"
        # The workers first: they have the most to do before they can start.
        self.workers = [
            _actor(
                WorkerActor, _in_bundle(group, rank), num_cpus=1, num_gpus=1 if on_gpu else 0, max_concurrency=2
            ).remote(self.engine.worker_config(rank), self._token)
            for rank in range(self.engine.tensor_parallel_size)
        ]
        self.controller = _actor(ControllerActor, _in_bundle(group, 0)).remote(not on_gpu)
        # Where the user is: the address in the ready line must answer there.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._gateway = _actor(GatewayActor, here).remote(not on_gpu)

    def _start_workers(self, stop: Callable[[], bool]) -> list[WorkerAddress]:
        how = ", deterministic" if self.engine.deterministic else ""
        self.progress.line(f"starting {len(self.workers)} worker(s){how}")
        init_method = self._get(self.workers[0].rendezvous.remote(), stop, "worker rank 0")
        self.laps.lap("processes")
        loading = [worker.load.remote(init_method) for worker in self.workers]
        self._show_loading(loading, stop)
        self.num_blocks = min(self._get_all(loading, stop, "worker rank {}"))
        self.laps.lap("weights")
        self.progress.line(f"KV cache: {self.num_blocks} blocks of {self.engine.block_size} tokens")
        serving = [worker.serve.remote(self.num_blocks) for worker in self.workers]
        addresses = self._get_all(serving, stop, "worker rank {}")
        describing = [worker.describe.remote() for worker in self.workers]
        self.descriptions = self._get_all(describing, stop, "worker rank {}")
        if swap := min(description.num_swap_blocks for description in self.descriptions):
            self.progress.line(f"swap space: {swap} blocks")
        self.laps.lap("warm-up")
        inside = self._get(self.workers[0].laps.remote(), stop, "worker rank 0")
        self.laps.split("processes", "torch", inside["torch"])
        self.laps.split("weights", "memory", inside["memory"])
        return addresses

    def _show_loading(self, loading: list[Any], stop: Callable[[], bool]) -> None:
        while True:
            done, pending = ray.wait(loading, num_returns=len(loading), timeout=0.2)
            if stop():
                raise Stopped
            if not pending or any(_failed(ref) for ref in done):
                return
            self.progress.weights(*self._get(self.workers[0].progress.remote(), stop, "worker rank 0"))

    def _controller_config(self) -> ControllerConfig:
        engine = self.engine
        scheduler = engine.scheduler_config(self.num_blocks, self.descriptions)
        timeout = self.config.step_timeout or STEP_TIMEOUT_S[engine.device]
        return ControllerConfig(scheduler, engine.limits, timeout, engine.run_ahead, self.config.record)

    def _gateway_config(self) -> GatewayConfig:
        engine, config = self.engine, self.config
        api = ApiSettings(
            config.names(engine),
            engine.max_model_len,
            engine.limits.vocab_size,
            enable_admin=config.serves_admin,
            internal_token=self._token,
        )
        return GatewayConfig(api, config.host, config.grpc_port, config.reserved_prefixes)

    def _get(self, ref: Any, stop: Callable[[], bool], who: str, timeout: float = float("inf")) -> Any:
        return self._get_all([ref], stop, who, timeout)[0]

    def _get_all(self, refs: list[Any], stop: Callable[[], bool], who: str, timeout: float = float("inf")) -> list[Any]:
        """Their values; the first failure among them as soon as it is there. A signal interrupts the wait.

        `who` names the process that is called; a "{}" in it stands for the call's position."""
        deadline = time.monotonic() + timeout
        pending = list(refs)
        while pending:
            if stop():
                raise Stopped
            done, pending = ray.wait(pending, num_returns=1, timeout=min(0.2, max(0.0, deadline - time.monotonic())))
            for ref in done:
                _value(ref, who.format(refs.index(ref)))
            if pending and time.monotonic() >= deadline:
                raise ray.exceptions.GetTimeoutError("timed out")
        return [_value(ref, who) for ref in refs]


# -- Ray


@contextmanager
def connection(address: str | None, num_workers: int, progress: Progress) -> Iterator[None]:
    """A Ray to run on: the one already connected, the cluster at `address`, or a local one that lives as long as we."""
    if ray.is_initialized():
        yield
        return
    common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": True, "logging_level": logging.ERROR}
    if address is None:
        progress.line("starting a local Ray")
        # Ray's default has its actors yield to every other process, Ray's own loggers and our clients included.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(
            "local",
            **common,
            # Ray starts as many processes in advance: what one replica needs, and no more on a machine of many cores.
            num_cpus=num_workers + 2,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=100 << 20,
        )
    else:
        progress.line(f"joining the Ray cluster at {address}")
        _check_reachable(address)
        try:
            ray.init(address=address, **common)
        except (ConnectionError, RuntimeError) as error:
            raise LaunchError(f"no Ray cluster could be joined at {address!r}: {error}") from error
    try:
        yield
    finally:
        if ray_answers():
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself would try for a minute and print a line each second."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        raise LaunchError(f"--address {address!r} is not HOST:PORT of a Ray head, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise LaunchError(f"no Ray cluster could be joined at {address!r}: {reason}") from error


class _Pulse:
    """Whether Ray's head has been away for some time: one lost packet is no reason to end a replica."""

    def __init__(self) -> None:
        self._misses = 0
        self._next = 0.0

    def is_gone(self) -> bool:
        if time.monotonic() >= self._next:
            self._misses = 0 if ray_answers() else self._misses + 1
            self._next = time.monotonic() + 0.5
        return self._misses >= PULSE_MISSES


def ray_answers() -> bool:
    """Whether Ray's head is there. Calls into a Ray without one wait for a minute and then end the process."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _finish(calls: list[Any], timeout: float) -> None:
    """Wait for calls that end something; whatever has become of them, what comes after is tried too."""
    deadline, head = time.monotonic() + timeout, _Pulse()
    while calls and time.monotonic() < deadline and not head.is_gone():
        _, calls = ray.wait(calls, num_returns=len(calls), timeout=0.5)


def _in_bundle(group: PlacementGroup, bundle: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)


def _actor(kind: type, strategy: object, num_cpus: float = 0, **options: Any) -> Any:
    return ray.remote(kind).options(
        num_cpus=num_cpus, scheduling_strategy=strategy, max_restarts=0, max_task_retries=0, **options
    )


def _value(ref: Any, who: str) -> Any:
    """The call's value. A ValueError of the process called is the user's to read; anything else becomes a line."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from error
        kind, text = type(error.cause).__name__, str(error.cause).strip() or "no message"
        raise LaunchError(f"{who} failed to start: {kind}: {text.splitlines()[0]}") from error
    except ray.exceptions.RayActorError as error:
        raise LaunchError(f"{who} died while starting; what it printed last is above") from error


def _failed(ref: Any) -> bool:
    try:
        ray.get(ref)
    except ray.exceptions.RayError:
        return True
    return False


def _outcome(ref: Any, who: str) -> str:
    """What a watch returned, or that the watched process is gone."""
    try:
        return str(ray.get(ref))
    except ray.exceptions.RayError:
        return f"the {who}'s process is gone"


def _describe_shortage(bundles: list[dict[str, float]]) -> str:
    asked = ", ".join(f"{name} {sum(bundle.get(name, 0) for bundle in bundles):g}" for name in bundles[0])
    nodes = [
        f"{node['NodeManagerHostname']}: "
        + ", ".join(f"{name} {node['Resources'].get(name, 0):g}" for name in ("CPU", "GPU"))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return (
        f"no room for {len(bundles)} worker(s) within {PLACEMENT_TIMEOUT_S:g} s: asked for {asked};"
        f" the cluster has {'; '.join(nodes)}. Lower --tensor-parallel-size, add nodes, or end what holds them"
    )


# -- the process


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a question that can be asked; a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    """Better to hear of a busy port now than after the weights are loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --grpc-port"
            ) from error


def _check_record(path: str) -> None:
    """Likewise."""
    try:
        open(path, "wb").close()
    except OSError as error:
        raise LaunchError(f"--record {path} cannot be written: {error.strerror}") from error


def _epoch() -> int:
    """Grows with every controller: workers refuse an older one."""
    return time.time_ns() // 1_000_000


def _quietly(action: Callable[..., object], *arguments: object, **options: object) -> None:
    """Going down, every step is tried whatever became of the one before."""
    try:
        action(*arguments, **options)
    except Exception as error:
        logger.debug("while stopping: %s", error)
