"""Two versions side by side: config, metrics, data, lineage, and every tensor."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from hub import json_text
from hub.adapter_dir import CONFIG_FILE, WEIGHTS_FILE
from hub.blobs import BlobStore
from hub.errors import HubUnavailable
from hub.kinds import check_adapter
from hub.lora_config import MAX_CONFIG_BYTES, LoraConfig
from hub.safetensors_file import MappedTensors, mapped
from hub.tensor_names import parse_tensor_name
from hub.tensor_values import as_floats
from hub.verify import copy_checked, read_checked
from hub.versions import Version

Change = tuple[Any, Any]  # what A has and what B has; None: does not have it


@dataclass(frozen=True)
class TensorDiff:
    """One tensor of either version. Norms are Frobenius; None: that side has no such tensor."""

    name: str
    norm_a: float | None
    norm_b: float | None
    cosine: float | None  # None: only one side has it, the shapes differ, or a norm is 0
    change: float | None  # norm of b - a; None as above, but 0 norms are fine


@dataclass(frozen=True)
class DeltaDiff:
    """What a LoRA module adds to its weight, scaling · B·A, whatever factors it is written in."""

    module: str
    norm_a: float | None
    norm_b: float | None
    cosine: float | None


@dataclass(frozen=True)
class Diff:
    """How version `b` differs from version `a`."""

    a: Version
    b: Version
    relation: str  # "same", "A is a parent of B", …
    config: Mapping[str, Change]
    base: Mapping[str, Change]
    metrics: Mapping[str, Change]
    recipe: Mapping[str, Change]
    datasets: Mapping[str, Change]
    tensors: tuple[TensorDiff, ...]  # those that differ
    deltas: tuple[DeltaDiff, ...]  # modules with LoRA factors on either side whose factors differ
    same_tensors: int  # byte for byte


def compare(blobs: BlobStore, a: Version, b: Version, relation: str) -> Diff:
    """The differences of two versions; raises BlobCorrupt where bytes are damaged, NotAnAdapter for models."""
    for version in (a, b):
        check_adapter(version)
    configs = [read_checked(blobs, version, CONFIG_FILE) for version in (a, b)]
    values = [json_text.parse_object(data, max_bytes=MAX_CONFIG_BYTES) for data in configs]
    with _weights(blobs, a) as weights_a, _weights(blobs, b) as weights_b:
        names = sorted(weights_a.slots.keys() | weights_b.slots.keys())
        differing = [name for name in names if not _same(weights_a, weights_b, name)]
        tensors = tuple(_tensor(weights_a, weights_b, name) for name in differing)
        parsed = [LoraConfig.parse(data) for data in configs]
        deltas = tuple(_deltas((weights_a, weights_b), (parsed[0], parsed[1]), values[0] == values[1], set(differing)))
    ma, mb = a.manifest, b.manifest
    return Diff(
        a, b, relation,
        config=changes(*values),
        base=changes(vars(ma.base), vars(mb.base)),
        metrics=changes(ma.metrics, mb.metrics),
        recipe=changes(ma.recipe, mb.recipe),
        datasets=changes(ma.datasets, mb.datasets),
        tensors=tensors,
        deltas=deltas,
        same_tensors=len(names) - len(differing),
    )  # fmt: skip


def changes(a: Any, b: Any) -> dict[str, Change]:
    """What differs between two JSON values, by path with dots; items of lists by their names if any."""
    flat_a, flat_b = dict(_flat(a, "")), dict(_flat(b, ""))
    return {
        path: (flat_a.get(path), flat_b.get(path))
        for path in sorted(flat_a.keys() | flat_b.keys())
        if path not in flat_a or path not in flat_b or flat_a[path] != flat_b[path]
    }


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}{'.' if prefix else ''}{key}")
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value, start=1):
            name = item.get("name") if isinstance(item, Mapping) else None
            yield from _flat(item, f"{prefix}[{name if isinstance(name, str) else number}]")
    elif prefix:
        yield prefix, value


@contextmanager
def _weights(blobs: BlobStore, version: Version) -> Iterator[MappedTensors]:
    """The version's weights, checked while they are copied to a temporary file, then mapped."""
    entry = version.manifest.files[WEIGHTS_FILE]
    try:
        with tempfile.TemporaryDirectory(prefix="loraplex-diff-") as directory:
            path = Path(directory) / WEIGHTS_FILE
            with path.open("xb") as file:
                copy_checked(blobs, entry.sha256, entry.bytes, f"{WEIGHTS_FILE} of {version.text}", file.write)
            with mapped(path) as opened:
                yield opened
    except OSError as error:
        raise HubUnavailable(
            f"the weights of {version.text} cannot be laid out to compare them: {os.strerror(error.errno or 0)}; "
            "TMPDIR names another place for them"
        ) from error


