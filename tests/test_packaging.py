"""What is installed is what lies in the folders, and the generated code is what the protos say."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cluster", "kernels", "protos", "scheduler", "worker")


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_with_code_is_a_listed_package():
    folders = {file.parent.relative_to(ROOT) for top in FOLDERS for file in (ROOT / top).rglob("*.py")}
    expected = {f"quire.{'.'.join(folder.parts)}": str(folder) for folder in folders}
    assert settings()["package-dir"] == expected
    assert sorted(settings()["packages"]) == sorted(expected)


def test_the_generated_code_is_what_the_protos_say(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
    link = tmp_path / "quire"
    link.mkdir()
    (link / "protos").mkdir()
    sources = sorted((ROOT / "protos").glob("*.proto"))
    for source in sources:
        (link / "protos" / source.name).write_text(source.read_text())
    output = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    names = [f"quire/protos/{source.name}" for source in sources]
    assert protoc.main(["protoc", f"-I{tmp_path}", *output, *names]) == 0
    made = {file.name: file.read_text() for file in (link / "protos").glob("*_pb2*")}
    kept = {file.name: file.read_text() for file in (ROOT / "protos").glob("*_pb2*") if file.suffix in (".py", ".pyi")}
    assert made.keys() == kept.keys()
    assert made == kept, "run `make protos` and commit what it writes"


def test_the_scheduler_runs_where_nothing_else_is_installed():
    root = Path(importlib.util.find_spec("quire.scheduler.engine").origin).parents[1]
    program = f"""
import importlib.abc, sys, types
for name, path in (("quire", {str(root)!r}), ("quire.scheduler", {str(root / "scheduler")!r})):
    module = types.ModuleType(name); module.__path__ = [path]; sys.modules[name] = module
import quire.scheduler.engine, quire.scheduler.scheduler
foreign = {{name.split(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names) - {{"quire", "__main__"}}
assert not foreign, foreign
"""
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)
