"""Where a shared hub is, from a URL.

grpc://host[:port]                 unencrypted; a token is sent to this machine alone, unless ?plaintext-token=yes
grpcs://host[:port][?ca=FILE]      TLS; FILE (or LORAPLEX_HUB_CA): the authorities to trust, PEM
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import parse_qsl, urlsplit

from hub.errors import HubUnavailable

SCHEMES: Final = ("grpc", "grpcs")
DEFAULT_PORT: Final = 50052
CA_ENVIRONMENT: Final = "LORAPLEX_HUB_CA"


@dataclass(frozen=True)
class Address:
    """A shared hub's place."""

    host: str
    port: int
    tls: bool
    ca: Path | None = None  # None: the authorities gRPC trusts by itself
    plaintext_token: bool = False  # send a token unencrypted to another machine

    @classmethod
    def parse(cls, url: str) -> Self:
        """The place that `url` names; raises HubUnavailable."""
        try:
            parts = urlsplit(url)
            options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
            port = parts.port or DEFAULT_PORT
        except ValueError as error:
            raise HubUnavailable("the hub's URL cannot be read: write grpc://host:port or grpcs://host:port") from error
        known = {"ca"} if parts.scheme == "grpcs" else {"plaintext-token"}
        if parts.scheme not in SCHEMES or not parts.hostname or parts.path.strip("/") or parts.username is not None:
            raise HubUnavailable("a shared hub is grpc://host:port or grpcs://host:port, without path or user")
        if strange := sorted(options.keys() - known):
            raise HubUnavailable(f"{parts.scheme}:// has no option {strange[0][:40]!a}; it has {', '.join(known)}")
        if options.get("plaintext-token", "yes") != "yes":
            raise HubUnavailable("plaintext-token is yes or left out")
        ca = options.get("ca") or os.environ.get(CA_ENVIRONMENT)
        tls = parts.scheme == "grpcs"
        return cls(
            parts.hostname, port, tls, Path(ca).expanduser() if ca and tls else None, "plaintext-token" in options
        )

    @property
    def authority(self) -> str:
        """Host and port: "hub.example.org:50052"."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def private(self) -> bool:
        """Whether what is sent can be read by nobody in between: TLS, or it stays on this machine."""
        if self.tls or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"{'grpcs' if self.tls else 'grpc'}://{self.authority}"


def is_remote(url: str) -> bool:
    """Whether this is a shared hub's URL."""
    return url.partition("://")[0] in SCHEMES and "://" in url
