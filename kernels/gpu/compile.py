"""Compiles every kernel variant that Quire ships, for every GPU it supports, on a machine that needs none.

    python -m quire.kernels.gpu.compile [--target sm_90] [--only SUBSTRING] [--json FILE]

prints for each variant what the compiler made of it, and exits with 1 when one does not compile, takes more shared
memory than its device has, spills registers though it is hot, or does without Hopper's matrix instructions though it
is made for them.

A variant is specialised as a launch would specialise it, with pointers that are multiples of 16 bytes.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire.kernels.gpu.device import DEVICES, Device, Variant

MODULES = tuple(
    f"quire.kernels.gpu.{name}"
    for name in ("attention", "activation", "blocks", "linear", "norm", "qkv", "sampling", "step_inputs")
)
PROCESSES = 2

TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "u8",  # kernels take its patterns
}

ALIGNED = ("tt.divisibility", 16)


@dataclass(frozen=True, slots=True)
class Specialised:
    """What the compiler is told about a kernel's arguments; by parameter name, and by position."""

    types: dict[str, str] = field(default_factory=dict)
    constants: dict[tuple[int], Any] = field(default_factory=dict)
    attributes: dict[tuple[int], Any] = field(default_factory=dict)


@dataclass(slots=True)
class Built:
    """One variant, compiled for one GPU; memory in bytes."""

    registers: int = 0
    """Per thread; vector registers on AMD."""
    spilled: int = 0
    """Per thread, to memory."""
    stack: int = 0
    """Per thread."""
    shared: int = 0
    """Per program."""
    counts: dict[str, int] = field(default_factory=dict)
    """What only this device has. HGMMA: Hopper's matrix instructions, by which four warps work as one; HMMA: those of
    one warp. SGPR: registers of a whole warp on AMD; parked: of these, how many were kept in lanes of vector registers,
    which costs instructions but no memory."""
    seconds: float = 0.0
    error: str = ""


def specialise(variant: Variant) -> Specialised:
    """As triton.jit does at a launch with these arguments. ValueError: they are not the kernel's."""
    found = Specialised()
    names = [parameter.name for parameter in variant.kernel.params]
    if names != list(variant.arguments):
        raise ValueError(f"arguments {', '.join(variant.arguments)} for parameters {', '.join(names)}")
    for index, parameter in enumerate(variant.kernel.params):
        value, is_open = variant.arguments[parameter.name], not parameter.do_not_specialize
        kind, is_aligned = "", False
        if isinstance(value, torch.dtype) and not parameter.is_constexpr:
            kind, is_aligned = "*" + TYPES[value], is_open
        elif parameter.is_constexpr or value is None:
            kind = "constexpr"
        elif isinstance(value, bool):
            kind = "u1"
        elif isinstance(value, float):
            kind = "fp32"
        elif value == 1 and is_open:
            kind = "constexpr"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_aligned = value % 16 == 0 and is_open
        found.types[parameter.name] = kind
        if kind == "constexpr":
            found.constants[(index,)] = value
        if is_aligned and not parameter.do_not_specialize_on_alignment:
            found.attributes[(index,)] = [list(ALIGNED)]
    return found


