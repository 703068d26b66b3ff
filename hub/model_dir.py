"""A whole model's directory, as transformers saves it, parsed whole or refused with the reason.

What `hub train --method full` and `hub merge` write. As with adapters nothing here executes anything of a stranger's:
configs that name code of their own are refused, the weights are mapped and looked at number by number.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from hub import json_text, tensor_values
from hub.adapter_dir import README_FILE, AdapterFile, TensorDigest, sha256_of
from hub.errors import (
    AdapterFileMissing,
    AdapterTooLarge,
    ConfigKeyRefused,
    ConfigMalformed,
    DtypeUnsupported,
    SafetensorsMalformed,
    ShapeMismatch,
    TensorMissing,
    TensorUnknown,
    UnexpectedFile,
)
from hub.facts import FACTS_FILE, MAX_FACTS_BYTES, Facts
from hub.progress import Progress
from hub.refs import Digest
from hub.safetensors_file import mapped

CONFIG_FILE: Final = "config.json"
INDEX_FILE: Final = "model.safetensors.index.json"
MAX_WEIGHTS_FILE_BYTES: Final = 64 * 1024**3
MAX_FILES: Final = 4096
_MIB = 1024 * 1024
_WEIGHTS = re.compile(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors", re.ASCII)
# Beside the weights: name → most bytes.
_SMALL: Final[Mapping[str, int]] = {
    CONFIG_FILE: _MIB,
    INDEX_FILE: 64 * _MIB,
    "generation_config.json": _MIB,
    "tokenizer.json": 256 * _MIB,
    "tokenizer_config.json": 16 * _MIB,
    "special_tokens_map.json": _MIB,
    "added_tokens.json": 16 * _MIB,
    "vocab.json": 64 * _MIB,
    "vocab.txt": 64 * _MIB,
    "merges.txt": 64 * _MIB,
    "tokenizer.model": 64 * _MIB,
    "chat_template.jinja": _MIB,
    "merge-report.json": _MIB,  # of `hub merge`
    README_FILE: _MIB,
    FACTS_FILE: MAX_FACTS_BYTES,
}
_JSON = (CONFIG_FILE, INDEX_FILE, "generation_config.json", "tokenizer_config.json")
_RUNS_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ModelTensor:
    """One parameter: its type, shape and the digest of its raw bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: Digest | None  # None: not asked for


