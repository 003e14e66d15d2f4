"""Row tables by themselves, without a model."""

from __future__ import annotations

import torch

from quire.kernels.step_inputs import store_tokens
from quire.worker.batch import Batch, StepInputs
from quire.worker.counts import TableSize
from quire.worker.table import RowTable
from quire.worker.transfer import DirectTransfer
from quire.worker.work import Work

SIZE = TableSize(num_rows=4, max_model_len=20, max_num_batched_tokens=24, block_size=4, num_blocks=10, vocab_size=100)


def counts(table: RowTable, row: int) -> tuple[int, int, int, int]:
    """Tokens known, computed and of the prompt, and blocks."""
    numbers = table.counts
    lines = (numbers.num_known, numbers.num_computed, numbers.num_prompt, numbers.num_blocks)
    return tuple(int(line[row]) for line in lines)  # type: ignore[return-value]


def compute(table: RowTable, work: Work, *tokens: int) -> Batch:
    """A step of which nothing but the tokens is known."""
    inputs = StepInputs(table, DirectTransfer())
    parcel = inputs.load(0, work)
    inputs.send(parcel, work.changes)
    batch = inputs.batch(parcel, work, False, None)
    store_tokens(table.tensors, inputs.step, torch.tensor(tokens, dtype=torch.int64), are_some=not work.is_decode)
    table.advance(work)
    assert inputs.step.results[0, : len(tokens)].tolist() == list(tokens)
    return batch


def state(table: RowTable) -> list[object]:
    return [
        table.token_ids.tolist(),
        table.block_table.tolist(),
        [counts(table, row) for row in range(table.size.num_rows)],
        table.sampler._settings.tolist(),
        sorted(table.sampler._lists),
    ]
