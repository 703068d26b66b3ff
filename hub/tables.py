"""The catalog's tables, in SQLAlchemy Core and nothing of one database's own. docs/FORMAT.md describes them.

A change here needs a migration under hub/migrations; a test compares the two.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()
# Names sort by code point everywhere, whatever the database server's language.
_NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("full_name", _NAME, primary_key=True),
    sa.Column("next_number", sa.Integer, nullable=False),  # never goes back, so a number never means two things
)
versions = sa.Table(
    "versions",
    metadata,
    sa.Column("full_name", _NAME, sa.ForeignKey("adapters.full_name"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False, unique=True),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),  # canonical JSON; a copy of the blob `digest`
    sa.Column("removed", sa.Text),  # when it was marked as removed; null: it is there
    sa.Column("base_name", sa.Text),  # from the manifest, to search by
    sa.Column("base_fingerprint", sa.Text),
    sa.UniqueConstraint("full_name", "content"),
    sa.Index("versions_by_base", "base_name", "full_name", "number"),
)
# Which blobs a version needs: what the sweep may not take.
files = sa.Table(
    "files",
    metadata,
    sa.Column("full_name", _NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.ForeignKeyConstraint(["full_name", "number"], ["versions.full_name", "versions.number"]),
    sa.Index("files_by_sha256", "sha256"),
)
# Numbers among the manifest's metrics, to search by: nested keys joined with dots.
metrics = sa.Table(
    "metrics",
    metadata,
    sa.Column("full_name", _NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Double, nullable=False),
    sa.ForeignKeyConstraint(["full_name", "number"], ["versions.full_name", "versions.number"]),
    sa.Index("metrics_by_value", "name", "value"),
)
# Versions whose bytes were given back for good.
purged = sa.Table(
    "purged",
    metadata,
    sa.Column("full_name", _NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("time", sa.Text, nullable=False),
)
aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("full_name", _NAME, primary_key=True),
    sa.Column("alias", _NAME, primary_key=True),
    sa.Column("generation", sa.BigInteger, nullable=False),  # seq of the event that moved it here
)
# What an alias holds: one version, or several with weights.
targets = sa.Table(
    "targets",
    metadata,
    sa.Column("full_name", _NAME, primary_key=True),
    sa.Column("alias", _NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("weight", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["full_name", "alias"], ["aliases.full_name", "aliases.alias"]),
    sa.ForeignKeyConstraint(["full_name", "number"], ["versions.full_name", "versions.number"]),
    sa.Index("targets_by_version", "full_name", "number"),
    sa.Index("targets_by_alias", "alias", "full_name", "number"),
)
# Who keeps a version from being removed.
leases = sa.Table(
    "leases",
    metadata,
    sa.Column("full_name", _NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("holder", sa.Text, primary_key=True),
    sa.Column("expires", sa.Double),  # Unix time; null: a pin, until it is taken back
    sa.ForeignKeyConstraint(["full_name", "number"], ["versions.full_name", "versions.number"]),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("batch", sa.BigInteger, nullable=False),  # seq of the first event written with it
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("full_name", _NAME, nullable=False),
    sa.Column("alias", _NAME),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("time", sa.Text, nullable=False),
    sa.Column("actor", sa.Text),
    sa.Column("before", sa.Text),  # what the alias held: JSON [[number, weight], …]
    sa.Column("after", sa.Text),  # what it holds now, likewise
    sa.Column("note", sa.Text),
    sa.Index("events_by_alias", "full_name", "alias", "seq"),
    sa.Index("events_by_batch", "batch"),
)
