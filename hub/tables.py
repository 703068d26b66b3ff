"""The catalog's tables, in SQLAlchemy Core and nothing of one database's own. docs/FORMAT.md describes them."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()
adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("full_name", sa.Text, primary_key=True),
    sa.Column("next_number", sa.Integer, nullable=False),  # never goes back, so a number never means two things
)
versions = sa.Table(
    "versions",
    metadata,
    sa.Column("full_name", sa.Text, sa.ForeignKey("adapters.full_name"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False, unique=True),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),  # canonical JSON; a copy of the blob `digest`
    sa.UniqueConstraint("full_name", "content"),
)
aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("full_name", sa.Text, primary_key=True),
    sa.Column("alias", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),  # seq of the event that moved it here
    sa.ForeignKeyConstraint(["full_name", "number"], ["versions.full_name", "versions.number"]),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("full_name", sa.Text, nullable=False),
    sa.Column("alias", sa.Text),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("time", sa.Text, nullable=False),
)
