"""The files of what is pushed or imported, laid out to be read: as they were uploaded, or as the hub has them."""

from __future__ import annotations

from pathlib import Path

from hub.errors import BlobCorrupt, UploadLost
from hub.refs import AdapterRef, Digest
from hub.registry.access import Access
from hub.registry.grants import Caller
from hub.verify import copy_checked


class LayingOut(Access):
    """What BeginPush, Publish and Adopt have in common."""

    def _lay_out(self, owner: str, ref: AdapterRef, name: str, digest: Digest, size: int, directory: Path) -> None:
        """One file at its place: as it was uploaded, or as another version of this adapter has it."""
        if self._uploads.place(owner, digest, directory / name):
            return
        if not self._hub.holds_file(ref.full_name, digest):
            raise UploadLost(f"{name} is not here any more: it has to be uploaded again")
        try:
            with self._uploads.new_file(directory / name, size) as write:
                copy_checked(self._hub.storage, digest, size, name, write)
        except BlobCorrupt as error:
            self._uploads.ask_anew(owner, digest)
            raise UploadLost(f"{name} is damaged in the hub's storage: uploading it again mends that") from error


def owner_of(caller: Caller, ref: AdapterRef) -> str:
    """Under whom uploads are kept: nobody reaches another's, nor those for another adapter."""
    return f"{caller.subject}\n{ref.full_name}"
