"""Huge pages: what is asked for, and that nothing but speed depends on it."""

from __future__ import annotations

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
