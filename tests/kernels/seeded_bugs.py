"""Proves that the tests of the kernels can fail.

    python tests/kernels/seeded_bugs.py [SUBSTRING ...]

A test file lists mistakes that it must notice:

    BUGS = [("name", "kernels/gpu/file.py", "text that occurs once in it", "wrong text", "test_that_must_fail"), ...]

Each is made in a copy of the package, which the named test then imports in a process of its own. It has to fail there
by an assertion; an import that breaks, a crash or a timeout proves nothing. Without a mistake it has to pass.
The tests run as elsewhere: interpreted without a GPU, compiled with one.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 280
"""Seconds for one test."""

PROBE = '''
"""A pytest plugin: what was imported from where, and how tests ended."""
import json
import sys
from pathlib import Path

import pytest

passed, failed = [], []

def by_assertion(error):
    if isinstance(error, BaseExceptionGroup):
        return any(map(by_assertion, error.exceptions))
    missed = isinstance(error, pytest.fail.Exception) and not str(error).startswith("Timeout")
    return isinstance(error, AssertionError) or missed

def pytest_runtest_makereport(item, call):
    error = call.excinfo.value if call.excinfo else None
    if error is None:
        passed.extend([item.nodeid] if call.when == "call" else [])
    elif not isinstance(error, pytest.skip.Exception):
        failed.append({"node": item.nodeid, "by_assertion": by_assertion(error), "error": type(error).__name__})

def pytest_sessionfinish(session):
    files = [getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith("quire.")]
    outcome = {"files": [file for file in files if file], "passed": passed, "failed": failed}
    Path(__file__).with_name("outcome.json").write_text(json.dumps(outcome))
'''


@dataclass(frozen=True, slots=True)
class Bug:
    name: str
    file: str
    """From the repository's root."""
    original: str
    bugged: str
    test: str
    """A test function, or one of its cases."""
    source: str
    """The file with the test, from the repository's root."""

    @property
    def node(self) -> str:
        return f"{self.source}::{self.test}"


def collect(root: Path = ROOT) -> list[Bug]:
    found = []
    for file in sorted((root / "tests/kernels").rglob("test_*.py")):
        for entry in _listed(ast.parse(file.read_text())):
            found.append(Bug(*entry, source=str(file.relative_to(root))))
    return found


def _listed(tree: ast.Module) -> list[tuple[str, str, str, str, str]]:
    """The value of BUGS, read and not run; it may use constants that stand above it."""
    constants: dict[str, ast.expr] = {}

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return constants.get(node.id, node)

    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name == "BUGS":
                listed: list[tuple[str, str, str, str, str]] = ast.literal_eval(Fill().visit(statement.value))
                return listed
            if isinstance(statement.value, ast.Constant):
                constants[name] = statement.value
    return []


def mistakes(bug: Bug, root: Path = ROOT) -> list[str]:
    """What is wrong with an entry; found without running anything."""
    text = (root / bug.file).read_text()
    count = text.count(bug.original)
    if count != 1:
        return [f"the original text occurs {count} times in {bug.file}"]
    found = []
    try:
        changed = ast.parse(text.replace(bug.original, bug.bugged))
    except SyntaxError as error:
        found.append(f"the wrong text is not Python: {error}")
    else:
        if ast.dump(changed) == ast.dump(ast.parse(text)):
            found.append("the wrong text means the same as the original")
    functions = {
        node.name for node in ast.walk(ast.parse((root / bug.source).read_text())) if isinstance(node, ast.FunctionDef)
    }
    if bug.test.partition("[")[0].rpartition("::")[2] not in functions:
        found.append(f"{bug.source} has no {bug.test}")
    return found


@dataclass(frozen=True, slots=True)
class Outcome:
    files: list[str]
    """That were imported from the copy; from the repository's root."""
    failed: list[dict[str, str | bool]]
    num_passed: int
    seconds: float
    text: str
    """What pytest printed."""
    missing: bool = False
    """It did not come to an end."""


