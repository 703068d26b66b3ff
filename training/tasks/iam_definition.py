"""AWS's own list of IAM actions, as the package parliament ships it, read without importing parliament."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache

from training.errors import SourceUnavailable
from training.tasks.packages import installed_directory

_GRANTS = re.compile(r"^Grants permissions? to (?=\w)")


@dataclass(frozen=True)
class Action:
    """One action of a service."""

    prefix: str  # "s3"
    name: str  # "GetObject"
    description: str  # "Grants permission to …"
    arns: tuple[str, ...]  # templates of the resources it acts on, required ones first; empty: only "*"

    @property
    def full_name(self) -> str:
        """As policies name it: "s3:GetObject"."""
        return f"{self.prefix}:{self.name}"

    @property
    def phrase(self) -> str | None:
        """What it permits, "retrieve objects from Amazon S3"; None where the description is of another form."""
        text, count = _GRANTS.subn("", " ".join(self.description.split()))
        return text.rstrip(".") if count else None


@lru_cache(maxsize=1)
def actions() -> tuple[tuple[Action, ...], str]:
    """(every action, parliament's version). Raises `SourceUnavailable`."""
    directory, version = installed_directory("parliament", "parliament")
    try:
        services = json.loads((directory / "iam_definition.json").read_text("utf-8"))
    except OSError as error:
        raise SourceUnavailable("the installed parliament has no iam_definition.json") from error
    found = []
    for service in services:
        templates = {resource["resource"]: resource["arn"] for resource in service["resources"]}
        for privilege in service["privileges"]:
            kinds = [kind["resource_type"] for kind in privilege["resource_types"] if kind["resource_type"]]
            kinds.sort(key=lambda kind: not kind.endswith("*"))  # required resources are marked with a star
            arns = [templates[kind.rstrip("*")] for kind in kinds if kind.rstrip("*") in templates]
            found.append(Action(service["prefix"], privilege["privilege"], privilege["description"], tuple(arns)))
    return tuple(found), version