@dataclass(frozen=True)
class ParsedModel:
    """A model that is fit to be stored."""

    changes_nothing: ClassVar[bool] = False  # whether it equals its base is not looked at

    directory: Path
    files: Mapping[str, AdapterFile]  # by name
    architecture: str  # config.json's, "LlamaForCausalLM"
    made_from: str | None  # the name that config.json records
    facts: Facts
    tensors: Mapping[str, ModelTensor]
    parameters: int
    bytes: int  # of all files

    @property
    def recorded_base(self) -> tuple[str | None, str | None]:
        """(name, revision) of the base, as the config says."""
        return self.made_from, None

    @property
    def tensors_digest(self) -> Digest:
        """The weights' identity, however they are split over files; tensors were digested."""
        assert all(tensor.sha256 for tensor in self.tensors.values())
        return json_text.digest_of(
            {name: {"dtype": t.dtype, "shape": t.shape, "sha256": t.sha256} for name, t in self.tensors.items()}
        )

    def check_binds(self, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that this is a model of the same shapes as the base it says it was made from.

        A head tied to the embedding may be written or left out. Raises TensorMissing, TensorUnknown or ShapeMismatch.
        """
        own = {name: tensor.shape for name, tensor in self.tensors.items()}
        for name, shape in base_shapes.items():
            if name in own and own[name] != shape:
                raise ShapeMismatch(f"{name} is {list(own[name])}, the base's is {list(shape)}")
            if name not in own and not _is_head(name):
                raise TensorMissing(f"{name} is in the base and not in this model")
        for name in own:
            if name not in base_shapes and not _is_head(name):
                raise TensorUnknown(f"{name} is in this model and not in the base")


def is_model_directory(directory: Path) -> bool:
    """Whether this is meant to be a whole model, not an adapter."""
    return (directory / CONFIG_FILE).is_file() and not (directory / "adapter_config.json").exists()


def model_file_limit(name: str) -> int | None:
    """The most bytes a model's file of this name may have; None: a model has no such file."""
    return MAX_WEIGHTS_FILE_BYTES if _WEIGHTS.fullmatch(name) else _SMALL.get(name)


def parse_model(directory: Path, *, progress: Progress | None = None, digest: TensorDigest = sha256_of) -> ParsedModel:
    """The model in `directory`, its tensors digested by `digest`; raises a subclass of AdapterRejected."""
    try:
        return _parsed(directory, progress or (lambda what, done, total: None), digest)
    except OSError as error:
        raise AdapterFileMissing(f"{error.filename or directory} cannot be read: {error.strerror}") from error


def _parsed(directory: Path, report: Progress, digest: TensorDigest) -> ParsedModel:
    sizes = _listed(directory)
    small = {name: _read_small(directory / name) for name in sizes if not _WEIGHTS.fullmatch(name)}
    values = {name: _parse_json(name, small[name]) for name in _JSON if name in small}
    config = values[CONFIG_FILE]
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise ConfigMalformed(f"{CONFIG_FILE} names no architecture")
    files = {name: AdapterFile(name, len(data), sha256_of(data)) for name, data in small.items()}
    tensors: dict[str, ModelTensor] = {}
    found_in: dict[str, str] = {}
    done, total = 0, sum(sizes.values())
    for name in sizes.keys() - small.keys():
        with mapped(directory / name) as weights:
            for tensor, slot in weights.slots.items():
                if tensor in tensors:
                    raise TensorUnknown(f"the tensor {tensor} is in {found_in[tensor]} and in {name}")
                if slot.dtype not in _DTYPES:
                    raise DtypeUnsupported(
                        f"the tensor {tensor} is of type {slot.dtype}; models are stored as {', '.join(_DTYPES)}, "
                        "and quantized when they are served"
                    )
                data = weights.bytes_of(tensor)
                tensor_values.look_at(tensor, slot, data)
                tensors[tensor] = ModelTensor(slot.dtype, slot.shape, digest(data))
                found_in[tensor] = name
                done += slot.end - slot.begin
                report("checking", done, total)
            files[name] = AdapterFile(name, len(weights.data), sha256_of(weights.data))
    if not tensors:
        raise SafetensorsMalformed("the model has no tensors")
    _check_index(values.get(INDEX_FILE), found_in)
    facts = Facts.parse(small[FACTS_FILE]) if FACTS_FILE in small else Facts()
    return ParsedModel(
        directory=directory,
        files=dict(sorted(files.items())),
        architecture=architectures[0],
        made_from=config["_name_or_path"] if isinstance(config.get("_name_or_path"), str) else None,
        facts=facts,
        tensors=dict(sorted(tensors.items())),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        bytes=sum(file.bytes for file in files.values()),
    )


def _listed(directory: Path) -> dict[str, int]:
    """Names and sizes of the model's files, after refusing everything that is none."""
    entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    strange = [entry.name for entry in entries if model_file_limit(entry.name) is None]
    if strange:
        shown = ", ".join(ascii(name)[1:-1] for name in strange[:8])
        raise UnexpectedFile(
            f"not part of a model: {shown}{' and more' if len(strange) > 8 else ''}. A model has "
            f"model*.safetensors, {', '.join(_SMALL)} and nothing else; push a directory with only these"
        )
    if len(entries) > MAX_FILES:
        raise UnexpectedFile(f"the model has {len(entries)} files; at most {MAX_FILES} are taken")
    sizes = {}
    for entry in entries:
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            kind = "a link" if stat.S_ISLNK(status.st_mode) else "not a plain file"
            raise UnexpectedFile(f"{entry.name} is {kind}; copy the file itself into the directory")
        limit = model_file_limit(entry.name) or 0
        if status.st_size > limit:
            raise AdapterTooLarge(f"{entry.name} has {status.st_size} bytes; at most {limit} are taken")
        sizes[entry.name] = status.st_size
    if not any(map(_WEIGHTS.fullmatch, sizes)):
        raise AdapterFileMissing(f"{directory} has no model.safetensors (save with safe_serialization)")
    return sizes


def _read_small(path: Path) -> bytes:
    limit = _SMALL[path.name]
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise AdapterTooLarge(f"{path.name} has more than {limit} bytes")
    return data


def _parse_json(name: str, data: bytes) -> dict[str, Any]:
    try:
        if name == CONFIG_FILE:
            value = json_text.parse_object(data, max_bytes=_SMALL[name])
        else:  # as transformers reads it: tokenizers write a length of 10^30 for "no limit"
            value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigMalformed(f"{name} {error}") from error
    if not isinstance(value, dict):
        raise ConfigMalformed(f"{name} is no JSON object")
    for key in _RUNS_CODE:
        if value.get(key):
            raise ConfigKeyRefused(f"{name} has {key}, by which a model brings code of its own; the hub takes none")
    return value


def _check_index(index: dict[str, Any] | None, found_in: Mapping[str, str]) -> None:
    """The index, where there is one, says of every tensor in which file it is; without one there is one file."""
    if index is None:
        if set(found_in.values()) != {"model.safetensors"}:
            raise AdapterFileMissing(f"weights in several files need {INDEX_FILE}")
        return
    listed = index.get("weight_map")
    if not isinstance(listed, dict):
        raise ConfigMalformed(f"{INDEX_FILE} has no weight_map")
    if listed != found_in:
        wrong = next(name for name in [*listed, *found_in] if listed.get(name) != found_in.get(name))
        raise TensorMissing(f"{INDEX_FILE} and the weights disagree about {wrong[:160]!a}")


def _is_head(name: str) -> bool:
    return name.endswith(("lm_head.weight", "embed_out.weight"))