def build(variant: Variant, device: Device) -> Built:
    started = time.perf_counter()
    try:
        arguments = specialise(variant)
        compiled = triton.compile(
            ASTSource(variant.kernel, arguments.types, arguments.constants, arguments.attributes),
            target=GPUTarget(device.backend, device.arch, device.warp_size),
            options={"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options},
        )
        built = _read_cuda(compiled.asm, device) if device.backend == "cuda" else _read_hip(compiled.asm)
        built.shared = compiled.metadata.shared
    # A compiler may raise anything, and its own message is what helps.
    except Exception as error:
        built = Built(error=f"{type(error).__name__}: {error}".strip())
    built.seconds = time.perf_counter() - started
    return built


def _read_cuda(asm: dict[str, Any], device: Device) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", file)
        used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        built = Built(registers=used["REG"], stack=used["STACK"] + used["LOCAL"])
        # Disassembling takes time: only for what may be found.
        code = _cuobjdump("--dump-sass", file) if built.stack or (device.is_hopper and "mma" in asm["ptx"]) else ""
    # Kernels have no arrays of their own on the stack: whatever is stored there is spilled.
    for stored in re.findall(r"\sSTL(\S*)\s", code):
        bits = re.findall(r"\d+", stored) or [32]
        built.spilled += int(bits[-1]) // 8
    if device.is_hopper:
        built.counts = {name: len(re.findall(rf"\s{name}\.", code)) for name in ("HGMMA", "HMMA")}
    return built


def _cuobjdump(what: str, file: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, what, str(file)]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout  # noqa: S603


def _read_hip(asm: dict[str, Any]) -> Built:
    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", asm["amdgcn"], re.MULTILINE)
        assert found, name
        return int(found[1])

    stack = number("private_segment_fixed_size")
    return Built(
        registers=number("vgpr_count"),
        spilled=max(4 * number("vgpr_spill_count"), stack),
        stack=stack,
        counts={"SGPR": number("sgpr_count"), "parked": number("sgpr_spill_count")},
    )


def faults(variant: Variant, device: Device, built: Built) -> list[str]:
    """Why a variant may not be shipped; usually nothing."""
    if built.error:
        return [f"does not compile: {built.error}"]
    found = []
    if built.shared > device.shared_bytes:
        found.append(f"takes {built.shared} bytes of shared memory, the device has {device.shared_bytes}")
    if variant.hot and built.spilled:
        found.append(f"is hot and spills {built.spilled} bytes")
    if variant.matrix and device.is_hopper and not built.counts["HGMMA"]:
        found.append("has no HGMMA instruction")
    return found


@functools.cache
def variants_of(module: str, target: str) -> list[Variant]:
    listed: Callable[[Device], list[Variant]] = importlib.import_module(module).variants
    return listed(DEVICES[target])


@dataclass(frozen=True, slots=True)
class Task:
    """A variant, by what another process needs to find it: the place in its module's list."""

    module: str
    target: str
    index: int

    @property
    def variant(self) -> Variant:
        return variants_of(self.module, self.target)[self.index]

    @property
    def key(self) -> tuple[str, ...]:
        """Equal where what is compiled is the same."""
        variant = self.variant
        kernel = f"{variant.kernel.__module__}.{variant.kernel.__name__}"
        rest = variant.arguments, variant.num_warps, variant.num_stages, variant.options
        return (self.target, kernel, *map(repr, rest))


def build_task(task: Task) -> Built:
    return build(task.variant, DEVICES[task.target])


def build_all(tasks: Iterable[Task], processes: int = PROCESSES) -> dict[Task, Built]:
    """In processes of their own, since a fault in the compiler ends its process; that costs one variant."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    done: dict[Task, Built] = {}

    def work() -> None:
        process = _process()
        try:
            while True:
                task = waiting.get_nowait()
                try:
                    done[task] = process.submit(build_task, task).result()
                except BrokenProcessPool:
                    done[task] = Built(error="the compiler crashed")
                    process = _process()
        except queue.Empty:
            process.shutdown()

    threads = [threading.Thread(target=work) for _ in range(min(processes, waiting.qsize()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def table(target: str, rows: list[tuple[Variant, Built]]) -> str:
    special = next((list(built.counts) for _, built in rows if built.counts), [])
    columns = ["registers", "spilled", "stack", "shared", *special, "seconds"]
    lines = [f"{target}: {len(rows)} variants", "  ".join((*columns, "variant"))]
    for variant, built in rows:
        numbers = built.registers, built.spilled, built.stack, built.shared, *map(built.counts.get, special)
        cells = ["-" if built.error else str(number) for number in numbers] + [f"{built.seconds:.1f}"]
        marks = ", ".join(name for name, is_so in (("hot", variant.hot), ("matrix", variant.matrix)) if is_so)
        cells = [cell.rjust(len(column)) for cell, column in zip(cells, columns, strict=True)]
        lines.append("  ".join((*cells, variant.name)) + (f" [{marks}]" if marks else ""))
    return "\n".join(lines)


def gather(modules: Iterable[str], targets: Iterable[str], only: str) -> tuple[list[Task], list[str]]:
    """The variants whose names contain `only`, and which modules could not list theirs."""
    tasks, failures = [], []
    for module in modules:
        for target in targets:
            try:
                listed = variants_of(module, target)
            # Whatever is wrong with one module, the others are looked at.
            except Exception as error:
                failures.append(f"{module}: {type(error).__name__}: {error}")
                break
            tasks += [Task(module, target, i) for i, variant in enumerate(listed) if only in variant.name]
    return tasks, failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m quire.kernels.gpu.compile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--target", action="append", choices=DEVICES, help="may be repeated; all of them if not given")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="variants whose name contains this")
    parser.add_argument("--module", action="append", help="where to look for variants(device) instead")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there too")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted. Unset it.")
    targets = list(dict.fromkeys(chosen.target or DEVICES))

    started = time.perf_counter()
    tasks, failures = gather(chosen.module or MODULES, targets, chosen.only)
    first: dict[tuple[str, ...], Task] = {}
    for task in tasks:
        first.setdefault(task.key, task)
    built = build_all(first.values(), chosen.processes)

    report: dict[str, list[dict[str, Any]]] = {}
    for target in targets:
        rows = [(task.variant, built[first[task.key]]) for task in tasks if task.target == target]
        print(table(target, rows), end="\n\n")
        report[target] = [
            {"name": variant.name, "kernel": variant.kernel.__name__, "hot": variant.hot, "matrix": variant.matrix}
            | asdict(result)
            for variant, result in rows
        ]
        for variant, result in rows:
            failures += [f"{target}: {variant.name}: {fault}" for fault in faults(variant, DEVICES[target], result)]
    if not tasks:
        failures.append("there is nothing to compile")
    if chosen.json:
        chosen.json.write_text(json.dumps({"triton": triton.__version__, "targets": report}, indent=1) + "\n")
    total = sum(result.seconds for result in built.values())
    print(
        f"triton {triton.__version__}: {len(built)} different of {len(tasks)} variants in "
        f"{time.perf_counter() - started:.0f} s, {total:.0f} s of compiling"
    )
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
