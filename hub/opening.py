"""A hub by its URL, whichever kind it is."""

from __future__ import annotations

from collections.abc import Callable

from hub.errors import HubNotFound
from hub.facade import HubFacade
from hub.hub import Hub
from hub.place import Place, named

__all__ = ["named", "open_existing", "open_hub", "open_own"]


def open_hub(url: str | None = None) -> HubFacade:
    """The hub at `url` (see `Hub.open` and `hub.remote.address`), made where a local one is not there yet.

    None means the environment's LORAPLEX_HUB, else this user's data directory. Raises HubUnavailable.
    """
    return _remote(url) or Hub.open(url)


def open_existing(url: str | None = None) -> HubFacade:
    """The hub at `url`, which is there; raises HubNotFound where there is none, HubUnavailable."""
    return _remote(url) or Hub.open_existing(url)


def open_own(url: str | None, say: Callable[[str], None]) -> Hub:
    """The hub at `url`, behind no server, made where there is none: `say` is told, as a mistyped URL makes one too."""
    try:
        Hub.open_existing(url).close()
    except HubNotFound:
        made = Hub.open(url)
        say(f"made a new hub at {Place.parse(url).shown}")
        return made
    return Hub.open(url)


def _remote(url: str | None) -> HubFacade | None:
    text = named(url)
    if not text.startswith(("grpc://", "grpcs://")):
        return None
    from hub.remote.remote_hub import RemoteHub  # grpc takes a while to import, and only this kind needs it

    return RemoteHub.open(text)
