"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from quire.cluster.sizes import bytes_text, parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("8k", 8000), ("1K", 1024), ("25.6k", 25600), (" 2M ", 2 << 20), ("1m", 10**6)]
)
def test_counts(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("1024", 1024), ("512M", 512 << 20), ("2GiB", 2 << 30), ("2G", 2 << 30), ("80GB", 80 * 10**9),
     ("1.5 GiB", 3 << 29), ("2g", 2 * 10**9), ("1TiB", 1 << 40), ("5B", 5)],
)  # fmt: skip
def test_bytes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "k", "8q", "-1", "1.5", "1e3", "0x10", "8 k k", "1" * 400, "٣", "nan"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_count(text)
    with pytest.raises(ValueError):
        parse_bytes(text)


def test_bytes_as_people_read_them() -> None:
    shown = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 3 << 20: "3.0 MiB", 5 << 29: "2.50 GiB", 1 << 40: "1024.00 GiB"}
    assert {size: bytes_text(size) for size in shown} == shown
