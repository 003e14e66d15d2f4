"""Every kernel variant compiles for every GPU that Quire supports, and the command that says so notices when not."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from quire.kernels.gpu import compile as gate
from quire.kernels.gpu.compile import Built
from quire.kernels.gpu.device import DEVICES, Variant

FOLDER = Path(gate.__file__).parent

BUGS = [
    (
        "spills go unnoticed",
        "kernels/gpu/compile.py",
        "if variant.hot and built.spilled:",
        "if variant.hot and not built.registers:",
        "test_faults",
    ),
    (
        "an int of 1 is not compiled in",
        "kernels/gpu/compile.py",
        "elif value == 1 and is_open",
        "elif value == 0 and is_open",
        "test_specialised_as_a_launch_would",
    ),
]


def command(*arguments: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(entry) for entry in (path, *sys.path) if entry)
    return subprocess.run(
        [sys.executable, "-m", "quire.kernels.gpu.compile", *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def launched_kernels() -> set[str]:
    """Names of what the files with kernels launch: `name[grid](...)`, for names that triton.jit decorates."""
    decorated, launched = set(), set()
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                decorated.add(node.name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value).rpartition(".")[2])
    return decorated & launched


@pytest.mark.xfail(triton.__version__ < "3.7", strict=False, reason="Triton 3.6 spills a few scalars of five variants")
@pytest.mark.timeout(1200)
def test_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = command("--json", tmp_path / "report.json")
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["triton"] == triton.__version__
    for target in DEVICES:
        rows = report["targets"][target]
        names = [row["name"] for row in rows]
        assert len(set(names)) == len(names), "two variants of one name"
        assert {row["kernel"] for row in rows} >= launched_kernels(), "a kernel is launched that no variant compiles"
        assert all(row["registers"] > 0 for row in rows)
        assert {row["name"] for row in report["targets"]["sm_90"]} == set(names)


BAD_KERNELS = """
import os
import torch
import triton
import triton.language as tl
from quire.kernels.gpu.device import Variant

@triton.jit
def wide(x, SIZE: tl.constexpr):
    at = x + tl.arange(0, SIZE)
    value = tl.load(at)
    tl.store(at, value * tl.sum(value, 0))

@triton.jit
def small_product(x, SIZE: tl.constexpr):
    at = x + tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.load(at)
    tl.store(at, tl.dot(value, value).to(x.dtype.element_ty))

@triton.jit
def wrong(x):
    tl.store(x, tl.load(x + 1) + of_nothing)

class Deadly:
    __name__ = "deadly"

    @property
    def params(self):
        os._exit(1)

def variants(device):
    return [
        Variant("spills", wide, {"x": torch.float32, "SIZE": 16384}, num_warps=1, hot=True),
        Variant("dies", Deadly(), {}),
        Variant("fits", wide, {"x": torch.float32, "SIZE": 1024}, num_warps=1, hot=True),
        Variant("16 rows", small_product, {"x": torch.float16, "SIZE": 16}, hot=True, matrix=True),
        Variant("64 rows", small_product, {"x": torch.float16, "SIZE": 64}, hot=True, matrix=True),
        Variant("broken", wrong, {"x": torch.float32}),
        Variant("misnamed", wrong, {"y": torch.float32}),
    ]
"""


def test_bad_kernels_are_reported(tmp_path: Path) -> None:
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS)
    done = command("--module", "bad_kernels", "--module", "of_nobody", "--target", "sm_90", path=tmp_path)
    assert done.returncode == 1, done.stdout
    failed = [line.removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith("FAILED")]
    starts = [
        "of_nobody: ModuleNotFoundError: ",
        "sm_90: spills: is hot and spills ",
        "sm_90: dies: does not compile: the compiler crashed",
        "sm_90: 16 rows: has no HGMMA instruction",
        "sm_90: broken: does not compile: ",
        "sm_90: misnamed: does not compile: ValueError: arguments y for parameters x",
    ]
    assert len(failed) == len(starts), done.stdout
    for line, start in zip(failed, starts, strict=True):
        assert line.startswith(start)
    assert "of_nothing" in done.stdout


def test_nothing_to_compile_is_a_failure() -> None:
    assert "FAILED there is nothing to compile" in command("--only", "no such variant", "--target", "sm_80").stdout


def test_it_refuses_to_interpret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        gate.main([])
    assert "Unset it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "marks", "built", "found"),
    [
        ("sm_80", {"hot": True, "matrix": True}, {"registers": 255, "shared": 163 << 10}, []),
        ("sm_80", {}, {"registers": 255, "shared": 164 << 10}, ["takes 167936 bytes of shared memory"]),
        ("sm_80", {"hot": True}, {"registers": 255, "spilled": 4}, ["is hot and spills 4 bytes"]),
        ("sm_80", {}, {"registers": 255, "spilled": 4}, []),
        ("sm_90", {"matrix": True}, {"counts": {"HGMMA": 0, "HMMA": 8}}, ["has no HGMMA"]),
        ("sm_90", {"matrix": True}, {"counts": {"HGMMA": 1, "HMMA": 8}}, []),
        ("gfx942", {"matrix": True}, {"counts": {"SGPR": 90, "parked": 8}}, []),
        ("gfx942", {"hot": True}, {"error": "no"}, ["does not compile: no"]),
    ],
)
def test_faults(target: str, marks: dict[str, bool], built: dict[str, Any], found: list[str]) -> None:
    got = gate.faults(Variant("", None, {}, **marks), DEVICES[target], Built(**built))
    assert len(got) == len(found)
    assert all(text.startswith(start) for text, start in zip(got, found, strict=True))


def parameter(name: str, is_constexpr: bool = False, plain: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, is_constexpr=is_constexpr, do_not_specialize=plain, do_not_specialize_on_alignment=False
    )


def test_specialised_as_a_launch_would() -> None:
    values = {
        "pointer": (torch.bfloat16, "*bf16", True),
        "float8": (torch.float8_e4m3fn, "*u8", True),
        "absent": (None, "constexpr", False),
        "one": (1, "constexpr", False),
        "zero": (0, "i32", True),
        "odd": (-7, "i32", False),
        "even": (4096, "i32", True),
        "largest": (2**31 - 1, "i32", False),
        "long": (2**31, "i64", True),
        "real": (0.5, "fp32", False),
        "flag": (True, "u1", False),
    }
    parameters = [parameter(name) for name in values]
    parameters += [
        parameter("SIZE", is_constexpr=True),
        parameter("TYPE", is_constexpr=True),
        parameter("n", plain=True),
    ]
    arguments = {name: value for name, (value, _, _) in values.items()} | {"SIZE": 16, "TYPE": torch.int8, "n": 1}
    got = gate.specialise(Variant("", SimpleNamespace(params=parameters), arguments))
    assert got.types == {name: kind for name, (_, kind, _) in values.items()} | {
        "SIZE": "constexpr", "TYPE": "constexpr", "n": "i32",
    }  # fmt: skip
    assert got.constants == {(2,): None, (3,): 1, (11,): 16, (12,): torch.int8}
    aligned = {(i,) for i, (_, _, is_aligned) in enumerate(values.values()) if is_aligned}
    assert got.attributes == {index: [["tt.divisibility", 16]] for index in aligned}
