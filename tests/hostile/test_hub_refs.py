"""Hostile references, rows 10 and 12: refused before anything is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hub.errors import RefInvalid
from hub.hub import Hub
from hub.refs import AdapterRef, Digest
from tests.hub.making import write_adapter

ROW_10 = [
    "../x", "x/../y", "..", ".", "./x", "/etc/passwd", "x//y", "//x", "x/", "http://host/x", "file:///etc/passwd",
    "s3://b/k",
    "%2e%2e/x", "x%00", "x\0", "x\n", "x\r\n", " x", "x ", "x\t", "team\\x", "~/x", "X", "Team/x", "tеam/x", "ｘ",
    "x‐y", "x\u200by",
    "x\u202e", "ı", "x,y", "x;rm", "$(id)", "`id`", "x|y", "x*", "x?", "[x]", "x'--", '"x"', "a..b", "-x", "_x",
    ".x", "x" * 65, "x" * 10**6,
    "x:..", "x:../prod", "x:PROD", "x@latest", "x@-1", "x@0", "x@1e3", "x@١", "x@1 ", "x@0x1",
]  # fmt: skip
ROW_12 = [
    "sha256:../..", "sha256:" + "../" * 21 + "x", "sha256:" + "0" * 63, "sha256:" + "0" * 65, "sha256:" + "A" * 64,
    "sha256:" + "٠" * 64,
    "sha256:" + "0" * 63 + "\n", "sha256:" + "0" * 64 + "\n", "SHA256:" + "0" * 64, "sha1:" + "0" * 40, "0" * 64,
    "sha256:%2e%2e", "",
]  # fmt: skip


@pytest.mark.parametrize("text", ROW_10, ids=lambda text: ascii(text[:30]))
def test_row_10_no_path_url_escape_or_look_alike_is_a_reference(text: str) -> None:
    with pytest.raises(RefInvalid) as caught:
        AdapterRef.parse(text)
    assert caught.value.reason == "REF_INVALID"
    assert str(caught.value).replace("…", "").isascii()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ROW_12, ids=lambda text: ascii(text[:30]))
def test_row_12_no_path_is_a_digest(text: str) -> None:
    with pytest.raises(RefInvalid):
        Digest.parse(text)
    with pytest.raises(RefInvalid):
        AdapterRef.parse(f"x@{text}")


def test_rows_10_and_12_are_refused_by_every_verb_before_any_file_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_adapter(tmp_path / "a")
    with Hub.open(str(tmp_path / "hub")) as hub:
        hub.push(directory, "x")
        catalog = [f"hub.catalog.Catalog.{name}" for name in ("_asked", "_read", "_writing")]
        for module in ("pathlib.Path.open", "os.open", *catalog):
            monkeypatch.setattr(module, lambda *a, **k: pytest.fail("something was opened"))
        doors: list[Callable[[], object]] = [
            lambda: hub.resolve("../x"),
            lambda: hub.push(directory, "../x"),
            lambda: hub.push(directory, "x", aliases=["../prod"]),
            lambda: hub.pull("x:../y", tmp_path / "out"),
            lambda: hub.tag("x", "../prod"),
            lambda: hub.untag("../x", "prod"),
            lambda: hub.aliases("../x"),
            lambda: hub.verify("../x"),
            lambda: hub.get("sha256:../.."),
            lambda: hub.read_file("sha256:../..", "adapter_config.json"),
            lambda: hub.resolve("x@sha256:../.."),
        ]
        for door in doors:
            with pytest.raises(RefInvalid):
                door()
        monkeypatch.undo()
