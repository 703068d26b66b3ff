"""loraplex.json: what the training that made an adapter says about it.

    {"schema": "loraplex.facts/1", "recipe": {…}, "datasets": {…} or […], "metrics": {…}, "seeds": {…},
     "base": {"name": …, "revision": …, "fingerprint": "sha256:…", "quantization": …}}

Every key is optional. Apart from "base" the objects are free in form; the file as a whole is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from hub import json_text
from hub.base_identity import BaseIdentity
from hub.errors import FactsMalformed, RefInvalid
from hub.refs import Digest

FACTS_FILE: Final = "loraplex.json"
SCHEMA: Final = "loraplex.facts/1"
MAX_FACTS_BYTES: Final = 256 * 1024
_FREE_KEYS = ("recipe", "datasets", "metrics", "seeds")
_BASE_KEYS = ("name", "revision", "fingerprint", "quantization")


@dataclass(frozen=True)
class Facts:
    """The facts of one adapter; all empty where nobody recorded any."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    datasets: Mapping[str, Any] | Sequence[Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, Any] = field(default_factory=dict)
    base: BaseIdentity | None = None

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The facts in the bytes of a loraplex.json; raises FactsMalformed."""
        try:
            value = json_text.parse_object(data, max_bytes=MAX_FACTS_BYTES)
        except ValueError as error:
            raise FactsMalformed(f"{FACTS_FILE} {error}") from error
        schema = value.pop("schema", SCHEMA)
        if schema != SCHEMA:
            raise FactsMalformed(f"{FACTS_FILE} has the schema {str(schema)[:60]!a}; this hub reads {SCHEMA}")
        base = _parse_base(value.pop("base", None))
        for key, item in value.items():
            if key not in _FREE_KEYS:
                raise FactsMalformed(f"{FACTS_FILE} has the unknown key {key[:60]!a}; known: {', '.join(_FREE_KEYS)}")
            if not isinstance(item, dict) and not (key == "datasets" and isinstance(item, list)):
                raise FactsMalformed(f"{FACTS_FILE}: {key} is no object")
        return cls(**value, base=base)

    def write(self, directory: Path) -> Path:
        """These facts as loraplex.json in `directory`; raises FactsMalformed where they are no bounded JSON."""
        value: dict[str, Any] = {"schema": SCHEMA, **{key: getattr(self, key) for key in _FREE_KEYS}}
        if self.base is not None:
            value["base"] = {key: getattr(self.base, key) for key in _BASE_KEYS}
        try:
            data = json_text.canonical(value)
        except (ValueError, TypeError) as error:
            raise FactsMalformed(f"the facts {error}") from error
        Facts.parse(data)
        path = directory / FACTS_FILE
        path.write_bytes(data)
        return path


def corrects_nf4(recipe: Mapping[str, Any]) -> bool:
    """Whether an adapter trained so undoes part of what NF4 does to its base, and is wrong where that is not in NF4."""
    return recipe.get("init") == "qera"


def _parse_base(value: Any) -> BaseIdentity | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not value.keys() <= set(_BASE_KEYS):
        raise FactsMalformed(f"{FACTS_FILE}: base is no object of {', '.join(_BASE_KEYS)}")
    for key, item in value.items():
        if item is not None and (not isinstance(item, str) or not item.isprintable() or len(item) > 1024):
            raise FactsMalformed(f"{FACTS_FILE}: base.{key} is no line of text")
    if value.get("fingerprint") is not None:
        try:
            Digest.parse(value["fingerprint"])
        except RefInvalid as error:
            raise FactsMalformed(f"{FACTS_FILE}: base.fingerprint: {error}") from error
    return BaseIdentity(**{"name": None, **value})
