"""Where a server is to listen, as an option: host:port."""

from __future__ import annotations

import re
from typing import Any

import click

_ADDRESS = re.compile(r"(?:\[[^\[\]]+\]|[^\[\]:]+):([0-9]{1,5})", re.ASCII)


class ListenAddress(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic only in new releases
    """host:port, or [host]:port for IPv6; port 0 is any free one."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The address as it is; fails with wrong usage."""
        found = _ADDRESS.fullmatch(str(value))
        if found is None or int(found[1]) > 65535:
            self.fail(
                f"{str(value)!r} is no address: write host:port with a port up to 65535, such as 127.0.0.1:50051 or "
                "[::1]:50051",
                param,
                ctx,
            )
        return str(value)
