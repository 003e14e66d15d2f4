"""The three kinds of process, as Ray actors: thin shells around classes that know no Ray.

Ray places, starts and finds them. Once they run, steps and tokens travel over gRPC; Ray sees none of it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import grpc
import ray

from quire.cluster.controller import Controller, ControllerConfig
from quire.cluster.cores import give_way
from quire.cluster.executor import WorkerAddress
from quire.cluster.fate import exit_with_parent
from quire.cluster.gateway import Gateway, GatewayConfig, read_tokenizer
from quire.cluster.laps import Laps, process_started
from quire.cluster.relay import RelayService
from quire.cluster.servers import GenerationServer
from quire.protos import generation_pb2, generation_pb2_grpc, worker_pb2
from quire.protos.channel import WORKER_SERVER_OPTIONS
from quire.worker.config import WorkerConfig


class WorkerActor:
    """One rank. Its gRPC server belongs to `quire.worker.service`; Ray calls only bring it up and down."""

    def __init__(self, config: WorkerConfig, token: str) -> None:
        exit_with_parent()
        self._laps = Laps(process_started())
        self._laps.lap("process")
        from quire.worker.compiled import choose_folders

        note = choose_folders()
        if note and config.device == "cuda":
            print(note, file=sys.stderr, flush=True)
        # The one lazy import: torch is loaded here, in the worker's process, and nowhere above it.
        from quire.worker.service import WorkerServer

        self._laps.lap("torch")
        self._config = config
        self._server = WorkerServer(config, token)
        self._progress = (0, 0)

    def rendezvous(self) -> str:
        """An address on this node at which the ranks can meet."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def load(self, init_method: str) -> int:
        """Join the group and read the weights; returns the number of KV blocks that fit here."""
        self._laps.lap("waiting")
        if self._config.tensor_parallel_size > 1:
            self._server.connect(init_method)
            self._laps.lap("group")
        self._server.load(self._note_progress)
        self._laps.lap("weights")
        num_blocks = int(self._server.measure())
        self._laps.lap("memory")
        return num_blocks

    def progress(self) -> tuple[int, int]:
        """Bytes of weights read, and in all."""
        return self._progress

    def serve(self, num_blocks: int) -> WorkerAddress:
        """Allocate the pool, run a first step through it and listen."""
        self._laps.lap("waiting")
        self._server.allocate(num_blocks)
        self._laps.lap("warm-up")
        host = ray.util.get_node_ip_address()
        target = self._server.serve(host)
        incarnation = self._server.describe().incarnation
        return WorkerAddress(self._config.rank, target, incarnation, socket.gethostname(), os.getpid())

    def describe(self) -> worker_pb2.WorkerDescription:
        """What it is and holds, once it serves."""
        description: worker_pb2.WorkerDescription = self._server.describe()
        return description

    def laps(self) -> dict[str, float]:
        """Seconds by stage, from this process's start to the end of its warm-up."""
        return self._laps.seconds

    def stop(self) -> None:
        self._server.stop(grace=1.0)

    def _note_progress(self, done: int, total: int) -> None:
        self._progress = (done, total)


class ControllerActor:
    """Scheduler, KV block manager and engine loop of one replica."""

    def __init__(self, shares_cores: bool) -> None:
        """`shares_cores`: with workers that compute on a CPU."""
        exit_with_parent()
        if shares_cores:
            give_way()
        self._controller: Controller | None = None

    async def start(
        self,
        config: ControllerConfig,
        info: generation_pb2.ModelInfo,
        workers: list[WorkerAddress],
        epoch: int,
        token: str,
    ) -> str:
        """Returns the address of its `Generation` service."""
        self._controller = controller = Controller(config, info)
        controller.connect(workers, epoch, token)

        def add(server: grpc.aio.Server) -> None:
            generation_pb2_grpc.add_GenerationServicer_to_server(controller, server)
            RelayService(controller.Generate).add_to_server(server)

        self._server = GenerationServer(add, WORKER_SERVER_OPTIONS, token)
        host = ray.util.get_node_ip_address()
        port = await self._server.start(f"{host}:0")
        self._failure_watch = asyncio.create_task(self._watch(controller))
        return f"{host}:{port}"

    async def failure(self) -> str:
        """Returns when the engine has failed, with the reason."""
        assert self._controller is not None
        return await self._controller.failure()

    async def audit(self) -> None:
        assert self._controller is not None
        await self._controller.audit()

    async def stop(self, drain_timeout: float) -> None:
        if self._controller is None:
            return
        await self._controller.drain(drain_timeout)
        self._failure_watch.cancel()
        await self._server.stop(grace=1.0)
        await self._controller.close()

    async def _watch(self, controller: Controller) -> None:
        await controller.failure()
        await self._server.set_serving(False)


class GatewayActor:
    """The public edge: text in front, token ids behind."""

    def __init__(self, shares_cores: bool) -> None:
        exit_with_parent()
        if shares_cores:
            give_way()
        self._gateway: Gateway | None = None

    async def prepare(self, model: str) -> None:
        """Read the tokenizer: a broken one is told before the weights are loaded."""
        self._tokenizer = await asyncio.to_thread(read_tokenizer, model)

    async def start(self, config: GatewayConfig, upstream: str) -> str:
        """Returns the public address."""
        self._gateway = Gateway(config, upstream, self._tokenizer)
        return await self._gateway.start()

    async def failure(self) -> str:
        """Returns when the controller is gone, with the reason."""
        assert self._gateway is not None
        return await self._gateway.failure()

    async def stop(self, grace: float) -> None:
        if self._gateway is not None:
            await self._gateway.stop(grace)
