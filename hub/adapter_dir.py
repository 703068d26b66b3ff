"""A PEFT LoRA directory, parsed whole or refused with the reason.

Adapters come from strangers. Nothing here executes anything of theirs: no pickle, no torch, no template; the weights
are mapped and looked at number by number.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hub import binding, json_text, tensor_values
from hub.errors import (
    AdapterFileMissing,
    AdapterTooLarge,
    NormAbsurd,
    PickleRefused,
    SafetensorsMalformed,
    TensorUnknown,
    UnexpectedFile,
)
from hub.facts import FACTS_FILE, MAX_FACTS_BYTES, Facts
from hub.lora_config import MAX_CONFIG_BYTES, LoraConfig
from hub.progress import Progress
from hub.refs import Digest
from hub.safetensors_file import MappedTensors, mapped
from hub.tensor_names import TensorSite, parse_tensor_name

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
README_FILE: Final = "README.md"
# What a directory may hold, and how many bytes of it.
FILE_LIMITS: Final[Mapping[str, int]] = {
    CONFIG_FILE: MAX_CONFIG_BYTES,
    WEIGHTS_FILE: 16 * 1024**3,
    README_FILE: 1024 * 1024,
    FACTS_FILE: MAX_FACTS_BYTES,
}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".t7")


@dataclass(frozen=True)
class AdapterFile:
    """One file of an adapter."""

    name: str
    bytes: int
    sha256: Digest


# Told of the files when all are hashed and everything but the tensors' numbers is checked; from another thread perhaps.
Hashed = Callable[[Sequence[AdapterFile]], None]
TensorDigest = Callable[[memoryview], Digest | None]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: what it is, and the digest of its raw bytes."""

    dtype: str  # "F32", "F16", "BF16" or "F64"
    shape: tuple[int, ...]
    sha256: Digest | None  # None: not asked for
    site: TensorSite


