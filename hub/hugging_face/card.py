"""The model card of a version at Hugging Face: its own README.md, with what the hub knows written into it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from hub.errors import SourceInvalid
from hub.hugging_face.address import is_model_id
from hub.versions import Version

# The block between two lines of dashes at the beginning, as Hugging Face's pages find it.
_FRONT_MATTER: Final = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_BEGIN: Final = "<!-- loraplex: begin -->"
_END: Final = "<!-- loraplex: end -->"
_OWN: Final = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)


def card_of(version: Version, readme: str | None, base_model: str | None, parents: Sequence[str]) -> str:
    """README.md for `version`: YAML front matter (base_model, library, tags, lineage), its own text, its provenance.

    `base_model` None: the base's name where that is an id at Hugging Face, or what the card says. What the card says of
    other things stays as it is. Raises SourceInvalid where its front matter is none.
    """
    import yaml

    told, text = _split(readme or "")
    manifest = version.manifest
    base = base_model or (manifest.base.name if is_model_id(manifest.base.name) else None)
    matter: dict[str, Any] = {**told}
    if base is not None:
        matter["base_model"] = base
        matter.setdefault("base_model_relation", "adapter")
    matter.setdefault("library_name", "peft")
    tags = told.get("tags") or []
    matter["tags"] = list(dict.fromkeys([*(tags if isinstance(tags, list) else [tags]), "lora", "loraplex"]))
    matter["loraplex"] = {
        "version": version.text,
        "digest": str(version.digest),
        "parents": [str(parent) for parent in manifest.parents],
        **({"base_fingerprint": manifest.base.fingerprint} if manifest.base.fingerprint else {}),
    }
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    body = _OWN.sub("\n", text).strip("\n") or f"# {version.full_name}"
    return f"---\n{front}---\n\n{body}\n\n{_provenance(version, parents)}"


def _split(readme: str) -> tuple[dict[str, Any], str]:
    import yaml

    found = _FRONT_MATTER.match(readme)
    if found is None:
        return {}, readme
    try:
        told = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError) as error:
        raise SourceInvalid("the front matter of the version's README.md is no YAML: mend it and push again") from error
    if told is not None and not isinstance(told, dict):
        raise SourceInvalid("the front matter of the version's README.md is no mapping: mend it and push again")
    return told or {}, readme[found.end() :]


def _provenance(version: Version, parents: Sequence[str]) -> str:
    manifest = version.manifest
    rows = {
        "version": f"`{version.text}`",
        "digest": f"`{version.digest}`",
        "made from": ", ".join(f"`{parent}`" for parent in parents),
        "base": f"{_cell(manifest.base.name or 'unknown')} `{manifest.base.fingerprint or 'unverified'}`",
        "trained with": _cell(manifest.base.quantization or ""),
        "created": f"{manifest.created}{f' by {_cell(manifest.creator)}' if manifest.creator else ''}",
        **{f"metric {_cell(name)}": f"{value:g}" for name, value in _numbers(version)},
    }
    lines = [_BEGIN, "## Provenance", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join([*lines, _END]) + "\n"


def _numbers(version: Version) -> list[tuple[str, float]]:
    from hub.search import metric_numbers

    return sorted(metric_numbers(version.manifest.metrics))


def _cell(text: str) -> str:
    """`text` as one cell of a table: facts are written by strangers."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", "".join(char if char.isprintable() else " " for char in text))[:200]
