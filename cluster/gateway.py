"""The gateway process: the public server in front, a channel to the controller behind.

Its health is the controller's: it serves while the controller says that it does.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.cluster.grpc_api import ApiSettings, GenerationService
from quire.cluster.relay import RelayStub
from quire.cluster.servers import SERVICE, GenerationServer
from quire.cluster.text import NoTokenizerError, Tokenizer
from quire.protos.channel import PUBLIC_SERVER_OPTIONS, WORKER_CHANNEL_OPTIONS, bearer


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What the gateway reads."""

    api: ApiSettings
    host: str
    grpc_port: int


class Gateway:
    """Lives in one asyncio loop."""

    def __init__(self, config: GatewayConfig, upstream: str, tokenizer: Tokenizer | None) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._channel = grpc.aio.insecure_channel(upstream, options=WORKER_CHANNEL_OPTIONS)
        self._lost = asyncio.Event()
        self._reason = ""

    async def start(self) -> str:
        """Listen; returns the address."""
        self._upstream = RelayStub(self._channel, bearer(self.config.api.internal_token))
        self._service = GenerationService(self.config.api, self._upstream, self._tokenizer)
        self._server = GenerationServer(self._service.add_to_server, PUBLIC_SERVER_OPTIONS)
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        port = await self._server.start(f"{host}:{self.config.grpc_port}")
        self._watch = asyncio.create_task(self._follow_health())
        return f"{host}:{port}"

    async def failure(self) -> str:
        """Waits until the controller is gone; says so."""
        await self._lost.wait()
        return self._reason

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let those in progress finish for `grace` seconds."""
        self._watch.cancel()
        await self._server.stop(grace, self._service.idle())
        self._upstream.close()
        await self._channel.close(None)

    async def _follow_health(self) -> None:
        """Ends when the controller does; a controller that says NOT_SERVING is heard of again when it serves."""
        watch = health_pb2_grpc.HealthStub(self._channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        try:
            async for answer in watch:
                await self._server.set_serving(answer.status == health_pb2.HealthCheckResponse.SERVING)
            self._reason = "the controller ended its health stream"
        except grpc.aio.AioRpcError as error:
            self._reason = f"the controller is gone: {error.details()}"
        await self._server.set_serving(False)
        self._lost.set()


def read_tokenizer(folder: str) -> Tokenizer | None:
    """None for a model that is served with token ids only."""
    try:
        return Tokenizer.from_pretrained(folder)
    except NoTokenizerError:
        return None
