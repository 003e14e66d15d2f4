"""Small random models as fixtures, and one thread for all of these tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import random_models
import torch
from transformers import PretrainedConfig, PreTrainedModel


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more, and lose much on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[[PretrainedConfig], tuple[Path, PreTrainedModel]]:
    return lambda config: (tmp_path, random_models.build_model(config, tmp_path))


@pytest.fixture(scope="session")
def build_model() -> Callable[[PretrainedConfig, Path], PreTrainedModel]:
    return random_models.build_model
