"""Filling a decoder: from safetensors, slice by slice, or with random numbers.

Each tensor of the checkpoint's table is mapped, read as this rank's slice only, cast, and copied to its final place.
Fused parameters (q, k, v; gate, up) are filled from the top in the table's order. A decoder leaves this file complete
or not at all. To a GPU everything travels through two pinned buffers: one is filled while the other is on its way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from quire.worker.config import WorkerConfig
from quire.worker.host import usable_cores
from quire.worker.models.checkpoint import (
    HEAD,
    Group,
    TensorSpec,
    bounds,
    local_shape,
    not_tied,
    open_checkpoint,
    tensors,
)
from quire.worker.models.decoder import Decoder
from quire.worker.models.spec import ModelError, ModelSpec
from quire.worker.parallel import TensorParallel

Progress = Callable[[int, int], None]
Stream = Iterator[tuple[TensorSpec, torch.Tensor]]

COMPARED_ROWS = 4096
"""Of an embedding and its copy at once."""
DUMMY_STD = 0.02
DUMMY_CHUNK = 1 << 20
"""Elements that one core draws at once, a whole number of rows: the unit that a cut by rows can skip."""
STAGING_BYTES = 32 << 20
"""Of each of the two pinned buffers."""


def load_model(config: WorkerConfig, spec: ModelSpec, tp: TensorParallel, progress: Progress | None = None) -> Decoder:
    """The rank's decoder, filled. `progress` is called with bytes done and bytes in all."""
    spec.check_parallel(tp.size)
    dtype = getattr(torch, config.dtype)
    if config.load_format == "dummy":
        stream = _dummy(spec, tp, config.seed, dtype)
    elif config.load_format == "auto":
        stream = _safetensors(config.model, spec, tp)
    else:
        raise ModelError(f"load_format {config.load_format!r} is not known; give auto or dummy")
    table = tensors(spec)
    total = sum(prod(local_shape(tensor, spec, tp.rank, tp.size)) for tensor in table) * dtype.itemsize
    model = Decoder(spec, tp, dtype, config.device, min(config.max_model_len, spec.max_position_embeddings))
    fill(model, stream, lambda done: progress(done, total) if progress else None)
    model.pack(config.deterministic)
    return model


def fill(model: Decoder, stream: Stream, progress: Callable[[int], None]) -> None:
    parameters = dict(model.named_parameters())
    rows = dict.fromkeys(parameters, 0)
    copy = _copier(next(iter(parameters.values())).device)
    done = 0
    for tensor, data in stream:
        target, start = parameters[tensor.parameter], rows[tensor.parameter]
        part = target.data[start : start + len(data)]
        assert part.shape == data.shape, (tensor, part.shape, data.shape)
        copy(part, data)
        rows[tensor.parameter] += len(data)
        done += part.numel() * part.element_size()
        progress(done)
    missing = [name for name, parameter in parameters.items() if rows[name] != len(parameter)]
    assert not missing, f"not filled: {missing}"


def _copier(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """What copies host tensors into tensors on the device."""
    if device.type == "cpu":
        return torch.Tensor.copy_
    return Staging(STAGING_BYTES, pinned=True).copy


class Staging:
    """Host tensors on their way to a device, through two buffers in turn."""

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        """`pinned`: copies go on by themselves, and a buffer is taken again when its last one is over."""
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._over = [torch.cuda.Event() if pinned else None for _ in range(2)]
        self._next = 0

    def copy(self, target: torch.Tensor, data: torch.Tensor) -> None:
        """`target` is contiguous, and of a type that `data` is cast to on the way."""
        assert target.is_contiguous() and target.shape == data.shape, (target.shape, data.shape)
        to, source = target.view(-1), data.reshape(-1)
        room = len(self._buffers[0]) // to.element_size()
        for start in range(0, len(to), room):
            self._copy_part(to[start : start + room], source[start : start + room])

    def _copy_part(self, target: torch.Tensor, source: torch.Tensor) -> None:
        buffer, over = self._buffers[self._next], self._over[self._next]
        self._next = 1 - self._next
        if over is not None:
            over.synchronize()
        staged = buffer[: target.numel() * target.element_size()].view(target.dtype)
        staged.copy_(source)
        target.copy_(staged, non_blocking=True)
        if over is not None:
            over.record()


def _safetensors(folder: str, spec: ModelSpec, tp: TensorParallel) -> Stream:
    stored = open_checkpoint(folder, spec)
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def opened(name: str) -> Any:
            place = stored[name]
            if place.file not in files:
                files[place.file] = stack.enter_context(safe_open(str(place.file), framework="pt", device="cpu"))
            return files[place.file].get_slice(place.name)

        for tensor in tensors(spec):
            cut = bounds(tensor, spec, tp.rank, tp.size)
            data = opened(tensor.name)[tuple(slice(*bound) for bound in cut)]
            is_tied = tensor.parameter == "embedding.weight" and spec.tied_head
            if is_tied and HEAD in stored and not _equal(data, opened(HEAD), first=cut[0][0]):
                raise not_tied(stored[HEAD].file)
            yield tensor, data


def _equal(data: torch.Tensor, stored: Any, first: int) -> bool:
    """Whether the stored tensor has these rows from row `first` on."""
    for start in range(0, len(data), COMPARED_ROWS):
        rows = data[start : start + COMPARED_ROWS]
        if not torch.equal(rows, stored[first + start : first + start + len(rows)].to(rows.dtype)):
            return False
    return True


def _dummy(spec: ModelSpec, tp: TensorParallel, seed: int, dtype: torch.dtype) -> Stream:
    for tensor in tensors(spec):
        yield tensor, dummy_tensor(tensor, seed, bounds(tensor, spec, tp.rank, tp.size), dtype)


def dummy_tensor(
    tensor: TensorSpec, seed: int, cut: tuple[tuple[int, int], ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The cut of a random normal tensor that is a function of (seed, name, full shape): norms around 1, everything
    else around 0."""
    (start, stop), inner = cut[0], tuple(slice(*bound) for bound in cut[1:])
    rows = max(1, DUMMY_CHUNK // prod(tensor.shape[1:]))
    mean = 1 if tensor.group is Group.NORMS and tensor.name.endswith(".weight") else 0
    data = torch.empty((stop - start, *(last - first for first, last in cut[1:])), dtype=dtype)

    def draw(first: int) -> None:
        last = min(first + rows, tensor.shape[0])
        key = f"{seed}/{tensor.name}/{tensor.shape}/{first}".encode()
        chunk_seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little", signed=True)
        generator = torch.Generator().manual_seed(chunk_seed)
        chunk = torch.randn((last - first, *tensor.shape[1:]), generator=generator).mul_(DUMMY_STD).add_(mean)
        kept = slice(max(start, first), min(stop, last))
        data[kept.start - start : kept.stop - start] = chunk[(slice(kept.start - first, kept.stop - first), *inner)]

    # Drawing is one core's work for each generator, and lets others run.
    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(draw, range(start // rows * rows, stop, rows)):
            pass
    return data
