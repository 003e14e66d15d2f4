"""Whole blocks of the pool moved in one launch, whatever their number: each is cut into chunks, a program for each."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from quire.kernels.blocks import as_words
from quire.kernels.gpu.device import Device, Variant, device_for

CHUNK_BYTES = 8192
"""Of one program: four loads of 16 bytes for each of its threads, all on their way at once. A single block of 64 KiB
still occupies eight multiprocessors."""
THREADS = 128


@triton.jit
def move_kernel(
    target,  # blocks of WORDS words
    source,
    target_ids,  # [n], or None: block i is number i
    source_ids,
    ID_STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,  # words
):
    CHUNKS: tl.constexpr = (WORDS + CHUNK - 1) // CHUNK
    index = tl.program_id(0) // CHUNKS
    to = index.to(tl.int64)
    origin = to
    if target_ids is not None:
        to = tl.load(target_ids + index * ID_STRIDE).to(tl.int64)
    if source_ids is not None:
        origin = tl.load(source_ids + index * ID_STRIDE).to(tl.int64)
    at = tl.program_id(0) % CHUNKS * CHUNK + tl.arange(0, CHUNK)
    if WORDS % CHUNK == 0:
        tl.store(target + to * WORDS + at, tl.load(source + origin * WORDS + at))
    else:
        inside = at < WORDS
        tl.store(target + to * WORDS + at, tl.load(source + origin * WORDS + at, mask=inside), mask=inside)


def copy_blocks(
    pool: torch.Tensor,  # [N, ...] contiguous
    pairs: torch.Tensor,  # [n, 2] int32 or int64: source, destination
) -> None:
    assert pairs.is_contiguous() and pairs.shape == (len(pairs), 2)
    (words,) = as_words(pool)
    _move(words, words, pairs[:, 1], pairs[:, 0], len(pairs))


def gather_blocks(
    pool: torch.Tensor,  # [N, ...] contiguous
    ids: torch.Tensor,  # [n] int32 or int64
    out: torch.Tensor,  # [n, ...] contiguous
) -> None:
    words, staging = as_words(pool, out)
    assert ids.is_contiguous() and len(out) == len(ids)
    _move(staging, words, None, ids, len(ids))


def scatter_blocks(
    pool: torch.Tensor,  # [N, ...] contiguous
    ids: torch.Tensor,  # [n] int32 or int64
    source: torch.Tensor,  # [n, ...] contiguous
) -> None:
    words, staging = as_words(pool, source)
    assert ids.is_contiguous() and len(source) == len(ids)
    _move(words, staging, ids, None, len(ids))


def _move(
    target: torch.Tensor,
    source: torch.Tensor,
    target_ids: torch.Tensor | None,
    source_ids: torch.Tensor | None,
    num_moved: int,
) -> None:
    ids = [each for each in (target_ids, source_ids) if each is not None]
    assert all(each.dtype in (torch.int32, torch.int64) and each.device == target.device for each in ids)
    if not num_moved:
        return
    num_words = target.shape[1]
    chunk = CHUNK_BYTES // target.itemsize
    move_kernel[(num_moved * triton.cdiv(num_words, chunk),)](
        target,
        source,
        target_ids,
        source_ids,
        ID_STRIDE=ids[0].stride(0),
        WORDS=num_words,
        CHUNK=chunk,
        num_warps=THREADS // device_for(target).warp_size,
    )


def variants(device: Device) -> list[Variant]:
    """A block of Llama 8B, 16 tokens of bfloat16; one that fills no chunk, and one that fills no word."""
    big, id_type = 2 << 20, torch.int32
    return [
        _variant(device, "copy_blocks: 2 MiB", torch.int64, big, id_type, id_type),
        _variant(device, "gather_blocks: 2 MiB", torch.int64, big, None, id_type),
        _variant(device, "scatter_blocks: 2 MiB", torch.int64, big, id_type, None),
        _variant(device, "copy_blocks: 100,016 bytes", torch.int64, 100_016, id_type, id_type),
        _variant(device, "copy_blocks: 100,001 bytes", torch.uint8, 100_001, id_type, id_type),
    ]


def _variant(
    device: Device,
    name: str,
    word: torch.dtype,
    block_bytes: int,
    target_ids: torch.dtype | None,
    source_ids: torch.dtype | None,
) -> Variant:
    arguments = {
        "target": word,
        "source": word,
        "target_ids": target_ids,
        "source_ids": source_ids,
        "ID_STRIDE": 2 if target_ids and source_ids else 1,
        "WORDS": block_bytes // word.itemsize,
        "CHUNK": CHUNK_BYTES // word.itemsize,
    }
    return Variant(name, move_kernel, arguments, num_warps=THREADS // device.warp_size, hot=True)
