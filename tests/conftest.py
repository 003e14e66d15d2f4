"""Triton kernels are interpreted where there is no GPU, and compiled where there is one: the same tests run both ways.

What `triton.jit` makes of a function is settled when the function is defined, those of triton itself included, so this
must be known before anything imports triton. A test that starts a process to compile in drops TRITON_INTERPRET from
its environment.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import hypothesis
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""It exists for Linux only."""

collect_ignore_glob = [] if HAS_TRITON else ["kernels/gpu/*"]

if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "imported too early to be told to interpret"
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples on every machine: a run that fails is a run that anybody can repeat. To look for new ones:
# HYPOTHESIS_PROFILE=search python -m pytest tests/kernels --hypothesis-seed=7
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.register_profile("search", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_report_header() -> str:
    if not HAS_TRITON:
        return "triton is not installed: tests/kernels/gpu is left out"
    return "triton kernels are " + ("interpreted" if "TRITON_INTERPRET" in os.environ else "compiled")
