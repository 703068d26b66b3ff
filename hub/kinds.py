"""What only adapters are for is asked here first."""

from __future__ import annotations

from hub.errors import NotAnAdapter
from hub.versions import Version


def check_adapter(version: Version) -> None:
    """Raise NotAnAdapter where the version is a whole model."""
    if version.manifest.kind != "adapter":
        raise NotAnAdapter(f"{version.text} is a whole model, no adapter: `hub serve --base {version.text}` serves it")
