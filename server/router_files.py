"""The files of a router's directory, looked at without torch: `hub serve` does so before it loads anything."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from server.errors import RouterInvalid

SETTINGS: Final = "router.json"
TENSORS: Final = "router.safetensors"


def check_directory(directory: Path) -> None:
    """Raise `RouterInvalid` where there is no router in `directory`."""
    for name in (SETTINGS, TENSORS):
        if not (directory / name).is_file():
            raise RouterInvalid(f"there is no {name} in {directory}: `hub continual router` writes a router's files")
