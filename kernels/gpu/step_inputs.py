"""A step's inputs from the persistent rows, in one launch; see kernels/step_inputs.py."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from quire.kernels.gpu.device import Device, Variant
from quire.kernels.step_inputs import COPY, LONGEST_SEGMENT, SEGMENT, RowTensors, StepTensors

WRITTEN = 1024
"""Values that a program writes at once."""
TOKENS = 128
"""Of one program."""
COLUMNS = 512
"""Blocks of a row's table that are copied at once."""
STORED = 256
COPIERS = 8
"""Programs that copy one row: a long one has a hundred thousand tokens."""


@triton.jit(do_not_specialize=["token_stride", "block_stride"])
def write_rows_kernel(
    segments,  # [n, SEGMENT]
    values,
    token_ids,
    token_stride,
    block_tables,
    block_stride,
    SEGMENT: tl.constexpr,
    WRITTEN: tl.constexpr,
):
    segment = segments + tl.program_id(0) * SEGMENT
    table = tl.load(segment)
    row = tl.load(segment + 1).to(tl.int64)
    column = tl.load(segment + 2)
    source = values + tl.load(segment + 3)
    count = tl.load(segment + 4)
    for start in range(0, count, WRITTEN):
        at = start + tl.arange(0, WRITTEN)
        value = tl.load(source + at, mask=at < count, other=0)
        if table == 0:
            tl.store(token_ids + row * token_stride + column + at, value, mask=at < count)
        else:
            tl.store(block_tables + row * block_stride + column + at, value, mask=at < count)


@triton.jit(do_not_specialize=["token_stride", "block_stride"])
def copy_rows_kernel(
    copies,  # [n, COPY]
    token_ids,
    token_stride,
    block_tables,
    block_stride,
    COPY: tl.constexpr,
    COPIERS: tl.constexpr,
    WRITTEN: tl.constexpr,
):
    copy = copies + tl.program_id(0) * COPY
    source = tl.load(copy).to(tl.int64)
    target = tl.load(copy + 1).to(tl.int64)
    first = tl.program_id(1) * WRITTEN
    count = tl.load(copy + 2)
    for start in range(first, count, COPIERS * WRITTEN):
        at = start + tl.arange(0, WRITTEN)
        value = tl.load(token_ids + source * token_stride + at, mask=at < count, other=0)
        tl.store(token_ids + target * token_stride + at, value, mask=at < count)
    count = tl.load(copy + 3)
    for start in range(first, count, COPIERS * WRITTEN):
        at = start + tl.arange(0, WRITTEN)
        value = tl.load(block_tables + source * block_stride + at, mask=at < count, other=0)
        tl.store(block_tables + target * block_stride + at, value, mask=at < count)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_sampling", "token_stride", "block_stride"])
