"""The gateway process: the public server in front, a channel to the controller behind.

Its health is the controller's: it serves while the controller says that it does.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.cluster import errors
from quire.cluster.client import set_prompt
from quire.cluster.errors import RequestError
from quire.cluster.grpc_api import ApiSettings, GenerationService
from quire.cluster.prefixes import Prefix
from quire.cluster.relay import RelayStub
from quire.cluster.servers import SERVICE, GenerationServer
from quire.cluster.text import NoTokenizerError, Tokenizer
from quire.protos import generation_pb2 as pb
from quire.protos.channel import PUBLIC_SERVER_OPTIONS, WORKER_CHANNEL_OPTIONS, bearer


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What the gateway reads."""

    api: ApiSettings
    host: str
    grpc_port: int
    reserved_prefixes: tuple[Prefix, ...] = ()


class Gateway:
    """Lives in one asyncio loop."""

    def __init__(self, config: GatewayConfig, upstream: str, tokenizer: Tokenizer | None) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._channel = grpc.aio.insecure_channel(upstream, options=WORKER_CHANNEL_OPTIONS)
        self._lost = asyncio.Event()
        self._reason = ""

    async def start(self) -> str:
        """Reserve what is to be reserved, and listen; returns the address. Raises ValueError for a prefix that cannot
        be kept."""
        self._upstream = RelayStub(self._channel, bearer(self.config.api.internal_token))
        self._service = GenerationService(self.config.api, self._upstream, self._tokenizer)
        for prefix in self.config.reserved_prefixes:
            await self._reserve(prefix)
        self._server = GenerationServer(self._service.add_to_server, PUBLIC_SERVER_OPTIONS)
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        port = await self._server.start(f"{host}:{self.config.grpc_port}")
        self._watch = asyncio.create_task(self._follow_health())
        return f"{host}:{port}"

    async def _reserve(self, prefix: Prefix) -> None:
        request = pb.ReservePrefixRequest(name=prefix.name, cache_salt=prefix.cache_salt)
        set_prompt(request, prefix.content)
        try:
            await self._service.reserve(request, metadata=bearer(self.config.api.internal_token))
        except (RequestError, grpc.aio.AioRpcError) as error:
            why = error if isinstance(error, RequestError) else errors.from_rpc_error(error)
            raise ValueError(f"the prefix {prefix.name!r} cannot be reserved: {why.message}") from error

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
