"""A base model's fingerprint: equal for equal functions, however the files are named, split or dated.

    fingerprint = SHA-256 over canonical JSON of
        {"config": config.json without NOISE, "tensors": {name: {"dtype", "shape", "sha256" of the raw bytes}}}

over all *.safetensors files of the directory, so sharding anew does not change it; changing one bit of one weight does.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import platformdirs

from hub import json_text
from hub.errors import BaseMalformed, SafetensorsMalformed
from hub.progress import Progress
from hub.refs import Digest
from hub.safetensors_file import mapped

# Keys of config.json, at any depth, that do not change what the model computes: provenance, the library's version, the
# type to load in (the tensors say theirs), and what only concerns padding or returned extras.
NOISE: Final = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "attn_implementation",
        "dtype",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_MAX_JSON_BYTES = 64 * 1024 * 1024
_CACHE_FORMAT = 1


@dataclass(frozen=True)
class BaseFingerprint:
    """What identifies a base, and what adapters are checked against."""

    fingerprint: str  # "sha256:…"
    shapes: Mapping[str, tuple[int, ...]]  # by the tensor's name in the file: "model.layers.0.mlp.up_proj.weight"


def fingerprint_directory(directory: Path, *, progress: Progress | None = None) -> BaseFingerprint:
    """The fingerprint of the model in `directory` (config.json and *.safetensors); raises BaseMalformed.

    Weights are mapped, not loaded. The result is cached by the files' names, sizes and modification times.
    """
    try:
        config = json_text.parse_object((directory / "config.json").read_bytes(), max_bytes=_MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise BaseMalformed(f"{directory}: config.json {what}") from error
    files = _weight_files(directory)
    key = _stat_key(config, files)
    found = _cached(key)
    if found is None:
        found = _computed(config, files, progress or (lambda what, done, total: None))
        _remember(key, found)
        _remember(found.fingerprint.removeprefix("sha256:"), found)
    return found


def known_shapes(fingerprint: str) -> Mapping[str, tuple[int, ...]] | None:
    """The tensor shapes of a base that was fingerprinted on this machine before, or None."""
    found = _cached(Digest.parse(fingerprint).hex)
    return found.shapes if found is not None and found.fingerprint == fingerprint else None


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        # Some repositories carry a second, consolidated copy; the index says which files are the model.
        try:
            names = json_text.parse_object(index.read_bytes(), max_bytes=_MAX_JSON_BYTES)["weight_map"].values()
            files = sorted({directory / Path(name).name for name in names})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BaseMalformed(f"{directory}: {index.name} is damaged") from error
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise BaseMalformed(f"{directory}: {', '.join(missing) or '*.safetensors'} is missing")
    return files


def _computed(config: dict[str, Any], files: list[Path], report: Progress) -> BaseFingerprint:
    tensors: dict[str, dict[str, Any]] = {}
    done, total = 0, sum(file.stat().st_size for file in files)
    for file in files:
        try:
            with mapped(file) as opened:
                for name, slot in opened.slots.items():
                    if name in tensors:
                        raise BaseMalformed(f"the base has the tensor {name!a} in two files")
                    with opened.bytes_of(name) as data:
                        digest = hashlib.sha256(data).hexdigest()
                    tensors[name] = {"dtype": slot.dtype, "shape": list(slot.shape), "sha256": digest}
                    done += slot.end - slot.begin
                    report("hashing the base", done, total)
        except SafetensorsMalformed as error:
            raise BaseMalformed(f"the base's {error}") from error
        except OSError as error:
            raise BaseMalformed(f"the base's {file.name} cannot be read: {error.strerror}") from error
    digest = json_text.digest_of({"config": _without_noise(config), "tensors": tensors})
    return BaseFingerprint(digest, {name: tuple(entry["shape"]) for name, entry in tensors.items()})


def _without_noise(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_noise(item) for key, item in value.items() if key not in NOISE}
    if isinstance(value, list):
        return [_without_noise(item) for item in value]
    return value


def _stat_key(config: dict[str, Any], files: list[Path]) -> str:
    stats = []
    for file in files:
        real = file.resolve()
        stat = real.stat()
        stats.append([str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    return json_text.digest_of([_CACHE_FORMAT, _without_noise(config), stats]).hex


def _cache_directory() -> Path:
    return platformdirs.user_cache_path("loraplex") / "fingerprints"


def _cached(key: str) -> BaseFingerprint | None:
    try:
        entry = json.loads((_cache_directory() / f"{key}.json").read_bytes())
        shapes = {str(name): tuple(map(int, shape)) for name, shape in entry["shapes"].items()}
        return BaseFingerprint(Digest.parse(entry["fingerprint"]), shapes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent or damaged: compute anew


def _remember(key: str, found: BaseFingerprint) -> None:
    text = json.dumps({"fingerprint": found.fingerprint, "shapes": {k: list(v) for k, v in found.shapes.items()}})
    try:
        directory = _cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".tmp", delete=False) as file:
            file.write(text)
        Path(file.name).replace(directory / f"{key}.json")
    except OSError:
        pass  # a cache that cannot be written only costs time
