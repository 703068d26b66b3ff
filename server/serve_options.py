"""What single options of `hub serve` may say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from hub.errors import RefInvalid
from hub.refs import Alias


class Device(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic only in new releases
    """cpu, cuda or cuda:N."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The device as it is; fails with wrong usage."""
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", str(value), re.ASCII):
            self.fail(f"{value!r} is no device: write cpu, cuda or cuda:1", param, ctx)
        return str(value)


class MetadataKey(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """The name of a text entry in gRPC's metadata."""

    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The key as it is; fails with wrong usage."""
        key = str(value)
        if not re.fullmatch(r"[0-9a-z_.-]{1,64}", key, re.ASCII) or key.endswith("-bin") or key.startswith("grpc-"):
            self.fail(f"{value!r} is no metadata key: write lower-case letters, digits and _ . -", param, ctx)
        return key


class NamedRouter(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """NAME=DIR."""

    name = "router"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        """The name and its directory; fails with wrong usage."""
        if isinstance(value, tuple):
            return value
        name, equals, directory = str(value).partition("=")
        try:
            Alias.parse(name)
        except RefInvalid:
            equals = ""
        if not (equals and directory):
            self.fail(f"{value!r} is no router: write NAME=DIR, the name in lower-case [a-z0-9._-]", param, ctx)
        return name, Path(directory)
