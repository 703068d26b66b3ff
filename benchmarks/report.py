"""Figures as JSON, for whoever compares runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure


def write_json(path: Path, machine: str, figures: Sequence[Figure], **more: Any) -> None:
    """The machine, each figure with its bound and whether it is kept, and what else there is to say."""
    report = {"machine": machine, "figures": [asdict(figure) | {"met": figure.met} for figure in figures], **more}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
