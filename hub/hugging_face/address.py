"""Where an adapter is at Hugging Face.

hf://user/repo[@revision]        a branch, a tag or a commit; none: main
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from hub.errors import SourceInvalid

SCHEME: Final = "hf://"
_PART: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_ADDRESS: Final = re.compile(rf"hf://({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9_./-]{{0,127}}))?", re.ASCII)
_MODEL: Final = re.compile(rf"{_PART}/{_PART}", re.ASCII)


@dataclass(frozen=True)
class Address:
    """A model repository, and a revision of it."""

    repository: str  # "user/repo"
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The address in `text`; raises SourceInvalid."""
        found = _ADDRESS.fullmatch(text)
        if found is None or ".." in text or "--" in found[1] or found[1].endswith(".git"):
            raise SourceInvalid(f"{text[:200]!a} is no address: write hf://user/repo or hf://user/repo@revision")
        return cls(found[1], found[2])

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def is_address(text: str) -> bool:
    """Whether this means a place at Hugging Face."""
    return text.startswith(SCHEME)


def is_model_id(text: str | None) -> bool:
    """Whether this names a model at Hugging Face: "org/name"."""
    return text is not None and _MODEL.fullmatch(text) is not None
