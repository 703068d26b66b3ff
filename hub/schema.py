"""Brings a catalog's tables to this release's revision: made where there are none, migrated where they are older."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import sqlalchemy as sa

from hub import tables
from hub.errors import HubTooNew

HEAD: Final = "0002"
_FIRST: Final = "0001"  # what hubs without a recorded revision have
_REVISION = sa.table("alembic_version", sa.column("version_num", sa.String))


def revision(connection: sa.Connection) -> str | None:
    """The catalog's revision; None where there are no tables."""
    found = sa.inspect(connection)
    if found.has_table("alembic_version"):
        return connection.execute(sa.select(_REVISION.c.version_num)).scalar()
    return _FIRST if found.has_table("versions") else None


def bring_up(connection: sa.Connection) -> bool:
    """Make or migrate the tables, inside the caller's writing transaction; whether there was anything to do.

    Raises HubTooNew where a newer release made them.
    """
    found = revision(connection)
    if found == HEAD:
        return False
    if found is None:
        tables.metadata.create_all(connection)
        _stamp(connection, HEAD)
        return True
    if found > HEAD:
        raise HubTooNew(f"the hub's catalog has revision {found}, this release knows up to {HEAD}: use a newer one")
    if not sa.inspect(connection).has_table("alembic_version"):
        _stamp(connection, found)
    _upgrade(connection)
    return True


def _stamp(connection: sa.Connection, to: str) -> None:
    connection.execute(
        sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, PRIMARY KEY (version_num))")
    )
    connection.execute(sa.insert(_REVISION).values(version_num=to))


def _upgrade(connection: sa.Connection) -> None:
    # Imported here: only a hub of an older release needs it.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, HEAD)
