"""A grpc.aio server as ours are: health, reflection, stated limits, and inside the cluster a secret."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from quire.protos import generation_pb2

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class GenerationServer:
    """A server for `quire.v1.Generation`; `add` registers the service. Health answers for "" and the service's name."""

    def __init__(
        self, add: Callable[[grpc.aio.Server], None], options: Sequence[tuple[str, Any]], token: str | None = None
    ) -> None:
        interceptors = [_RequireToken(token)] if token else []
        self._server = grpc.aio.server(interceptors=interceptors, options=list(options))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        add(self._server)

    async def start(self, address: str) -> int:
        """Listen; returns the port. Raises OSError or RuntimeError when the address cannot be had."""
        port: int = self._server.add_insecure_port(address)
        await self._server.start()
        await self.set_serving(True)
        return port

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace: float, idle: Awaitable[None] | None = None) -> None:
        """Refuse new calls, give those in progress `grace` seconds, or until `idle`, and end what is left.

        A client that watches the server's health keeps a call open for ever: that is no reason to wait."""
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.ensure_future(self._server.stop(grace))
        if idle is not None:
            waiting = asyncio.ensure_future(idle)
            await asyncio.wait([stopping, waiting], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            await self._server.stop(0)
        await stopping


class _RequireToken(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Calls without the replica's secret are refused: neighbours on the cluster may not drive it."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}"

        async def refuse(_request: Any, context: Context) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this port belongs to the cluster; call the gateway")

        self._refuse = grpc.unary_unary_rpc_method_handler(refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        given = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        if handler_call_details.method.startswith("/grpc.health.v1."):
            return await continuation(handler_call_details)
        if hmac.compare_digest(str(given).encode(), self._expected.encode()):
            return await continuation(handler_call_details)
        return self._refuse
