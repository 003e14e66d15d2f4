"""What the kernels are told about a GPU is what torch says about it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quire.kernels.gpu import device
from quire.kernels.gpu.device import DEVICES, Device

H200 = {"major": 9, "minor": 0, "multi_processor_count": 132, "shared_memory_per_block": 48 << 10}
MI300X = {"gcnArchName": "gfx942:sramecc+:xnack-", "multi_processor_count": 304}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    device.device_of.cache_clear()
    yield
    device.device_of.cache_clear()


def ask(monkeypatch: pytest.MonkeyPatch, hip: str | None = None, **properties: Any) -> Device:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.version, "hip", hip)
    return device.device_of(0)


def test_a_known_gpu_is_the_one_that_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, **H200, shared_memory_per_block_optin=232448) == DEVICES["sm_90"]


def test_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, hip="6.4", **MI300X) == DEVICES["gfx942"]


def test_without_the_larger_figure_the_smaller_one_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, **H200).shared_bytes == 48 << 10


def test_interpreted_kernels_are_those_of_hopper() -> None:
    assert device.device_for(torch.empty(1)) is DEVICES["sm_90"]
    assert [name for name, each in DEVICES.items() if each.is_hopper] == ["sm_90"]
    assert [each.warp_size for each in DEVICES.values()] == [32, 32, 32, 64]
