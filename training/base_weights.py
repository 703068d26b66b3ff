"""The base's own matrices, read from its files in full precision, whatever the base is held in while training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from training.errors import WeightsMissing


def matrices(directory: Path, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(module, W [out, in] float32), one after the other; `modules` are named as adapters name them.

    Raises `WeightsMissing` where the files have no such matrix: their architecture stores it under another name.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        where = {name: directory / file for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    else:
        where = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                where.update(dict.fromkeys(opened.keys(), file))
    for module in modules:
        name = f"{module}.weight"
        if name not in where:
            raise WeightsMissing(f"the base in {directory.name} has no tensor {name}")
        with safe_open(where[name], framework="pt") as opened:
            yield module, opened.get_tensor(name).float()
