"""Sizes on the command line."""

import click
import pytest

from hub.byte_size import ByteSize, as_option, as_text


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5gib", 3 << 29), ("1GB", 10**9), ("4096", 4096), (" 3 KiB ", 3072)],
)
def test_sizes(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1 M", "1e9", "nan", "0x10", "１MiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.UsageError, match="no size"):
        ByteSize().convert(text, None, None)


def test_shown_sizes() -> None:
    assert [as_text(size) for size in (0, 1023, 1024, 3_500_000, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.3 MiB",
        "5.0 TiB",
    ]
    assert [as_option(size) for size in (512 << 20, 2 << 30, 1000)] == ["512MiB", "2GiB", "1000"]


def test_a_least_size() -> None:
    assert ByteSize(1024).convert("1KiB", None, None) == 1024
    with pytest.raises(click.BadParameter, match="'1023' is too small: give at least 1KiB"):
        ByteSize(1024).convert("1023", None, None)
