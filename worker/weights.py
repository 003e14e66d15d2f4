"""Filling a decoder: from safetensors, slice by slice, or with random numbers.

Each tensor of the checkpoint's table is read as this rank's slice only, cast, and copied to its final place. Fused
parameters (q, k, v; gate, up) are filled from the top in the table's order. A decoder leaves this file complete or
not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from quire.worker.config import WorkerConfig
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
"""Elements that are drawn at once, a whole number of rows: the unit that a cut by rows can skip."""


def load_model(config: WorkerConfig, spec: ModelSpec, tp: TensorParallel, progress: Progress | None = None) -> Decoder:
    """The rank's decoder, filled. `progress` is called with bytes done and bytes in all."""
    spec.check_parallel(tp.size)
    dtype = getattr(torch, config.dtype)
    if config.load_format == "dummy":
        stream = _dummy(spec, tp, config.seed)
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
    done = 0
    for tensor, data in stream:
        target, start = parameters[tensor.parameter], rows[tensor.parameter]
        part = target.data[start : start + len(data)]
        assert part.shape == data.shape, (tensor, part.shape, data.shape)
        part.copy_(data)
        rows[tensor.parameter] += len(data)
        done += part.numel() * part.element_size()
        progress(done)
    missing = [name for name, parameter in parameters.items() if rows[name] != len(parameter)]
    assert not missing, f"not filled: {missing}"


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


def _dummy(spec: ModelSpec, tp: TensorParallel, seed: int) -> Stream:
    for tensor in tensors(spec):
        yield tensor, dummy_tensor(tensor, seed, bounds(tensor, spec, tp.rank, tp.size))


def dummy_tensor(tensor: TensorSpec, seed: int, cut: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """The cut of a random normal tensor that is a function of (seed, name, full shape): norms around 1, everything
    else around 0."""
    (start, stop), inner = cut[0], tuple(slice(*bound) for bound in cut[1:])
    rows = max(1, DUMMY_CHUNK // prod(tensor.shape[1:]))
    pieces = []
    for first in range(start // rows * rows, stop, rows):
        last = min(first + rows, tensor.shape[0])
        key = f"{seed}/{tensor.name}/{tensor.shape}/{first}".encode()
        chunk_seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little", signed=True)
        generator = torch.Generator().manual_seed(chunk_seed)
        chunk = torch.randn((last - first, *tensor.shape[1:]), generator=generator) * DUMMY_STD
        pieces.append(chunk[(slice(max(start - first, 0), stop - first), *inner)])
    data = torch.cat(pieces)
    is_scale = tensor.group is Group.NORMS and tensor.name.endswith(".weight")
    return data + 1 if is_scale else data
