"""Memory of the pool: in huge pages, and taken ahead; and that nothing but speed depends on either."""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path

import pytest
import torch

from quire.worker import pages

SMAPS = """\
{start:x}-{stop:x} {rights} 00000000 00:00 0 {name}
Size:           {kib} kB
Rss:            {rss} kB
Pss:            {rss} kB
"""


def mapping(start: int, kib: int, rss: int, rights: str = "rw-p", name: str = "") -> str:
    return SMAPS.format(start=start, stop=start + kib * 1024, rights=rights, name=name, kib=kib, rss=rss)


def test_only_what_is_in_use_and_has_no_file_is_moved(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(
        mapping(0x1000000, 8192, 8192)
        + mapping(0x3000000, 8192, 40)  # a thread's stack, say: moving it would take what it does not use
        + mapping(0x5000000, 8192, 8192, name="/usr/lib/libtorch.so")
        + mapping(0x7000000, 8192, 8192, rights="r--p")
        + mapping(0x9000000, 8192, 7400, name="[heap]")
    )
    expected = [(0x1000000, 0x1000000 + (8 << 20)), (0x9000000, 0x9000000 + (8 << 20))]
    assert list(pages.full_mappings(smaps)) == expected


def test_without_smaps_nothing_is_moved(tmp_path: Path) -> None:
    assert list(pages.full_mappings(tmp_path / "absent")) == []


def test_what_is_moved_stays_what_it_was() -> None:
    weights = torch.arange(6 << 20)
    moved = pages.gather()
    assert moved >= 0 and moved % pages.HUGE_PAGE == 0
    assert torch.equal(weights, torch.arange(6 << 20))


def test_elsewhere_than_on_linux_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(pages, "full_mappings", lambda: pytest.fail("looked for mappings"))
    assert pages.gather() == 0


def test_memory_can_be_written_from_end_to_end() -> None:
    memory = pages.allocate(5 * 4096 + 17)
    memory.fill_(7)
    assert memory.shape == (5 * 4096 + 17,) and int(memory.sum()) == 7 * len(memory)


def resident(memory: torch.Tensor) -> int:
    """Bytes of it that the kernel has given."""
    page = 4096
    vector = (ctypes.c_ubyte * (memory.numel() // page))()
    libc = ctypes.CDLL(None)
    start = -(-memory.data_ptr() // page) * page
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(vector) * page), vector) == 0
    return sum(x & 1 for x in vector) * page


@pytest.fixture
def pool() -> torch.Tensor:
    return pages.allocate(64 << 20)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for memory")
class TestAhead:
    def test_a_share_is_taken_before_anything_is_used(self, pool: torch.Tensor) -> None:
        ahead = pages.Ahead(pool)
        assert resident(pool) == 0
        ahead.reach(0)
        ahead.wait()
        assert resident(pool) in range(14 << 20, (16 << 20) + 1)  # a quarter, in whole huge pages

    def test_it_stays_ahead_and_ends_with_the_pool(self, pool: torch.Tensor) -> None:
        ahead = pages.Ahead(pool)
        for used in range(0, 65 << 20, 1 << 20):
            ahead.reach(used)
            ahead.wait()
            assert resident(pool) >= min(used + (10 << 20), 62 << 20)
        ahead.reach(1 << 40)
        ahead.wait()
        assert resident(pool) <= 64 << 20

    def test_what_has_been_written_stays(self, pool: torch.Tensor) -> None:
        pool[: 8 << 20] = 7
        ahead = pages.Ahead(pool)
        ahead.reach(16 << 20)
        ahead.wait()
        assert bool((pool[: 8 << 20] == 7).all()) and not bool(pool[8 << 20 :].any())

    def test_few_bytes_more_are_not_worth_a_thread(self, pool: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        ahead = pages.Ahead(pool)
        ahead.reach(0)
        ahead.wait()
        monkeypatch.setattr("threading.Thread.start", lambda _self: pytest.fail("a thread for less than a burst"))
        ahead.reach(pages.BURST - 1)

    def test_an_old_kernel_or_no_threads_cost_nothing_but_speed(
        self, pool: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []
        monkeypatch.setattr(pages, "_madvise", lambda: lambda at, _size, _advice: calls.append(at) or -1)
        ahead = pages.Ahead(pool)
        ahead.reach(0)
        ahead.wait()
        ahead.reach(32 << 20)
        ahead.wait()
        assert len(calls) == 1

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr("threading.Thread.start", refuse)
        pages.Ahead(pool).reach(0)

    def test_a_pool_that_is_gone_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pool = pages.allocate(64 << 20)
        calls: list[int] = []
        first, gone = threading.Event(), threading.Event()

        def slow(at: int, _size: int, _advice: int) -> int:
            calls.append(at)
            first.set()
            assert gone.wait(10)
            return 0

        monkeypatch.setattr(pages, "_madvise", lambda: slow)
        ahead = pages.Ahead(pool)
        ahead.reach(0)
        assert first.wait(10)
        del pool
        gone.set()
        ahead.wait()
        assert len(calls) == 1