def derive_inputs_kernel(
    rows,  # [B]
    starts,  # [B]
    query_starts,  # [B + 1]
    sampling,  # [S]
    token_table,
    token_stride,
    block_table,
    block_stride,  # of both tables of blocks
    token_ids,  # [T] int64, written, as what follows
    positions,  # [T] int64
    slots,  # [T] int64
    seq_lens,  # [B]
    sample_index,  # [S] int64
    block_tables,  # [B, M]
    num_rows,
    num_tokens,
    num_sampling,
    BLOCK_SIZE: tl.constexpr,
    SINGLE: tl.constexpr,  # each row brings one token
    HALVINGS: tl.constexpr,  # that find one among all rows
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token_programs = (num_tokens + TOKENS - 1) // TOKENS
    if tl.program_id(0) < token_programs:
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        exists = token < num_tokens
        if SINGLE:
            owner = token
            first = token
        else:
            # The last row that begins at or before the token.
            owner = tl.zeros([TOKENS], tl.int32)
            beyond = tl.zeros([TOKENS], tl.int32) + num_rows
            for _ in range(HALVINGS):
                middle = (owner + beyond) // 2
                begins = tl.load(query_starts + middle, mask=exists, other=0)
                is_left = (begins <= token) & (middle < beyond)
                owner = tl.where(is_left, middle, owner)
                beyond = tl.where(is_left, beyond, middle)
            first = tl.load(query_starts + owner, mask=exists, other=0)
        row = tl.load(rows + owner, mask=exists, other=-1)
        is_real = exists & (row >= 0)
        position = tl.load(starts + owner, mask=is_real, other=0) + tl.where(is_real, token - first, 0)
        wide = row.to(tl.int64)
        value = tl.load(token_table + wide * token_stride + position, mask=is_real, other=0)
        block = tl.load(block_table + wide * block_stride + position // BLOCK_SIZE, mask=is_real, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(token_ids + token, value.to(tl.int64), mask=exists)
        tl.store(positions + token, position.to(tl.int64), mask=exists)
        tl.store(slots + token, tl.where(is_real, slot, -1), mask=exists)
    else:
        index = tl.program_id(0) - token_programs
        if index < num_sampling:  # there may be more of these than rows
            last = tl.load(sampling + index)
            if not SINGLE:
                last = tl.load(query_starts + last + 1) - 1
            tl.store(sample_index + index, last.to(tl.int64))
        if index < num_rows:
            own = tl.load(rows + index).to(tl.int64)
            length = tl.load(starts + index) + 1
            if not SINGLE:
                length += tl.load(query_starts + index + 1) - tl.load(query_starts + index) - 1
            length = tl.where(own >= 0, length, 0)
            tl.store(seq_lens + index, length)
            num_blocks = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
            source = block_table + own * block_stride
            target = block_tables + index.to(tl.int64) * block_stride
            for start in range(0, num_blocks, COLUMNS):
                at = start + tl.arange(0, COLUMNS)
                tl.store(target + at, tl.load(source + at, mask=at < num_blocks, other=0), mask=at < num_blocks)


@triton.jit(do_not_specialize=["count", "token_stride", "result_stride"])
def store_tokens_kernel(
    tokens,  # [S] int64
    sampling,  # [S] or None: all rows
    sampling_rows,  # [S] or None
    rows,  # [B]
    seq_lens,  # [B]
    token_table,
    token_stride,
    report,  # [1]
    results,
    result_stride,
    count,
    STORED: tl.constexpr,
):
    index = tl.program_id(0) * STORED + tl.arange(0, STORED)
    exists = index < count
    token = tl.load(tokens + index, mask=exists, other=0).to(tl.int32)
    if sampling is not None:
        owner = tl.load(sampling + index, mask=exists, other=0)
        row = tl.load(sampling_rows + index, mask=exists, other=-1)
    else:
        owner = index
        row = tl.load(rows + index, mask=exists, other=-1)
    length = tl.load(seq_lens + owner, mask=exists, other=0)
    # What could not be sampled is still a token: it may be looked up.
    where = token_table + row.to(tl.int64) * token_stride + length
    tl.store(where, tl.maximum(token, 0), mask=exists & (row >= 0))
    tl.store(results + tl.load(report).to(tl.int64) * result_stride + index, token, mask=exists)


def write_rows(tables: RowTensors, segments: torch.Tensor, values: torch.Tensor) -> None:
    assert segments.is_contiguous() and segments.shape[1] == SEGMENT and values.is_contiguous()
    if not len(segments):
        return
    write_rows_kernel[(len(segments),)](
        segments, values, tables.token_ids, tables.token_ids.stride(0), tables.block_tables,
        tables.block_tables.stride(0), SEGMENT, min(WRITTEN, LONGEST_SEGMENT), num_warps=4,
    )  # fmt: skip


def copy_rows(tables: RowTensors, copies: torch.Tensor) -> None:
    assert copies.is_contiguous() and copies.shape[1] == COPY
    if not len(copies):
        return
    copy_rows_kernel[(len(copies), COPIERS)](
        copies, tables.token_ids, tables.token_ids.stride(0), tables.block_tables, tables.block_tables.stride(0), COPY,
        COPIERS, WRITTEN, num_warps=4,
    )  # fmt: skip


def derive_inputs(
    tables: RowTensors, step: StepTensors, num_rows: int, num_tokens: int, num_sampling: int, block_size: int
) -> None:
    assert step.block_tables.stride() == tables.block_tables.stride()
    if not num_rows:
        return
    derive_inputs_kernel[(triton.cdiv(num_tokens, TOKENS) + max(num_rows, num_sampling),)](
        step.rows, step.starts, step.query_starts, step.sampling, tables.token_ids, tables.token_ids.stride(0),
        tables.block_tables, tables.block_tables.stride(0), step.token_ids, step.positions, step.slots, step.seq_lens,
        step.sample_index, step.block_tables, num_rows, num_tokens, num_sampling, block_size, num_tokens == num_rows,
        len(step.rows).bit_length(), TOKENS, COLUMNS, num_warps=4,
    )  # fmt: skip


def store_tokens(tables: RowTensors, step: StepTensors, tokens: torch.Tensor, are_some: bool) -> None:
    assert tokens.dtype == torch.int64 and tokens.is_contiguous()
    if not len(tokens):
        return
    store_tokens_kernel[(triton.cdiv(len(tokens), STORED),)](
        tokens, step.sampling if are_some else None, step.sampling_rows if are_some else None, step.rows, step.seq_lens,
        tables.token_ids, tables.token_ids.stride(0), step.report, step.results, step.results.stride(0), len(tokens),
        STORED, num_warps=4,
    )  # fmt: skip


def variants(device: Device) -> list[Variant]:  # noqa: ARG001
    i32, i64 = torch.int32, torch.int64
    tokens, blocks = 131073, 8192  # strides of the tables
    found = [_variant("rows written", write_rows_kernel, (i32, i32, i32, tokens, i32, blocks, SEGMENT, WRITTEN))]
    found.append(_variant("rows copied", copy_rows_kernel, (i32, i32, tokens, i32, blocks, COPY, COPIERS, WRITTEN)))
    for single in (True, False):
        arguments = (
            i32, i32, i32, i32, i32, tokens, i32, blocks, i64, i64, i64, i32, i64, i32,
            256, 256 if single else 2048, 256, 16, single, 9, TOKENS, COLUMNS,
        )  # fmt: skip
        found.append(_variant("one token per row" if single else "any", derive_inputs_kernel, arguments))
    for sampling in (None, i32):
        name = "tokens stored" + (", of some rows" if sampling else "")
        stored = (i64, sampling, sampling, i32, i32, i32, tokens, i32, i32, 256, 256, STORED)
        found.append(_variant(name, store_tokens_kernel, stored))
    return found


def _variant(name, kernel, arguments) -> Variant:
    return Variant(
        f"step inputs: {name}", kernel, dict(zip(kernel.arg_names, arguments, strict=True)), num_warps=4, hot=True
    )