def run(nodes: list[str], changes: dict[str, str], root: Path = ROOT) -> Outcome:
    """Runs tests on a copy of the package in which files (from the repository's root) have other texts."""
    started = time.perf_counter()
    # Real path: what is imported is compared with it.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for top in {Path(file).parts[0] for file in changes}:
            # numba's cache comes along, so that nothing is compiled that has not changed.
            shutil.copytree(root / top, folder / "quire" / top, ignore=shutil.ignore_patterns("*.pyc"))
        for file, text in changes.items():
            (folder / "quire" / file).write_text(text)
        (folder / "seeded_bug_probe.py").write_text(PROBE)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
        }
        options = ["-q", "-x", "-p", "seeded_bug_probe", "-p", "no:cacheprovider", "--color=no"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *nodes],
                env=environment,
                cwd=root,
                timeout=TIMEOUT * max(1, len(nodes)),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            text = f"{done.stdout}\nexit status {done.returncode}"
        except subprocess.TimeoutExpired:
            text = "it took too long"
        seconds = time.perf_counter() - started
        report = folder / "outcome.json"
        if not report.exists():
            return Outcome([], [], 0, seconds, text, missing=True)
        outcome = json.loads(report.read_text())
        copy = folder / "quire"
        files = [str(Path(file).relative_to(copy)) for file in outcome["files"] if Path(file).is_relative_to(copy)]
        return Outcome(files, outcome["failed"], len(outcome["passed"]), seconds, text)


def prove(bug: Bug, root: Path = ROOT) -> tuple[str, float]:
    """Why a mistake counts as not noticed, or nothing; and seconds."""
    wrong = mistakes(bug, root)
    if wrong:
        return "; ".join(wrong), 0.0
    text = (root / bug.file).read_text().replace(bug.original, bug.bugged)
    outcome = run([bug.node], {bug.file: text}, root)
    return _verdict(bug, outcome), outcome.seconds


def _verdict(bug: Bug, outcome: Outcome) -> str:
    last = outcome.text.strip().splitlines()[-1]
    if outcome.missing:
        return f"the test did not come to an end: {last}"
    if bug.file not in outcome.files:
        return f"{bug.file} was not imported from the copy: {last}"
    if any(failure["by_assertion"] for failure in outcome.failed):
        return ""
    if outcome.failed:
        return f"the test failed by {outcome.failed[0]['error']}, not by an assertion"
    return "the test passed" if outcome.num_passed else f"no test ran: {last}"


def check_unchanged(bugs: list[Bug], root: Path = ROOT) -> str:
    """Why the tests named do not pass without a mistake, or nothing."""
    changes = {bug.file: (root / bug.file).read_text() for bug in bugs}
    outcome = run(sorted({bug.node for bug in bugs}), changes, root)
    absent = sorted(changes.keys() - set(outcome.files))
    if outcome.missing or outcome.failed or not outcome.num_passed:
        return outcome.text
    return f"not imported from the copy: {', '.join(absent)}" if absent else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("substring", nargs="*", help="of a bug's name, its file or its test; all of them if not given")
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    texts = {bug: f"{bug.name} {bug.file} {bug.node}" for bug in collect()}
    bugs = [bug for bug, text in texts.items() if not chosen.substring or any(s in text for s in chosen.substring)]
    if not bugs:
        print("no such bug")
        return 1

    well_formed = [bug for bug in bugs if not mistakes(bug)]
    broken = check_unchanged(well_formed) if well_formed else ""
    if broken:
        print(f"without any mistake:\n{broken}")
        return 1
    num_missed = 0
    width = max(len(bug.name) for bug in bugs)
    with ThreadPoolExecutor(chosen.processes) as pool:
        for bug, (verdict, seconds) in zip(bugs, pool.map(prove, bugs), strict=True):
            num_missed += bool(verdict)
            says = f"NOT CAUGHT by {bug.node}: {verdict}" if verdict else f"caught by {bug.node}"
            print(f"{bug.name.ljust(width)}  {seconds:5.1f} s  {bug.file}  {says}", flush=True)
    print(f"{len(bugs) - num_missed} of {len(bugs)} caught")
    return 1 if num_missed else 0


if __name__ == "__main__":
    sys.exit(main())