@dataclass(frozen=True)
class ParsedAdapter:
    """An adapter that is fit to be stored."""

    directory: Path
    files: Mapping[str, AdapterFile]  # by name
    config: LoraConfig
    facts: Facts
    tensors: Mapping[str, TensorInfo]  # by PEFT's name
    ranks: Mapping[str, int]  # by module
    parameters: int
    bytes: int  # of all files
    changes_nothing: bool  # every B is zero and nothing else is trained: base output, always

    @property
    def recorded_base(self) -> tuple[str | None, str | None]:
        """(name, revision) of the base, as the config says."""
        return self.config.base_model_name_or_path, self.config.revision

    @property
    def tensors_digest(self) -> Digest:
        """The weights' identity, whatever the file's metadata and order; tensors were digested."""
        assert all(tensor.sha256 for tensor in self.tensors.values())
        return json_text.digest_of(
            {name: {"dtype": t.dtype, "shape": t.shape, "sha256": t.sha256} for name, t in self.tensors.items()}
        )

    def check_binds(self, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every tensor belongs to a module of the base whose parameters have these shapes, and fits it.

        Raises TensorUnknown or ShapeMismatch, naming the module.
        """
        binding.check_binds(self.config, {t.site: t.shape for t in self.tensors.values()}, base_shapes)


def sha256_of(data: bytes | memoryview) -> Digest:
    """The digest of these bytes."""
    return Digest.of_hex(hashlib.sha256(data).hexdigest())


def parse_adapter(
    directory: Path, *, progress: Progress | None = None, hashed: Hashed = lambda files: None,
    digest: TensorDigest = sha256_of,
) -> ParsedAdapter:  # fmt: skip
    """The adapter in `directory`, its tensors digested by `digest`.

    Raises a subclass of AdapterRejected, after `hashed` was called perhaps.
    """
    try:
        return _parsed(directory, progress or (lambda what, done, total: None), hashed, digest)
    except OSError as error:
        raise AdapterFileMissing(f"{error.filename or directory} cannot be read: {error.strerror}") from error


def _parsed(directory: Path, report: Progress, hashed: Hashed, digest: TensorDigest) -> ParsedAdapter:
    sizes = _listed(directory)
    small = {name: _read_small(directory / name) for name in sizes if name != WEIGHTS_FILE}
    config = LoraConfig.parse(small[CONFIG_FILE])
    facts = Facts.parse(small[FACTS_FILE]) if FACTS_FILE in small else Facts()
    files = {name: AdapterFile(name, len(data), sha256_of(data)) for name, data in small.items()}
    with mapped(directory / WEIGHTS_FILE) as weights:
        sites = _sites(weights)
        shapes = {site: weights.slots[name].shape for name, site in sites.items()}
        ranks = binding.check_consistent(config, shapes)

        def hash_whole() -> AdapterFile:
            file = AdapterFile(WEIGHTS_FILE, len(weights.data), sha256_of(weights.data))
            hashed([*files.values(), file])
            return file

        # Hashing lets go of the interpreter: it is done beside the look at the tensors.
        with ThreadPoolExecutor(1, thread_name_prefix="loraplex-hash") as beside:
            whole = beside.submit(hash_whole)
            digests = beside.submit(lambda: {name: digest(weights.bytes_of(name)) for name in weights.slots})
            try:
                values = _look_at_values(weights, report)
                norms = _delta_norms(config, ranks, {sites[name]: value for name, value in values.items()})
            except BaseException:
                digests.cancel()
                raise
            tensors = {
                name: TensorInfo(slot.dtype, slot.shape, digests.result()[name], sites[name])
                for name, slot in weights.slots.items()
            }
            files[WEIGHTS_FILE] = whole.result()
        report("checking", len(weights.data), len(weights.data))
    return ParsedAdapter(
        directory=directory,
        files=dict(sorted(files.items())),
        config=config,
        facts=facts,
        tensors=tensors,
        ranks=ranks,
        parameters=sum(_elements(tensor.shape) for tensor in tensors.values()),
        bytes=sum(file.bytes for file in files.values()),
        changes_nothing=not any(norms.values()) and all(_inert(site, values[name]) for name, site in sites.items()),
    )


def _listed(directory: Path) -> dict[str, int]:
    """Names and sizes of the adapter's files, after refusing everything that is none."""
    entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    pickles = [entry.name for entry in entries if entry.name.lower().endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise PickleRefused(
            f"{_listing(pickles)} may be a pickle, which runs code when loaded. If it is training_args.bin or the like "
            f"it is no part of the adapter: remove it; weights belong in {WEIGHTS_FILE} (save with safe_serialization)"
        )
    names = {entry.name for entry in entries}
    if CONFIG_FILE not in names:
        raise AdapterFileMissing(f"{directory} has no {CONFIG_FILE}: is it a directory that PEFT saved?")
    strange = [entry.name for entry in entries if entry.name not in FILE_LIMITS]
    if strange:
        raise UnexpectedFile(
            f"not part of an adapter: {_listing(strange)}. An adapter has {', '.join(FILE_LIMITS)} and nothing else "
            "(tokenizer and chat template come from the base); push a directory with only these"
        )
    if WEIGHTS_FILE not in names:
        raise AdapterFileMissing(f"{directory} has no {WEIGHTS_FILE}: is it a directory that PEFT saved?")
    sizes = {}
    for entry in entries:
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            kind = "a link" if stat.S_ISLNK(status.st_mode) else "not a plain file"
            raise UnexpectedFile(f"{entry.name} is {kind}; copy the file itself into the directory")
        if status.st_size > FILE_LIMITS[entry.name]:
            limit = FILE_LIMITS[entry.name]
            raise AdapterTooLarge(f"{entry.name} has {status.st_size} bytes; at most {limit} are taken")
        sizes[entry.name] = status.st_size
    return sizes


def _listing(names: list[str]) -> str:
    shown = ", ".join(ascii(name)[1:-1] for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _read_small(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(FILE_LIMITS[path.name] + 1)
    if len(data) > FILE_LIMITS[path.name]:
        raise AdapterTooLarge(f"{path.name} has more than {FILE_LIMITS[path.name]} bytes")
    return data


def _sites(weights: MappedTensors) -> dict[str, TensorSite]:
    sites: dict[str, TensorSite] = {}
    seen: dict[TensorSite, str] = {}
    for name in weights.slots:
        site = parse_tensor_name(name)
        if site in seen:
            raise TensorUnknown(f"the tensors {seen[site]} and {name} are for the same place")
        seen[site] = name
        sites[name] = site
    if not sites:
        raise SafetensorsMalformed(f"{WEIGHTS_FILE} has no tensors")
    return sites


def _look_at_values(weights: MappedTensors, report: Progress) -> dict[str, tensor_values.TensorValues]:
    values = {}
    for name, slot in weights.slots.items():
        values[name] = tensor_values.look_at(name, slot, weights.bytes_of(name))
        report("checking", slot.begin, len(weights.data))
    return values


def _delta_norms(
    config: LoraConfig, ranks: Mapping[str, int], values: Mapping[TensorSite, tensor_values.TensorValues]
) -> dict[str, float]:
    """By module, scaling · ‖A‖ · ‖B‖ >= ‖scaling · B·A‖, a bound on what the adapter adds; raises NormAbsurd."""
    norms = {module: abs(config.scaling(module, rank)) for module, rank in ranks.items()}
    for site, value in values.items():
        if site.kind in ("lora_A", "lora_B", "embedding_A", "embedding_B"):
            norms[site.module] *= value.norm
    for module, norm in norms.items():
        if norm > tensor_values.MAX_DELTA_NORM:
            raise NormAbsurd(
                f"{module}: scaling·|A|·|B| is {norm:.3g}; at most {tensor_values.MAX_DELTA_NORM:g} is taken"
            )
    return norms


def _inert(site: TensorSite, values: tensor_values.TensorValues) -> bool:
    """Whether this tensor, beside the products B·A, leaves the base's output alone for sure."""
    return site.kind in ("lora_A", "lora_B", "embedding_A", "embedding_B", "base") or (
        site.kind == "lora_bias" and values.largest == 0
    )


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
