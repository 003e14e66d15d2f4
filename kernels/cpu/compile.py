"""Compiles the loops that a model on a CPU needs before it needs them, in a process of its own.

    python -m quire.kernels.cpu.compile --dtype bfloat16 --head-size 64 [--kv-cache-dtype fp8] [--done FILE]

A first start has seconds of compiling to do, on one core, and most of them can pass while Ray starts, torch is imported
and weights are read. Whoever needs a loop meanwhile compiles it, or waits where it is being compiled here; so neither
does anything twice, and this begins with what is needed last and takes longest. FILE is made when all are on disk.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from quire.kernels.cpu import blocked_linear, decode, fused, prefill, program, shared, threads
from quire.kernels.cpu.packed import packs
from quire.kernels.cpu.tile import form_of
from quire.kernels.cpu.vector import KINDS
from quire.kernels.kv_cache import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", required=True, choices=sorted(DTYPES.keys() - {"fp8"}))
    parser.add_argument("--head-size", required=True, type=int)
    parser.add_argument("--kv-cache-dtype", choices=sorted(DTYPES))
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--done", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    pool_dtype = arguments.kv_cache_dtype or arguments.dtype
    compile_all(regions(arguments.dtype, pool_dtype, arguments.head_size, arguments.block_size))
    if arguments.done is not None:
        arguments.done.parent.mkdir(parents=True, exist_ok=True)
        arguments.done.touch()


def regions(dtype: str, kv_cache_dtype: str, head_size: int, block_size: int) -> list[Callable[[], int]]:
    """What compiles each of the loops, the longest and those that are needed last at first."""
    form = form_of(head_size, block_size, KINDS[DTYPES[dtype]], KINDS[DTYPES[kv_cache_dtype]])
    found: list[Callable[[], int]] = [
        partial(prefill.prefill_region, form),
        *([partial(shared.shared_region, form)] if packs(form) else []),
        partial(decode.attend_region, form),
        partial(decode.finish_region, form),
        partial(fused.silu_region, DTYPES[dtype]),
        partial(fused.rotate_region, DTYPES[dtype]),
        partial(fused.norm_region, DTYPES[dtype]),
    ]
    if dtype == "bfloat16" and blocked_linear.suits_processor():
        found += [blocked_linear.multiply_region, fused.embed_region, program.program_region]
    return found


def compile_all(regions: list[Callable[[], int]]) -> None:
    """Returns when all are on disk, whoever has compiled them."""
    elsewhere = []
    for compiled in regions:
        try:
            with threads.impatient():
                compiled()
        except threads.Busy:
            elsewhere.append(compiled)
    for compiled in elsewhere:
        compiled()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
