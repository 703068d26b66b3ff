"""What a pushed directory holds: an adapter, or a whole model."""

from __future__ import annotations

from pathlib import Path

from hub.adapter_dir import FILE_LIMITS, Hashed, ParsedAdapter, parse_adapter
from hub.model_dir import (
    MAX_FILES,
    MAX_WEIGHTS_FILE_BYTES,
    ParsedModel,
    is_model_directory,
    model_file_limit,
    parse_model,
)
from hub.progress import Progress

__all__ = ["MAX_FILES", "MAX_FILE_BYTES", "Parsed", "check_directory", "file_limit", "parse_directory"]

Parsed = ParsedAdapter | ParsedModel
MAX_FILE_BYTES = max(MAX_WEIGHTS_FILE_BYTES, *FILE_LIMITS.values())  # of any one file


def parse_directory(directory: Path, *, progress: Progress | None = None) -> Parsed:
    """The adapter or the model in `directory`; raises a subclass of AdapterRejected.

    A model has config.json and no adapter_config.json; everything else is read as an adapter.
    """
    if is_model_directory(directory):
        return parse_model(directory, progress=progress)
    return parse_adapter(directory, progress=progress)


def check_directory(directory: Path, *, progress: Progress | None, hashed: Hashed) -> Parsed:
    """As `parse_directory`, for who only hands the files on: the tensors of the result have no digests.

    Where it raises, `hashed` may have been called.
    """
    if not is_model_directory(directory):
        return parse_adapter(directory, progress=progress, hashed=hashed, digest=lambda data: None)
    model = parse_model(directory, progress=progress, digest=lambda data: None)
    hashed(list(model.files.values()))
    return model


def file_limit(name: str, kind: str | None = None) -> int | None:
    """The most bytes a version's file of this name may have; None: there is none.

    `kind`: a manifest's, "adapter" or "model"; None where it is not known yet.
    """
    limits = {"adapter": FILE_LIMITS.get(name), "model": model_file_limit(name)}
    return max((limit for each, limit in limits.items() if limit is not None and kind in (None, each)), default=None)
