"""Entry points of installed packages, read without `importlib.metadata`, whose import takes half of `hub --help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any


def entry_points(group: str) -> dict[str, str]:
    """The group's entry points, "module:attribute" by name; as `importlib.metadata.entry_points` finds them.

    What it alone finds, such as packages inside zip files, is asked of it where there is nothing else.
    """
    found: dict[str, str] = {}
    for text in _files():
        if f"[{group}]" in text:
            for name, target in _section(text, group):
                found.setdefault(name, target)
    if not found:
        from importlib import metadata

        found = {entry.name: entry.value for entry in metadata.entry_points(group=group)}
    return found


def load(target: str) -> Any:
    """What "module:attribute" names; raises ImportError or AttributeError."""
    module, _, attribute = target.partition(":")
    value: Any = import_module(module)
    for part in filter(None, attribute.split(".")):
        value = getattr(value, part)
    return value


def _files() -> Iterator[str]:
    """The texts of all entry_points.txt, of each package the first on the path."""
    seen = set()
    for place in sys.path:
        try:
            names = [entry.name for entry in os.scandir(place or ".")]
        except OSError:
            continue
        for name in names:
            if not name.endswith((".dist-info", ".egg-info")):
                continue
            package = name.rpartition(".")[0].partition("-")[0].lower().replace("_", "-").replace(".", "-")
            if package in seen:
                continue
            seen.add(package)
            try:
                # pathlib would take longer to import than all of this
                with open(f"{place or '.'}/{name}/entry_points.txt", encoding="utf-8") as file:  # noqa: PTH123
                    yield file.read()
            except OSError:
                continue


def _section(text: str, group: str) -> Iterator[tuple[str, str]]:
    inside = False
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            inside = line == f"[{group}]"
        elif inside and "=" in line and not line.startswith("#"):
            name, _, target = line.partition("=")
            yield name.strip(), target.partition("[")[0].strip()  # extras stand in brackets
