"""Waiting for a device, and what travels to it; the part of it that only CUDA has is in tests/gpu."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from late_transfer import LateTransfer
from worker_plans import admit, plan

from quire.worker import batch, transfer
from quire.worker.batch import StepInputs
from quire.worker.counts import TableSize
from quire.worker.table import RowTable
from quire.worker.transfer import DirectTransfer, spin_until, transfer_for


@pytest.mark.parametrize("polls", [1, 2, 5, 40])
def test_waiting_spins_first_and_then_sleeps_longer_and_longer(polls, monkeypatch):
    now, naps, asked = [0.0], [], []

    def sleep(seconds):
        now[0] += max(seconds, 1e-5)
        naps.append(seconds)

    def is_done():
        asked.append(1)
        return len(asked) >= polls

    monkeypatch.setattr(transfer.time, "sleep", sleep)
    monkeypatch.setattr(transfer.time, "perf_counter", lambda: now[0])
    spin_until(is_done)
    assert len(asked) >= polls
    spins = naps.count(0)
    assert naps[:spins] == [0] * spins and spins <= 1 + transfer.SPIN_S / 1e-5
    longer = naps[spins:]
    assert longer == sorted(longer) and all(transfer.NAP_S <= nap <= transfer.LONGEST_NAP_S for nap in longer)
    if polls == 40:
        assert longer[-1] == transfer.LONGEST_NAP_S


def test_on_a_cpu_both_sides_are_one_memory():
    device, result = torch.zeros(4, dtype=torch.int32), torch.ones(3)
    direct = transfer_for(torch.device("cpu"))
    assert isinstance(direct, DirectTransfer) and direct.staging(device) is device
    arrival = direct.fetch([result])
    result.zero_()  # by the next step
    assert [array.tolist() for array in arrival.wait()] == [[1, 1, 1]]


def test_what_does_not_fit_beside_a_step_travels_by_itself(monkeypatch):
    """Long prompts, cut into segments, and a parcel without room for them."""
    from quire.kernels import dispatch

    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    monkeypatch.setattr(batch, "LONGEST_SEGMENT", 50)
    monkeypatch.setattr(batch, "ROOM", 128)
    size = TableSize(2, 400, 400, 4, 100, 1000)
    table = RowTable(size, "cpu")
    inputs = StepInputs(table, LateTransfer())
    prompts = [list(range(300)), list(range(500, 620))]
    work = table.apply(plan(admits=[admit(0, prompts[0], range(75)), admit(1, prompts[1], range(40, 75))]))
    inputs.send(inputs.load(0, work), work.changes)
    for row, prompt in enumerate(prompts):
        assert table.token_ids[row, : len(prompt)].tolist() == prompt
    assert np.array_equal(table.block_table, table.host_blocks) and table.host_blocks.any()
