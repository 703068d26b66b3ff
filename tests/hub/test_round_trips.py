"""How often the catalog waits for PostgreSQL, counted on the wire, and what it does when PostgreSQL was restarted."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hub.errors import AdapterNotFound, AliasNotFound, HubUnavailable, VersionNotFound
from hub.hub import Hub
from hub.refs import AdapterRef
from hub.registry.grants import Grant
from hub.registry.tokens import TokenStore
from hub.search import MetricTest, Query
from hub.transactions import asked, read, writing
from tests.hub import postgres
from tests.hub.making import lora_tensors, write_adapter

WARM = 8  # psycopg prepares a statement when it comes the sixth time, which is a round trip once


class Wire:
    """A TCP proxy that counts round trips: how often the client spoke after it was answered."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._trips = 0
        self._open: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def trips(self, work: Callable[[], object]) -> int:
        """The round trips of one `work` among others like it."""
        for _ in range(WARM):
            work()
        before = self._trips
        work()
        return self._trips - before

    def close(self) -> None:
        for end in [self._listener, *self._open]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open += [client, server]
                answered = threading.Event()
                answered.set()
                for source, sink, asks in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._carry, args=(source, sink, asks, answered), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, asks: bool, answered: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    self._trips += asks and answered.is_set()
                (answered.clear if asks else answered.set)()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def wire(postgres_database: str) -> Iterator[Wire]:
    port = sa.make_url(postgres_database).port
    assert port is not None
    opened = Wire(port)
    yield opened
    opened.close()


@pytest.fixture
def hub(postgres_database: str, wire: Wire, tmp_path: Path) -> Iterator[Hub]:
    """A hub whose every word to its database goes over the wire; three versions and two aliases."""
    url = sa.make_url(postgres_database).set(port=wire.port).render_as_string()
    with Hub.open(f"{url}?blobs={tmp_path / 'hub'}") as opened:
        for seed in range(3):
            opened.push(write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)), "team/x")
        opened.split([("team/x@1", 9), ("team/x@2", 1)], "prod")
        yield opened


def reads(hub: Hub) -> dict[str, Callable[[], object]]:
    digest = hub.resolve("team/x@3").digest
    return {
        "an alias": lambda: hub.resolve("team/x"),
        "a split alias, by key": lambda: hub.resolve("team/x:prod", "me"),
        "a number": lambda: hub.resolve("team/x@2"),
        "a digest": lambda: hub.get(digest),
        "a name with a digest": lambda: hub.resolve(f"team/x@{digest}"),
        "with the newest event": lambda: hub.entries.resolve_at(AdapterRef.parse("team/x")),
        "a page": lambda: hub.search(Query(newest=True, limit=2)),
        "a page by pattern": lambda: hub.search(Query("*/x", limit=2)),
        "all aliases": lambda: hub.aliases("team/x"),
        "events": lambda: hub.events(2),
        "the newest event": lambda: hub.last_seq(),
        "leases": lambda: hub.leases("team/x"),
    }


def test_a_read_is_one_round_trip(hub: Hub, wire: Wire) -> None:
    found = {what: wire.trips(ask) for what, ask in reads(hub).items()}
    assert found == dict.fromkeys(found, 1)


def test_each_metric_of_a_search_is_one_round_trip_more(hub: Hub, wire: Wire) -> None:
    tests = (MetricTest("f1", ">", 0.5), MetricTest("loss", "<", 1.0))
    assert wire.trips(lambda: hub.search(Query(metrics=tests))) == 3


def test_a_token_is_one_round_trip(hub: Hub, wire: Wire) -> None:
    tokens = TokenStore(hub.database)
    text = tokens.create("ada", [Grant.parse("team:read")])[1]
    assert wire.trips(lambda: tokens.authenticate(text)) == 1


def test_several_statements_share_one_transaction(hub: Hub, wire: Wire) -> None:
    """What the wire counts is also where it is more than one: BEGIN, three statements, COMMIT."""

    def three(connection: sa.Connection) -> None:
        for _ in range(3):
            connection.execute(sa.text("SELECT 1"))

    assert wire.trips(lambda: read(hub.database, three)) == 5


