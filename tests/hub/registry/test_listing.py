"""`hub list` and `hub search` of a shared hub: what a directory's hub answers, in several pages of the wire."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hub.cli import group
from hub.hub import Hub
from hub.registry.grants import Grant
from hub.registry.server import RegistryServer
from hub.registry.tokens import TokenStore
from hub.search import Query
from tests.hub.making import lora_tensors, write_adapter
from tests.hub.registry.conftest import ConnectAs

Printed = Callable[..., tuple[str, str]]


@pytest.fixture
def printed(
    server: RegistryServer, store: Hub, tokens: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Printed:
    """What a verb prints, its stdout and stderr: the same of the shared hub as of the directory behind it.

    Five adapters with two versions each; two versions go through the wire at a time.
    """
    for seed in range(2):
        source = write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed))
        for name in ("alone", "team/a", "team/b", "team/c", "zoo/z"):
            store.push(source, name, aliases=["prod"] if name == "team/a" else [])
    monkeypatch.setattr("hub.remote.messages.MAX_PAGE", 2)
    monkeypatch.setenv("LORAPLEX_HUB_TOKEN", tokens.create("ada", [Grant.parse("*:read")])[1])

    def run(*arguments: str) -> tuple[str, str]:
        found = [
            CliRunner().invoke(group, [*arguments, "--hub", url], catch_exceptions=False)
            for url in (f"grpc://{server.address}", str(tmp_path / "hub"))
        ]
        assert [each.exit_code for each in found] == [0, 0]
        shared, local = [(each.stdout, each.stderr) for each in found]
        assert shared == local
        return shared

    return run


def texts(out: str) -> list[Any]:
    return [found["version"] for found in json.loads(out)]


def test_a_list_of_a_shared_hub_is_that_of_the_hub_behind_it(printed: Printed) -> None:
    assert printed("list")[0].count("@2") == 5
    out, _ = printed("list", "--all")
    assert out.count("@1") == out.count("@2") == 5
    assert "latest prod" in out
    assert texts(printed("list", "team/*", "--json")[0]) == ["team/a@2", "team/b@2", "team/c@2"]
    assert printed("list", "nobody/*") == ("nothing matches\n", "")


def test_a_limit_of_more_than_a_page_of_the_wire_is_kept(printed: Printed) -> None:
    out, err = printed("search", "team/*", "--limit", "5", "--json")
    assert texts(out) == ["team/a@1", "team/a@2", "team/b@1", "team/b@2", "team/c@1"]
    assert err == "there are more: --after team/c@1\n"
    out, err = printed("search", "team/*", "--limit", "5", "--after", "team/c@1", "--json")
    assert (texts(out), err) == (["team/c@2"], "")
    assert printed("search", "team/*", "--limit", "6", "--json")[1] == ""


def test_a_reader_of_one_namespace_gets_all_of_it(printed: Printed, connect: ConnectAs) -> None:
    page = connect("team:read").search(Query(limit=2**31))
    assert [version.full_name for version in page.versions] == [
        "team/a",
        "team/a",
        "team/b",
        "team/b",
        "team/c",
        "team/c",
    ]
    assert not page.more
    assert [page.aliases[version.digest] for version in page.versions[:3]] == [(), ("latest", "prod"), ()]
