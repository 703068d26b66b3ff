"""Removal, leases, weighted aliases, an audit with who and from what, and columns to search by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
# Events of before go to the journal a thousand a file.
_LEGACY_BATCH = 1000
_METRIC = re.compile(r"[A-Za-z0-9_.:/@-]{1,128}", re.ASCII)


def upgrade() -> None:
    """Make the new tables, and fill them from what the old ones and the manifests say."""
    name = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.add_column("versions", sa.Column("removed", sa.Text))
    op.add_column("versions", sa.Column("base_name", sa.Text))
    op.add_column("versions", sa.Column("base_fingerprint", sa.Text))
    of_version = ["full_name", "number"], ["versions.full_name", "versions.number"]
    op.create_table(
        "files",
        sa.Column("full_name", name, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.ForeignKeyConstraint(*of_version),
    )
    op.create_index("files_by_sha256", "files", ["sha256"])
    op.create_table(
        "metrics",
        sa.Column("full_name", name, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(*of_version),
    )
    op.create_index("metrics_by_value", "metrics", ["name", "value"])
    op.create_index("versions_by_base", "versions", ["base_name", "full_name", "number"])
    op.create_table(
        "purged",
        sa.Column("full_name", name, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("time", sa.Text, nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("full_name", name, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("holder", sa.Text, primary_key=True),
        sa.Column("expires", sa.Double),
        sa.ForeignKeyConstraint(*of_version),
    )
    _split_aliases(name, of_version)
    _widen_events(name)
    _index_manifests()


def _split_aliases(name: Any, of_version: Any) -> None:
    op.rename_table("aliases", "aliases_0001")
    op.create_table(
        "aliases",
        sa.Column("full_name", name, primary_key=True),
        sa.Column("alias", name, primary_key=True),
        sa.Column("generation", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "targets",
        sa.Column("full_name", name, primary_key=True),
        sa.Column("alias", name, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("weight", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["full_name", "alias"], ["aliases.full_name", "aliases.alias"]),
        sa.ForeignKeyConstraint(*of_version),
    )
    op.create_index("targets_by_version", "targets", ["full_name", "number"])
    op.create_index("targets_by_alias", "targets", ["alias", "full_name", "number"])
    op.execute("INSERT INTO aliases SELECT full_name, alias, generation FROM aliases_0001")
    op.execute("INSERT INTO targets SELECT full_name, alias, number, 1 FROM aliases_0001")
    op.drop_table("aliases_0001")


def _widen_events(name: Any) -> None:
    op.rename_table("events", "events_0001")
    op.create_table(
        "events",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("batch", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("full_name", name, nullable=False),
        sa.Column("alias", name),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("time", sa.Text, nullable=False),
        sa.Column("actor", sa.Text),
        sa.Column("before", sa.Text),
        sa.Column("after", sa.Text),
        sa.Column("note", sa.Text),
    )
    op.execute(
        "INSERT INTO events (seq, batch, kind, full_name, alias, number, digest, time, after) "
        f"SELECT seq, ((seq - 1) / {_LEGACY_BATCH}) * {_LEGACY_BATCH} + 1, kind, full_name, alias, number, digest, "
        "time, CASE kind WHEN 'tag' THEN '[[' || number || ',1]]' END FROM events_0001"
    )
    op.drop_table("events_0001")
    op.create_index("events_by_alias", "events", ["full_name", "alias", "seq"])
    op.create_index("events_by_batch", "events", ["batch"])


def _index_manifests() -> None:
    connection = op.get_bind()
    rows = connection.execute(sa.text("SELECT full_name, number, manifest FROM versions")).all()
    for row in rows:
        try:
            manifest = json.loads(row.manifest)
            files = {str(name): str(entry["sha256"]) for name, entry in manifest["files"].items()}
            metrics = dict(_numbers(manifest["metrics"], ""))
            base = manifest["base"]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a damaged copy: `hub verify` tells of it, `hub fsck --rebuild` mends it
        key = {"full_name": row.full_name, "number": row.number}
        connection.execute(
            sa.text(
                "UPDATE versions SET base_name = :base_name, base_fingerprint = :base_fingerprint "
                "WHERE full_name = :full_name AND number = :number"
            ),
            {**key, "base_name": _line(base.get("name")), "base_fingerprint": _line(base.get("fingerprint"))},
        )
        for name, sha256 in files.items():
            connection.execute(
                sa.text("INSERT INTO files VALUES (:full_name, :number, :name, :sha256)"),
                {**key, "name": name, "sha256": sha256},
            )
        for name, value in metrics.items():
            connection.execute(
                sa.text("INSERT INTO metrics VALUES (:full_name, :number, :name, :value)"),
                {**key, "name": name, "value": value},
            )


def _line(text: Any) -> str | None:
    return text if isinstance(text, str) and text.isprintable() else None


def _numbers(value: Any, prefix: str) -> Iterator[tuple[str, float]]:
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            yield from _numbers(item, f"{name}.")
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and _METRIC.fullmatch(name):
            yield name, float(item)
