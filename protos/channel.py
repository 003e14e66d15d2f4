"""gRPC settings of both services, server and client side: one place, because the two sides must agree.

Invariant: a client never pings more often than its server permits, or the server ends the connection.
"""

from __future__ import annotations

Options = tuple[tuple[str, int], ...]

_MIB = 1 << 20

# A step carries a prompt of any length and the log-probabilities of a whole batch.
_WORKER_MESSAGE = 64 * _MIB
# A prompt of a million tokens; more is refused before it is decoded.
_PUBLIC_MESSAGE = 8 * _MIB

_COMMON_SERVER: Options = (
    # A second server on the same port must fail; the default shares the port and splits the connections.
    ("grpc.so_reuseport", 0),
    # Pings are welcome while no call is open: an idle connection must be known to live, too.
    ("grpc.keepalive_permit_without_calls", 1),
)
_COMMON_CHANNEL: Options = (
    ("grpc.keepalive_permit_without_calls", 1),
    # By default a client stops after two pings on a stream that is open but silent.
    ("grpc.http2.max_pings_without_data", 0),
    # A step is not idempotent, and a request is repeated by its owner with the tokens already sent, or not at all.
    ("grpc.enable_retries", 0),
)

WORKER_SERVER_OPTIONS: Options = (
    *_COMMON_SERVER,
    ("grpc.max_send_message_length", _WORKER_MESSAGE),
    ("grpc.max_receive_message_length", _WORKER_MESSAGE),
    # The default allows a ping every five minutes, and ends the connection of a client that asks sooner.
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
)

WORKER_CHANNEL_OPTIONS: Options = (
    *_COMMON_CHANNEL,
    ("grpc.max_send_message_length", _WORKER_MESSAGE),
    ("grpc.max_receive_message_length", _WORKER_MESSAGE),
    # Together these notice a stopped worker or a cut wire within about two seconds; without the ping timeout it takes
    # a minute, whatever the keepalive settings say.
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
)

PUBLIC_SERVER_OPTIONS: Options = (
    *_COMMON_SERVER,
    ("grpc.max_receive_message_length", _PUBLIC_MESSAGE),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    # A client that vanished without a word gives its memory back within 40 seconds.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # Clients reconnect now and then and so find new servers. Streams in progress are left to finish: the grace period
    # is unlimited unless it is set.
    ("grpc.max_connection_age_ms", 30 * 60 * 1000),
    # On one connection; more than a replica's queue and rows hold in its default settings.
    ("grpc.max_concurrent_streams", 4096),
)

PUBLIC_CHANNEL_OPTIONS: Options = (
    *_COMMON_CHANNEL,
    ("grpc.max_send_message_length", _PUBLIC_MESSAGE),
    ("grpc.max_receive_message_length", _PUBLIC_MESSAGE),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),
)


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata of every call to a server that asks for a token."""
    return (("authorization", f"Bearer {token}"),) if token else ()
