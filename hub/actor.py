"""Who writes: the name that manifests and the audit carry."""

from __future__ import annotations

import getpass


def current_user() -> str | None:
    """This process's user, where the system knows a printable name."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):
        return None
    return name if name.isprintable() else None
