"""Imports run one way between the folders, and the scheduler needs nothing but Python."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cluster", "kernels", "protos", "scheduler", "worker")

# What a folder may import, beside the standard library and itself.
MAY_IMPORT = {
    "scheduler": set(),
    "kernels": {"llvmlite", "numba", "numpy", "torch", "triton"},
    "protos": {"google", "grpc"},
    "worker": {
        "quire.kernels", "quire.protos", "grpc", "grpc_health", "grpc_reflection", "google", "numpy", "safetensors",
        "tokenizers", "torch", "transformers", "triton",
    },
    "cluster": {
        "quire.protos", "quire.scheduler", "click", "google", "grpc", "grpc_health", "grpc_reflection", "grpc_status",
        "jinja2", "ray", "tokenizers", "tqdm", "transformers",
    },
}  # fmt: skip

# These need the standard library alone, so anything above may read them.
PLAIN = {
    "quire.worker.compiled", "quire.worker.config", "quire.worker.host", "quire.worker.models.spec",
    "quire.worker.models.checkpoint",
}  # fmt: skip


def imports(file: Path, at_import: bool = False) -> set[str]:
    """Modules that a file imports; with `at_import`, only those that importing it imports."""
    tree = ast.parse(file.read_text())
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if at_import and id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where a thing comes from"
            names.add(node.module)
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


def source_files(folder: str) -> list[Path]:
    return [file for file in (ROOT / folder).rglob("*.py") if "_pb2" not in file.name]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_run_one_way(folder):
    for file in source_files(folder):
        for name in imports(file):
            layer = ".".join(name.split(".")[:2]) if name.startswith("quire") else name.split(".")[0]
            if layer == f"quire.{folder}" or layer in MAY_IMPORT[folder] or name in PLAIN:
                continue
            lazily = folder == "cluster" and layer == "quire.worker" and name not in imports(file, at_import=True)
            assert lazily, f"{file.relative_to(ROOT)} may not import {name}"


def test_plain_modules_need_the_standard_library_alone():
    for name in PLAIN:
        file = ROOT / (name.removeprefix("quire.").replace(".", "/") + ".py")
        assert imports(file) <= PLAIN | {"quire.worker.models.rope"}, name


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folders_are_namespace_packages(folder):
    found = [str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob("__init__.py")]
    assert not found, f"{found}: a regular package called kernels would hide the one that transformers imports"


def test_nothing_ray_knows_reaches_beyond_the_files_that_place_processes():
    users = {file.name for file in source_files("cluster") if "ray" in {n.split(".")[0] for n in imports(file)}}
    assert users <= {"actors.py", "launch.py"}
