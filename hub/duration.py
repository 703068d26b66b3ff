"""Times as people write them: 30s, 10m, 2h, 7d."""

from __future__ import annotations

import click

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType[float]):
    """Seconds, written "30s", "10m", "2h" or "7d"; 0 needs no unit."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds."""
        if isinstance(value, float):
            return value
        text = str(value)
        number, unit = (text, "s") if text == "0" else (text[:-1], text[-1:])
        if unit not in _UNITS or not number.isascii() or not number.isdigit() or len(number) > 9:
            self.fail(f"{text!r} is no time: write 30s, 10m, 2h or 7d", param, ctx)
        return float(number) * _UNITS[unit]


def as_option(seconds: float) -> str:
    """Whole seconds as their option is written, exact: "15m"."""
    for unit, size in reversed(_UNITS.items()):
        if seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    raise ValueError(f"{seconds} is no number of whole seconds")
