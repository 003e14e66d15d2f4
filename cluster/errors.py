"""Rich gRPC errors: the one place that makes them and the one place that reads them back.

A `RequestError` is a status code, a sentence that says what to do, and where it helps the field at fault, a stable
reason and the time after which to try again. On the wire it is the plain gRPC status plus `google.rpc` details
(BadRequest, ErrorInfo with domain "quire", RetryInfo), so that clients that know nothing of Quire understand it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "quire"
MAX_MESSAGE = 1000
"""Characters: a status travels twice in the trailers, of which gRPC takes eight kilobytes."""
DETAILS_KEY = "grpc-status-details-bin"


class RequestError(Exception):
    """A request that is refused or has failed, as its client will see it."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        field: str | None = None,
        reason: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
        self.field = field
        self.reason = reason
        self.retry_after_s = retry_after_s


def invalid(field: str, message: str, reason: str | None = None) -> RequestError:
    """The commonest refusal: a field of the request that cannot be served."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message, field=field, reason=reason)


class _Context(Protocol):
    """What this module needs of a grpc.aio servicer context."""

    async def abort(self, code: grpc.StatusCode, details: str = ..., trailing_metadata: Any = ...) -> NoReturn: ...


class RpcFailure(Protocol):
    """What the sync client's and grpc.aio's errors have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def to_status(error: RequestError) -> status_pb2.Status:
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    for detail in _details(error):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _details(error: RequestError) -> list[Any]:
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason or error.code.name, domain=DOMAIN),
    ]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


async def abort(context: _Context, error: RequestError) -> NoReturn:
    """End the call that `context` belongs to."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


async def relay(context: _Context, failure: RpcFailure) -> NoReturn:
    """End the call as the upstream call ended: same code, message and details."""
    trailing: Sequence[tuple[str, str | bytes]] = tuple(failure.trailing_metadata() or ())
    kept = tuple((key, value) for key, value in trailing if key == DETAILS_KEY)
    await context.abort(failure.code(), failure.details() or "", kept)


def from_rpc_error(failure: RpcFailure) -> RequestError:
    """Read an error back on the client's side; the details are optional, and garbage in them is no second error."""
    error = RequestError(failure.code(), failure.details() or failure.code().name)
    for detail in _read_status(failure).details:
        _read_detail(error, detail)
    return error


def _read_status(failure: RpcFailure) -> status_pb2.Status:
    for key, value in failure.trailing_metadata() or ():
        if key == DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()


def _read_detail(error: RequestError, detail: any_pb2.Any) -> None:
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    try:
        if detail.Unpack(info):
            error.reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            error.field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            error.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    except DecodeError:
        # A detail of a known type that does not parse: the code and the sentence still stand.
        return
