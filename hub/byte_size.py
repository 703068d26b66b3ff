"""Sizes as people write them: 512MiB, 2GiB, 1.5GB, 4096."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}ib": 1024 ** (power + 1) for power, prefix in enumerate("kmgt")}
_UNITS |= {f"{prefix}b": 1000 ** (power + 1) for power, prefix in enumerate("kmgt")}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes; raises ValueError where it is no size."""
    match = _SIZE.fullmatch(text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text[:60]!r} is no size: write 512MiB, 2GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


class ByteSize(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic only in new releases
    """A command-line option that is a number of bytes."""

    name = "size"

    def __init__(self, least: int = 0) -> None:
        """Sizes below `least` are wrong usage."""
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; fails with wrong usage."""
        if isinstance(value, int):
            return value
        try:
            size = parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size < self._least:
            self.fail(f"{value!r} is too small: give at least {as_option(self._least)}", param, ctx)
        return size


def as_option(size: int) -> str:
    """A size as its option is written, exact: "512MiB"."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size % (1 << power) == 0:
            return f"{size >> power}{unit}"
    return str(size)


def as_text(size: int) -> str:
    """A size with the largest binary unit that keeps it at 1 or more: "3.4 MiB"."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.1f} {'KMGT'[power - 1]}iB"