def _same(a: MappedTensors, b: MappedTensors, name: str) -> bool:
    if name not in a.slots or name not in b.slots:
        return False
    slots = a.slots[name], b.slots[name]
    return (
        slots[0].dtype == slots[1].dtype and slots[0].shape == slots[1].shape and a.bytes_of(name) == b.bytes_of(name)
    )


def _array(weights: MappedTensors, name: str) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    slot = weights.slots.get(name)
    if slot is None:
        return None
    return as_floats(slot.dtype, weights.bytes_of(name)).astype(np.float64).reshape(slot.shape)


def _tensor(a: MappedTensors, b: MappedTensors, name: str) -> TensorDiff:
    x, y = _array(a, name), _array(b, name)
    norm_a = None if x is None else float(np.linalg.norm(x))
    norm_b = None if y is None else float(np.linalg.norm(y))
    if x is None or y is None or x.shape != y.shape:
        return TensorDiff(name, norm_a, norm_b, None, None)
    cosine = _cosine(float(np.vdot(x, y)), norm_a, norm_b)
    return TensorDiff(name, norm_a, norm_b, cosine, float(np.linalg.norm(y - x)))


Factors = tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]
_LINEAR: Final = {"lora_A": 0, "lora_B": 1}


def _deltas(
    weights: tuple[MappedTensors, MappedTensors], configs: tuple[LoraConfig, LoraConfig], same_config: bool,
    differing: set[str],
) -> Iterator[DeltaDiff]:  # fmt: skip
    """<s·BA, s'·B'A'> = s·s'·tr((BᵀB')(A'Aᵀ)): products of rank by rank, never a whole weight."""
    names: dict[str, dict[str, str]] = {}
    for opened in weights:
        for name in opened.slots:
            site = parse_tensor_name(name)
            if site.kind in _LINEAR:
                names.setdefault(site.module, {})[site.kind] = name
    for module, parts in sorted(names.items()):
        if same_config and not differing & set(parts.values()):
            continue
        sides = [_factors(opened, config, module, parts) for opened, config in zip(weights, configs, strict=True)]
        norms = [None if side is None else math.sqrt(max(0.0, _inner(side, side))) for side in sides]
        a, b = sides
        cosine = None
        if a is not None and b is not None and a[0].shape[1] == b[0].shape[1] and a[1].shape[0] == b[1].shape[0]:
            cosine = _cosine(_inner(a, b), norms[0], norms[1])
        yield DeltaDiff(module, norms[0], norms[1], cosine)


def _factors(weights: MappedTensors, config: LoraConfig, module: str, parts: Mapping[str, str]) -> Factors | None:
    """A `[r, in]` and scaling · B `[out, r]`, further dimensions laid out flat; None where this side has neither."""
    a, b = (_array(weights, parts[kind]) if kind in parts else None for kind in _LINEAR)
    if a is None or b is None:
        return None
    rank = a.shape[0]
    return a.reshape(rank, -1), config.scaling(module, rank) * b.reshape(b.shape[0], -1)


def _inner(x: Factors, y: Factors) -> float:
    return float(np.sum((x[1].T @ y[1]) * (x[0] @ y[0].T)))


def _cosine(product: float, norm_a: float | None, norm_b: float | None) -> float | None:
    if not norm_a or not norm_b:
        return None
    return max(-1.0, min(1.0, product / (norm_a * norm_b)))
