"""The lists of seeded bugs keep up with the code, and the tool that proves them is not easily satisfied.

Proving them takes minutes: `python tests/kernels/seeded_bugs.py`.
"""

from __future__ import annotations

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

FILE = Path(__file__).parents[1] / "seeded_bugs.py"
# Not by its folder's place on the path: a folder called `kernels` there would hide what transformers imports.
spec = importlib.util.spec_from_file_location("seeded_bugs", FILE)
assert spec and spec.loader
seeded_bugs = importlib.util.module_from_spec(spec)
sys.modules["seeded_bugs"] = seeded_bugs
spec.loader.exec_module(seeded_bugs)

BUGS_FOUND = seeded_bugs.collect()


def test_every_entry_fits_its_file() -> None:
    wrong = {bug.name: found for bug in BUGS_FOUND if (found := seeded_bugs.mistakes(bug))}
    assert not wrong
    for source in {bug.source for bug in BUGS_FOUND}:
        names = [bug.name for bug in BUGS_FOUND if bug.source == source]
        assert len(set(names)) == len(names), source


def test_every_file_with_kernels_has_seeded_bugs() -> None:
    root = seeded_bugs.ROOT
    files = {str(f.relative_to(root)) for f in root.glob("kernels/gpu/*.py") if "\n@triton.jit" in f.read_text()}
    assert len(files) > 5
    assert files <= {bug.file for bug in BUGS_FOUND}


def test_what_counts_as_caught(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/thing.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "kernels/other.py").write_text("unused = 1\n")
    (tmp_path / "tests/kernels").mkdir(parents=True)
    (tmp_path / "tests/kernels/test_thing.py").write_text(
        'FILE = "kernels/thing.py"\n'
        'BUGS = [("one more", FILE, "2 * x", "2 * x + 1", "test_double")]\n'
        "from quire.kernels import thing\n"
        "def test_double():\n    assert thing.double(0) == 0\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    (one_more,) = seeded_bugs.collect(tmp_path)
    assert one_more.node == "tests/kernels/test_thing.py::test_double"
    cases = {
        one_more: "",
        replace(one_more, bugged="3 * x"): "the test passed",
        replace(one_more, bugged="nobody"): "the test failed by NameError, not by an assertion",
        replace(one_more, bugged="__import__('os')._exit(3)"): "the test did not come to an end: exit status 3",
        replace(one_more, file="kernels/other.py", original="1", bugged="2"): "kernels/other.py was not imported",
        replace(one_more, original="three"): "the original text occurs 0 times",
        replace(one_more, original="x"): "the original text occurs 2 times",
        replace(one_more, bugged="2 *"): "the wrong text is not Python",
        replace(one_more, bugged="(2 * x)"): "the wrong text means the same",
        replace(one_more, test="test_triple"): "tests/kernels/test_thing.py has no test_triple",
    }
    with ThreadPoolExecutor(2) as pool:
        verdicts = pool.map(lambda bug: seeded_bugs.prove(bug, tmp_path)[0], cases)
    for verdict, start in zip(verdicts, cases.values(), strict=True):
        assert verdict.startswith(start) and bool(verdict) == bool(start)
    assert seeded_bugs.check_unchanged([one_more], tmp_path) == ""
    (tmp_path / "kernels/thing.py").write_text("def double(x):\n    return 2 * x + 3\n")
    assert "assert 3 == 0" in seeded_bugs.check_unchanged([one_more], tmp_path)
