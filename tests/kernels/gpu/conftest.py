"""What tests of the Triton kernels have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


@pytest.fixture
def steady_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of orders of summation. Triton's interpreter multiplies with NumPy, whose library may sum a row by its
    place in a tile; a GPU does not, and with this neither does NumPy."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
        products = a.astype(dtype)[..., :, :, None] * b.astype(dtype)[..., None, :, :]
        total: np.ndarray = products.sum(axis=-2)
        return total

    monkeypatch.setattr(np, "matmul", matmul)
