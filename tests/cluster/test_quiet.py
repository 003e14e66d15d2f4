"""The collector runs when the engine lets it, and everything is as before once the engine has stopped."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import pytest

from quire.cluster import quiet
from quire.cluster.quiet import QuietCollector


class Knot:
    """Garbage that only the collector can find."""

    def __init__(self) -> None:
        self.me = self


def tie() -> weakref.ref[Knot]:
    return weakref.ref(Knot())


@pytest.fixture
def collector() -> Iterator[QuietCollector]:
    before = (gc.isenabled(), gc.get_freeze_count(), sys.getswitchinterval())
    collector = QuietCollector()
    collector.begin()
    yield collector
    collector.end()
    assert (gc.isenabled(), gc.get_freeze_count(), sys.getswitchinterval()) == before


def test_nothing_is_collected_while_steps_run(collector):
    assert not gc.isenabled() and gc.get_freeze_count() > 1000
    assert sys.getswitchinterval() == pytest.approx(quiet.SWITCH_S)
    knot = tie()
    for _ in range(10_000):  # the collector would have run several times
        tie()
    collector.after_step()
    assert knot() is not None


def test_what_gathers_under_load_is_collected_now_and_then(collector, monkeypatch):
    knot = tie()
    monkeypatch.setattr(quiet, "COLLECT_S", -1.0)
    collector.after_step()
    assert knot() is None


def test_an_idle_moment_is_used(collector):
    knot = tie()
    gc.collect(1)  # survivors of a collection under load …
    old = Knot()
    gc.collect(1)
    reference = weakref.ref(old)
    del old
    gc.collect(1)
    assert knot() is None and reference() is not None  # … are out of its sight
    collector.idle()
    assert reference() is None
