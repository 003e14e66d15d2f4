"""Sizes as people write and read them."""

from __future__ import annotations

import re

_COUNT = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_BYTES = {
    **{"": 1, "B": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12},
    **{"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}


def parse_count(text: str) -> int:
    """As vLLM: 1k is 1000, 1K is 1024, 25.6k is 25600. Raises ValueError."""
    return _parse(text, _COUNT, "a whole number, or one with k (1000) or K (1024) behind it")


def parse_bytes(text: str) -> int:
    """2GiB and 2G are 2^31; 2GB and 2g are 2 billion. Raises ValueError."""
    return _parse(text, _BYTES, "a number of bytes, such as 512M, 2GiB or 8GB")


def _parse(text: str, units: dict[str, int], expected: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    value = float(match[1]) * units[match[2]] if match and match[2] in units else -1.0
    if not value.is_integer() or not 0 <= value < 2**63:
        raise ValueError(f"{text[:40]!r} is not {expected}")
    return int(value)


def bytes_text(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
