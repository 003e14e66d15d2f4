"""Everything in this folder needs a CUDA device, and neither Ray nor an installed package."""

from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:  # of all folders
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
