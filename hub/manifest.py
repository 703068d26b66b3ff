"""The manifest: everything a version is, frozen. Its canonical JSON's SHA-256 IS the version.

docs/FORMAT.md describes the JSON key by key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from hub import json_text
from hub.base_identity import BaseIdentity
from hub.errors import BlobCorrupt
from hub.model_dir import ParsedModel
from hub.parsing import file_limit
from hub.refs import Digest

if TYPE_CHECKING:
    from hub.adapter_dir import ParsedAdapter
    from hub.parsing import Parsed

SCHEMA: Final = "loraplex.manifest/1"
MODEL_SCHEMA: Final = "loraplex.model/1"  # of a version that is a whole model
MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True)
class FileEntry:
    """One file of a version: where its bytes are, and how many."""

    sha256: Digest
    bytes: int


@dataclass(frozen=True)
class LoraFacts:
    """What the weights are, read from config and tensors."""

    ranks: Mapping[str, int]  # rank (as text, JSON keys are text) → number of modules with it
    alpha: float
    targets: tuple[str, ...]  # last components of the module names, sorted: "q_proj"
    modules: int
    parameters: int
    dtypes: tuple[str, ...]
    features: tuple[str, ...]  # "rslora", "dora", "modules_to_save", … (LoraConfig.features)
    changes_nothing: bool = False  # the delta is zero everywhere

    @property
    def max_rank(self) -> int:
        """The largest rank, 0 where only token rows are trained."""
        return max(map(int, self.ranks), default=0)


@dataclass(frozen=True)
class ModelFacts:
    """What a whole model's weights are."""

    architecture: str  # "LlamaForCausalLM"
    parameters: int
    tensors: int
    dtypes: tuple[str, ...]


NO_LORA: Final = LoraFacts({}, 0.0, (), 0, 0, (), ())


@dataclass(frozen=True)
class Manifest:
    """One version of one adapter, or of one whole model."""

    name: str  # "team/sentiment"
    files: Mapping[str, FileEntry]
    tensors: Digest  # over every tensor's name, dtype, shape and bytes
    base: BaseIdentity
    lora: LoraFacts
    recipe: Mapping[str, Any] = field(default_factory=dict)
    datasets: Mapping[str, Any] | Sequence[Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[Digest, ...] = ()  # digests of the versions it was made from
    creator: str | None = None
    created: str = ""  # RFC 3339, UTC, "2026-01-31T12:00:00Z"
    model: ModelFacts | None = None  # of kind "model"; then `lora` is NO_LORA

    @property
    def kind(self) -> Literal["adapter", "model"]:
        """What the version is."""
        return "adapter" if self.model is None else "model"

    @classmethod
    def of(
        cls, adapter: Parsed, *, name: str, base: BaseIdentity, parents: Sequence[Digest], creator: str | None,
        created: str,
    ) -> Self:  # fmt: skip
        """The manifest of a parsed adapter or model published as `name`."""
        lora, model = _weights_facts(adapter)
        return cls(
            name=name,
            files={file.name: FileEntry(file.sha256, file.bytes) for file in adapter.files.values()},
            tensors=adapter.tensors_digest,
            base=base,
            lora=lora,
            model=model,
            recipe=adapter.facts.recipe,
            datasets=adapter.facts.datasets,
            metrics=adapter.facts.metrics,
            seeds=adapter.facts.seeds,
            parents=tuple(parents),
            creator=creator,
            created=created,
        )

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The manifest in `data`, canonical JSON of this schema; raises BlobCorrupt on anything else.

        Its files are those that a version of its kind may have: whoever sent `data` does not choose where they go.
        """
        try:
            value = json_text.parse_object(data, max_bytes=MAX_MANIFEST_BYTES)
            schema = value.pop("schema")
            if schema not in (SCHEMA, MODEL_SCHEMA):
                raise ValueError("has a schema this release does not read")
            files = value.pop("files")
            manifest = cls(
                files={name: FileEntry(Digest.parse(e["sha256"]), int(e["bytes"])) for name, e in files.items()},
                tensors=Digest.parse(value.pop("tensors")),
                base=BaseIdentity(**value.pop("base")),
                lora=_parse_lora(value.pop("lora")) if schema == SCHEMA else NO_LORA,
                model=_parse_model(value.pop("model")) if schema == MODEL_SCHEMA else None,
                parents=tuple(map(Digest.parse, value.pop("parents"))),
                **value,
            )
            if manifest.canonical() != data:
                raise ValueError("is not canonical")
            _check_files(manifest)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BlobCorrupt(f"a manifest {error}") from error
        return manifest

    def canonical(self) -> bytes:
        """The bytes that are stored and hashed."""
        return self._canonical

    @cached_property
    def _canonical(self) -> bytes:
        return json_text.canonical(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """As JSON values, `schema` included."""
        value = asdict(self)
        # Adapters' manifests are byte for byte what they were before there were models.
        del value["lora" if self.model is not None else "model"]
        return {"schema": SCHEMA if self.model is None else MODEL_SCHEMA, **value}

    @property
    def digest(self) -> Digest:
        """The version's identity."""
        return Digest.of_hex(hashlib.sha256(self._canonical).hexdigest())

    @property
    def content(self) -> Digest:
        """What makes two pushes of one name the same: all but who, when and from which parents."""
        return content_of(self._canonical)


def content_of(manifest: bytes) -> Digest:
    """The `content` of a manifest in its canonical bytes."""
    kept = json_text.without(manifest, "parents", "creator", "created")
    return Digest.of_hex(hashlib.sha256(kept).hexdigest())


def _check_files(manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        limit = file_limit(name, manifest.kind)
        if limit is None:
            raise ValueError(
                f"names the file {name[:80]!a}, which no {manifest.kind} has: it is damaged, forged, or of a newer "
                "release than this one"
            )
        if not 0 <= entry.bytes <= limit:
            raise ValueError(f"gives {name} {entry.bytes} bytes; at most {limit} are taken")


def _weights_facts(adapter: Parsed) -> tuple[LoraFacts, ModelFacts | None]:
    if not isinstance(adapter, ParsedModel):
        return _lora_facts(adapter), None
    dtypes = tuple(sorted({tensor.dtype for tensor in adapter.tensors.values()}))
    return NO_LORA, ModelFacts(adapter.architecture, adapter.parameters, len(adapter.tensors), dtypes)


def _parse_model(value: dict[str, Any]) -> ModelFacts:
    return ModelFacts(dtypes=tuple(value.pop("dtypes")), **value)


def _lora_facts(adapter: ParsedAdapter) -> LoraFacts:
    counts: dict[str, int] = {}
    for rank in sorted(adapter.ranks.values()):
        counts[str(rank)] = counts.get(str(rank), 0) + 1
    return LoraFacts(
        ranks=counts,
        alpha=adapter.config.lora_alpha,
        targets=tuple(sorted({module.rpartition(".")[2] for module in adapter.ranks})),
        modules=len(adapter.ranks),
        parameters=adapter.parameters,
        dtypes=tuple(sorted({tensor.dtype for tensor in adapter.tensors.values()})),
        features=adapter.config.features,
        changes_nothing=adapter.changes_nothing,
    )


def _parse_lora(value: dict[str, Any]) -> LoraFacts:
    tuples: dict[str, Any] = {key: tuple(value.pop(key)) for key in ("targets", "dtypes", "features")}
    return LoraFacts(**tuples, **value)