def test_what_is_not_there_is_told_from_one_moment(hub: Hub) -> None:
    with pytest.raises(AdapterNotFound):
        hub.resolve("team/y")
    with pytest.raises(AliasNotFound):
        hub.resolve("team/x:stable")
    with pytest.raises(VersionNotFound, match="has no version 9"):
        hub.resolve("team/x@9")
    with pytest.raises(AdapterNotFound):
        hub.aliases("team/y")


def test_a_question_cannot_write(hub: Hub) -> None:
    with pytest.raises(sa.exc.DBAPIError, match="read-only"):
        asked(hub.database, lambda connection: connection.execute(sa.text("DELETE FROM aliases")))
    assert set(hub.aliases("team/x")) == {"latest", "prod"}


def test_a_page_of_many_statements_is_read_at_one_moment(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.catalog_search._BATCH", 1)
    alone: list[bool] = []

    def note(connection: sa.Connection, *rest: object) -> None:
        driver: Any = connection.connection.driver_connection
        alone.append(driver.autocommit)

    sa.event.listen(hub.database, "before_cursor_execute", note)
    assert [version.number for version in hub.search(Query("team/x", limit=2)).versions] == [1, 2]
    assert alone == [True, False, False, False]


@contextmanager
def own_server(tmp_path: Path) -> Iterator[tuple[Hub, Callable[[], AbstractContextManager[None]]]]:
    """A hub over a PostgreSQL of its own, and what stops and starts that."""
    found = postgres.binaries()
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with postgres.server(found) as url, Hub.open(f"{url}?blobs={tmp_path / 'hub'}") as hub:
        hub.push(write_adapter(tmp_path / "a", tensors=lora_tensors(seed=1)), "x")
        yield hub, lambda: postgres.stopped(found, url)


def fill_pool(hub: Hub, count: int = 3) -> None:
    """Have so many connections in the pool."""
    together = threading.Barrier(count)

    def question(connection: sa.Connection) -> None:
        connection.execute(sa.text("SELECT 1"))
        together.wait(20)

    threads = [threading.Thread(target=asked, args=(hub.database, question)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_restart_of_the_database_is_not_noticed(tmp_path: Path) -> None:
    with own_server(tmp_path) as (hub, stopped):
        tokens = TokenStore(hub.database)
        text = tokens.create("ada", [Grant.parse("*:read")])[1]
        works: list[Callable[[], object]] = [
            lambda: hub.resolve("x"),
            lambda: hub.entries.check(),
            lambda: hub.tag("x@1", "prod"),
            lambda: tokens.authenticate(text),
            lambda: tokens.create("bob", [Grant.parse("*:read")]),
            lambda: hub.push(write_adapter(tmp_path / "b", tensors=lora_tensors(seed=2)), "x"),
        ]
        for work in works:
            fill_pool(hub)
            with stopped():
                pass
            work()
        assert [event.kind for event in hub.events()] == ["push", "tag", "tag", "push", "tag"]
        assert hub.fsck() == []


def test_a_database_that_is_away_is_said_to_be_and_reached_when_it_is_back(tmp_path: Path) -> None:
    with own_server(tmp_path) as (hub, stopped):
        with stopped():
            with pytest.raises(HubUnavailable):
                hub.resolve("x")
            with pytest.raises(HubUnavailable):
                hub.tag("x@1", "prod")
        assert hub.resolve("x").number == 1
        assert hub.tag("x@1", "prod").number == 1


def test_a_write_that_is_cut_after_its_beginning_is_not_done_twice(tmp_path: Path) -> None:
    with own_server(tmp_path) as (hub, stopped):
        begun = 0
        with pytest.raises(sa.exc.DBAPIError), writing(hub.database) as connection:
            begun += 1
            with stopped():
                pass
            connection.execute(sa.text("DELETE FROM targets"))
        assert begun == 1
        assert hub.resolve("x").number == 1
