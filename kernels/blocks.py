"""Moving whole blocks of the pool: copies for copy-on-write, and to and from contiguous staging for swapping.

A block is one contiguous range of bytes, with all layers in it; what its elements are does not matter here. Ids are
valid; nobody checks them.
"""

from __future__ import annotations

import torch

from quire.kernels import dispatch

WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def copy_blocks(
    pool: torch.Tensor,  # [N, ...] contiguous
    # [n, 2] int32 or int64, on the pool's device: source, destination; none is both, no destination twice.
    pairs: torch.Tensor,
) -> None:
    if dispatch.on_gpu(pool):
        from quire.kernels.gpu import blocks as gpu

        return gpu.copy_blocks(pool, pairs)
    (words,) = as_words(pool)
    words.index_copy_(0, pairs[:, 1].long(), words.index_select(0, pairs[:, 0]))


def gather_blocks(
    pool: torch.Tensor,  # [N, ...] contiguous
    ids: torch.Tensor,  # [n] int32 or int64, on the pool's device
    out: torch.Tensor,  # [n, ...] contiguous, type and device of the pool
) -> None:
    if dispatch.on_gpu(pool):
        from quire.kernels.gpu import blocks as gpu

        return gpu.gather_blocks(pool, ids, out)
    words, staging = as_words(pool, out)
    assert len(out) == len(ids)
    torch.index_select(words, 0, ids, out=staging)


def scatter_blocks(
    pool: torch.Tensor,  # [N, ...] contiguous
    ids: torch.Tensor,  # [n] int32 or int64, on the pool's device; none twice
    source: torch.Tensor,  # [n, ...] contiguous, type and device of the pool
) -> None:
    if dispatch.on_gpu(pool):
        from quire.kernels.gpu import blocks as gpu

        return gpu.scatter_blocks(pool, ids, source)
    words, staging = as_words(pool, source)
    words.index_copy_(0, ids.long(), staging)


def as_words(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same memory as [blocks, words], in the widest integers that fill a block and to which all are aligned."""
    first = tensors[0]
    shape, dtype, device = first.shape[1:], first.dtype, first.device
    assert all(t.is_contiguous() and (t.shape[1:], t.dtype, t.device) == (shape, dtype, device) for t in tensors)
    places = [shape.numel() * dtype.itemsize]
    places += [place for t in tensors for place in (t.data_ptr(), int(t.storage_offset()) * dtype.itemsize)]
    word = next(word for word in WORDS if all(place % word.itemsize == 0 for place in places))
    return [t.view(len(t), shape.numel()).view(word) for t in tensors]
