"""One Ray for the whole session, and replicas on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import pytest

from quire.cluster import ray_auth
from quire.cluster.client import Client
from quire.cluster.config import EngineConfig, ServeConfig, resolve
from quire.cluster.progress import Progress

ray_auth.choose(None)

StartReplica = Callable[..., Any]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    from quire.cluster import launch

    with launch.connection(None, 2, Progress(sys.stderr)):
        yield


@contextmanager
def running_replica(**settings: Any) -> Iterator[tuple[Any, Client]]:
    """A replica of the bundled model and a client for it."""
    from quire.cluster import launch

    names = {field.name for field in fields(ServeConfig)}
    serve = {name: settings.pop(name) for name in list(settings) if name in names}
    # With a plan sent ahead, as on a GPU: whatever can go wrong between processes goes wrong sooner.
    engine = EngineConfig(device="cpu", **{"run_ahead": 1, **settings})
    config = ServeConfig(engine=engine, grpc_port=0, **{"drain_timeout": 1.0, **serve})
    replica = launch.Replica(config, resolve(config.engine), Progress(sys.stderr))
    try:
        with Client(replica.start(lambda: False)) as client:
            yield replica, client
    finally:
        replica.stop()


@pytest.fixture(scope="module")
def start_replica(ray_cluster: None) -> Iterator[StartReplica]:
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running_replica(**settings))


@pytest.fixture
def start_own_replica(ray_cluster: None) -> Iterator[StartReplica]:
    """For a test that breaks its replica; the cluster has room for one replica of two workers at a time."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running_replica(**settings))
