"""Turns a SQLite hub of today into what the first release would have written: its tables, its FORMAT, no journal."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

# As SQLite showed it for a hub of that release.
TABLES = """
CREATE TABLE adapters (full_name TEXT NOT NULL, next_number INTEGER NOT NULL, PRIMARY KEY (full_name));
CREATE TABLE events (
    seq INTEGER NOT NULL, kind TEXT NOT NULL, full_name TEXT NOT NULL, alias TEXT, number INTEGER NOT NULL,
    digest TEXT NOT NULL, time TEXT NOT NULL, PRIMARY KEY (seq));
CREATE TABLE versions (
    full_name TEXT NOT NULL, number INTEGER NOT NULL, digest TEXT NOT NULL, content TEXT NOT NULL,
    manifest TEXT NOT NULL, PRIMARY KEY (full_name, number), UNIQUE (full_name, content),
    FOREIGN KEY(full_name) REFERENCES adapters (full_name), UNIQUE (digest));
CREATE TABLE aliases (
    full_name TEXT NOT NULL, alias TEXT NOT NULL, number INTEGER NOT NULL, generation INTEGER NOT NULL,
    PRIMARY KEY (full_name, alias), FOREIGN KEY(full_name, number) REFERENCES versions (full_name, number));
"""


def write_back(root: Path) -> None:
    """Make the closed hub at `root` one of the first release."""
    new = root / "catalog.sqlite"
    old = root / "old.sqlite"
    with closing(sqlite3.connect(old)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(TABLES)
        connection.execute("ATTACH ? AS new", (str(new),))
        connection.executescript(
            """
            INSERT INTO adapters SELECT full_name, next_number FROM new.adapters;
            INSERT INTO versions SELECT full_name, number, digest, content, manifest FROM new.versions;
            INSERT INTO events SELECT seq, kind, full_name, alias, number, digest, time FROM new.events;
            INSERT INTO aliases SELECT full_name, alias, number, generation
                FROM new.aliases JOIN new.targets USING (full_name, alias);
            """
        )
    for suffix in ("", "-wal", "-shm"):
        new.with_name(new.name + suffix).unlink(missing_ok=True)
    old.rename(new)
    (root / "FORMAT").write_text("loraplex hub 1\n")
    shutil.rmtree(root / "journal")
