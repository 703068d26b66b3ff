"""From the hub to a Hugging Face repository: the version's files in one commit, with a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hub.adapter_dir import README_FILE
from hub.errors import NotFound, SourceInvalid
from hub.facade import HubFacade
from hub.hugging_face.address import Address, is_model_id
from hub.hugging_face.card import card_of
from hub.hugging_face.client import client, reasons
from hub.progress import Progress
from hub.refs import AdapterRef, Digest
from hub.versions import Version


@dataclass(frozen=True)
class Published:
    """What was written."""

    version: Version
    commit: str
    url: str
    files: tuple[str, ...]
    has_base: bool  # whether the card names a base that Hugging Face can link to


def publish(
    hub: HubFacade, ref: str, address: Address, *, public: bool = False, base_model: str | None = None,
    progress: Progress | None = None,
) -> Published:  # fmt: skip
    """Write the version `ref` names to the repository, which is made where there is none, private unless `public`.

    `address.revision` is a branch, made where there is none. Writing the same version again makes no new commit.
    Raises a SourceError and what `Hub.pull` raises.
    """
    from huggingface_hub import CommitOperationAdd

    if base_model is not None and not is_model_id(base_model):
        raise SourceInvalid(f"{base_model[:100]!a} is no model at Hugging Face: write org/name")
    version = hub.resolve(ref)
    exact = replace(AdapterRef.parse(version.full_name), selector=version.digest)
    with tempfile.TemporaryDirectory(prefix="loraplex-hf-") as scratch:
        directory = Path(scratch) / "adapter"
        hub.pull(exact, directory, progress)
        card = directory / README_FILE
        readme = card.read_text(encoding="utf-8", errors="replace") if card.exists() else None
        text = card_of(version, readme, base_model, _names(hub, version.manifest.parents))
        card.write_text(text, encoding="utf-8")
        names = tuple(sorted({*version.manifest.files, README_FILE}))
        operations = [CommitOperationAdd(name, str(directory / name)) for name in names]
        api = client()
        with reasons(address):
            api.create_repo(address.repository, private=not public, exist_ok=True, repo_type="model")
            if address.revision not in (None, "main"):
                api.create_branch(address.repository, branch=str(address.revision), exist_ok=True)
            made = api.create_commit(
                address.repository, operations, commit_message=f"{version.text} {version.digest[:19]}",
                revision=address.revision,
            )  # fmt: skip
    has_base = "\nbase_model: " in text.partition("\n---\n")[0]
    return Published(version, str(made.oid), str(made.commit_url), names, has_base)


def _names(hub: HubFacade, parents: Sequence[Digest]) -> list[str]:
    """The parents as people know them, where the hub has them."""
    names = []
    for parent in parents:
        try:
            names.append(f"{hub.get(parent).text} {parent}")
        except NotFound:
            names.append(str(parent))
    return names
