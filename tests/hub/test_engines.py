"""What the two catalog engines have of their own: migration, read-only directories, missing hubs, URLs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from hub import location, postgres, schema, sqlite, tables
from hub.errors import HubNotFound, HubReadOnly, HubUnavailable
from hub.facts import Facts
from hub.hub import Hub
from hub.search import MetricTest, Query
from hub.transactions import writing
from tests.hub import first_release
from tests.hub.conftest import MakeUrl
from tests.hub.making import lora_tensors, write_adapter


def adapter(tmp_path: Path, seed: int, f1: float | None = None) -> Path:
    directory = write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))
    if f1 is not None:
        Facts(metrics={"test": {"f1": f1}, "note": "x"}).write(directory)
    return directory


def old_hub(tmp_path: Path) -> Path:
    """A hub as the first release left it: two versions, three aliases, six events."""
    root = tmp_path / "old"
    with Hub.open(str(root)) as hub:
        hub.push(adapter(tmp_path, 1, f1=0.5), "team/x:prod")
        hub.push(adapter(tmp_path, 2, f1=0.9), "team/x")
        hub.tag("team/x@1", "stable")
        hub.untag("team/x", "stable")
    first_release.write_back(root)
    return root


def test_a_hub_of_the_first_release_opens_and_is_migrated(tmp_path: Path) -> None:
    root = old_hub(tmp_path)
    with Hub.open(str(root)) as hub:
        assert {alias: state.version for alias, state in hub.aliases("team/x").items()} == {"latest": 2, "prod": 1}
        assert [event.kind for event in hub.events()] == ["push", "tag", "tag", "push", "tag", "tag", "untag"]
        assert hub.fsck() == []
        assert hub.verify() == []
        found = hub.search(Query(metrics=(MetricTest.parse("test.f1 > 0.8"),), base="tiny-base"))
        assert [version.text for version in found.versions] == ["team/x@2"]
        assert hub.push(adapter(tmp_path, 3), "team/x").version.number == 3
        hub.rollback("team/x", "latest")
        assert hub.resolve("team/x").number == 2
        assert hub.fsck() == []
    assert (root / "FORMAT").read_text() == "loraplex hub 2\n"
    assert sorted(path.name for path in (root / "journal").rglob("*.json")) == [
        "000000000001.json", "000000000008.json", "000000000010.json",
    ]  # fmt: skip


def test_many_processes_may_migrate_one_hub_at_once(tmp_path: Path) -> None:
    root = old_hub(tmp_path)
    program = "import sys; from hub.hub import Hub; h = Hub.open(sys.argv[1]); print(len(h.events())); h.close()"
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=50)[0] for process in running] == ["7\n"] * 3
    with Hub.open(str(root)) as hub:
        assert hub.fsck() == []


def test_a_hub_of_the_first_release_can_be_read_where_it_cannot_be_written(tmp_path: Path) -> None:
    root = old_hub(tmp_path)
    assert unprivileged(root, "h.resolve('team/x:prod').text") == "team/x@1"
    assert (root / "FORMAT").read_text() == "loraplex hub 1\n"


def metadata_differences(engine: sa.Engine) -> list[Any]:
    with engine.connect() as connection:
        # Made by hand, and no table of the model's.
        options = {"include_name": lambda name, kind, parents: name != "alembic_version", "compare_type": True}
        found = compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata)
    engine.dispose()
    return found


@pytest.mark.parametrize("engine_name", ["sqlite", "postgresql"])
def test_the_migrations_lead_to_the_tables_of_today(
    tmp_path: Path, engine_name: str, request: pytest.FixtureRequest
) -> None:
    if engine_name == "sqlite":
        Hub.open(str(tmp_path / "hub")).close()
        engine = sqlite.open_engine(tmp_path / "hub" / "catalog.sqlite")
    else:
        engine = postgres.open_engine(sa.make_url(request.getfixturevalue("postgres_database")))
    with writing(engine) as connection:
        tables.metadata.drop_all(connection)
        connection.execute(sa.text("DROP TABLE IF EXISTS alembic_version"))
        for statement in first_release.TABLES.split(";"):
            if statement.strip():
                connection.execute(sa.text(statement))
        assert schema.bring_up(connection)
        assert not schema.bring_up(connection)
    assert metadata_differences(engine) == []


@pytest.mark.parametrize("engine_name", ["sqlite", "postgresql"])
def test_a_catalog_of_a_newer_release_is_not_touched(
    tmp_path: Path, engine_name: str, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "hub")
    if engine_name == "postgresql":
        url = f"{request.getfixturevalue('postgres_database')}?blobs={tmp_path / 'hub'}"
    with (
        Hub.open(url) as hub,
        writing(hub.database) as connection,
    ):
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(HubUnavailable, match="revision 9999"):
        Hub.open(url)


def test_reading_a_missing_hub_makes_none(tmp_path: Path) -> None:
    with pytest.raises(HubNotFound, match=r"hub push") as caught:
        Hub.open_existing(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert not (tmp_path / "nowhere").exists()


def unprivileged(root: Path, expression: str, opened: str = "open_existing") -> str:
    """What an expression over a hub `h`, opened by a process that cannot write `root`, comes to; or its error."""
    program = (
        "import sys\nfrom hub.errors import HubError\nfrom hub.hub import Hub\n"
        f"try:\n    with Hub.{opened}(sys.argv[1]) as h: print(eval(sys.argv[2]))\n"
        "except HubError as error: print(error.reason)\n"
    )
    command = [sys.executable, "-c", program, str(root), expression]
    if os.geteuid() == 0:
        # Root without its right to pass over permissions.
        caps = "-dac_override,-dac_read_search"
        command = ["setpriv", "--inh-caps", "-all", "--bounding-set", caps, "--", *command]
    directories = [root, *(path for path in root.rglob("*") if path.is_dir())]
    try:
        for path in directories:
            path.chmod(0o555)
        for path in root.glob("catalog.sqlite*"):
            path.chmod(0o444)
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    finally:
        for path in directories:
            path.chmod(0o755)
        for path in root.glob("catalog.sqlite*"):
            path.chmod(0o644)
    return done.stdout.removesuffix("\n")


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="setpriv is not installed")
def test_a_directory_that_cannot_be_written_is_open_for_reading(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    with Hub.open(str(root)) as hub:
        hub.push(adapter(tmp_path, 1), "x")
    assert unprivileged(root, "h.resolve('x').text, len(h.read_file(h.resolve('x'), 'adapter_config.json')) > 2") == (
        "('x@1', True)"
    )
    assert unprivileged(root, "h.verify() + h.fsck()") == "[]"
    assert unprivileged(root, "h.tag('x@1', 'prod')") == HubReadOnly.reason
    for opened in ("open_existing", "open"):  # `hub push` would make a hub
        assert unprivileged(root, f"h.push({str(tmp_path / 'adapter-1')!r}, 'y')", opened) == HubReadOnly.reason


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="setpriv is not installed")
def test_a_reader_that_cannot_write_sees_what_a_living_writer_wrote(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    with Hub.open(str(root)) as hub:  # its log and shared memory stay while it is open
        hub.push(adapter(tmp_path, 1), "x")
        assert unprivileged(root, "h.resolve('x').text") == "x@1"


def test_concurrent_first_openings_make_one_hub(make_url: MakeUrl, tmp_path: Path) -> None:
    url, opened, failed = make_url(), list[Hub](), list[Exception]()

    def open_() -> None:
        try:
            opened.append(Hub.open(url))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=open_) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    opened[0].push(adapter(tmp_path, 1), "x")
    assert opened[-1].resolve("x").number == 1
    for hub in opened:
        hub.close()


def test_a_hub_on_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    for _ in range(2):
        with Hub.open(str(tmp_path / "hub")) as hub:
            assert hub.push(write_adapter(tmp_path / "a"), "x").version.number == 1
            assert hub.fsck() == hub.verify() == []


@pytest.mark.files_of_the_hub
def test_a_catalog_beside_an_older_journal_is_not_made_anew_unasked(make_url: MakeUrl, tmp_path: Path) -> None:
    """Else a hub opened by the wrong URL, or whose catalog is lost, would start again at @1."""
    with Hub.open(make_url()) as hub:
        hub.push(adapter(tmp_path, 1), "x")
    if "://" in make_url():
        with pytest.raises(HubUnavailable, match="journal and no catalog"):
            Hub.open(str(tmp_path / "hub"))  # its catalog is in PostgreSQL
    else:
        (tmp_path / "hub" / "catalog.sqlite").unlink()
        with pytest.raises(HubUnavailable, match="fsck --rebuild"):
            Hub.open(make_url())


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:secret@127.0.0.1:1/hub?blobs=/tmp/nowhere-at-all",
        "postgresql://ada:secret@127.0.0.1:1/hub",
        "postgresql://ada:secret@127.0.0.1:port/hub?blobs=/tmp/x",
    ],
)
def test_errors_about_a_database_never_show_its_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubUnavailable) as caught:
        Hub.open(url.replace("/tmp/nowhere-at-all", str(tmp_path / "b")))
    assert "secret" not in str(caught.value)
    with pytest.raises(HubUnavailable) as caught:
        Hub.open_existing(url)
    assert "secret" not in str(caught.value)


def test_the_audit_says_who_when_and_from_what_to_what(hub: Hub, tmp_path: Path) -> None:
    ada = hub.acting_as("ada")
    ada.push(adapter(tmp_path, 1), "x")
    hub.acting_as("bob").push(adapter(tmp_path, 2), "x")
    told = [(event.actor, event.kind, event.before, event.after) for event in hub.events()]
    assert told == [
        ("ada", "push", None, None),
        ("ada", "tag", None, ((1, 1),)),
        ("bob", "push", None, None),
        ("bob", "tag", ((1, 1),), ((2, 1),)),
    ]
    assert json.loads(json.dumps(told))


def test_a_database_server_that_drops_its_connections_is_reached_again(postgres_database: str, tmp_path: Path) -> None:
    with Hub.open(f"{postgres_database}?blobs={tmp_path / 'hub'}") as hub:
        hub.push(adapter(tmp_path, 1), "x")
        drop = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        other = postgres.open_engine(sa.make_url(postgres_database))
        with other.connect() as connection:
            connection.exec_driver_sql(f"{drop} AND datname = current_database()")
        other.dispose()
        assert hub.resolve("x").number == 1
        assert hub.push(adapter(tmp_path, 2), "x").version.number == 2


def test_a_connection_lost_in_the_middle_of_a_push_enters_nothing(postgres_database: str, tmp_path: Path) -> None:
    url = f"{postgres_database}?blobs={tmp_path / 'hub'}"
    drop = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    with Hub.open(url) as hub:
        hub.push(adapter(tmp_path, 1), "x")

        def cut(name: str) -> None:
            if name == "catalog:alias":
                with other.connect() as connection:
                    connection.exec_driver_sql(f"{drop} AND datname = current_database()")

        other = postgres.open_engine(sa.make_url(postgres_database))
        cutting = Hub(*location.make(location.Place.parse(url), step=cut))
        with cutting, pytest.raises(HubUnavailable):
            cutting.push(adapter(tmp_path, 2), "x")
        other.dispose()
        assert [version.number for version in hub.versions()] == [1]
        assert hub.push(adapter(tmp_path, 2), "x").version.number == 2
        assert hub.fsck() == []
