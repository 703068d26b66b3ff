"""A push sends its files while it still looks at their numbers: refused ones leave nothing that anybody sees."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hub import adapter_dir
from hub.adapter_dir import WEIGHTS_FILE
from hub.errors import NonFinite, ShapeMismatch
from hub.hub import Hub
from hub.refs import Digest
from hub.registry.server import RegistryConfig, RegistryServer
from hub.registry.uploads import Uploads
from hub.remote.address import Address
from hub.remote.cache import Cache
from hub.remote.connection import Connection
from hub.remote.remote_hub import RemoteHub
from tests.hub.making import f32, key, write_adapter, write_base
from tests.hub.registry.conftest import ConnectAs
from tests.hub.registry.cutting import CuttingProxy
from tests.hub.registry.test_limits import digest_of
from tests.hub.registry.test_transfer import MIB, files_of, large_adapter
from tests.waiting import bytes_in, eventually


def staged(tmp_path: Path, pattern: str = "*/*") -> int:
    return bytes_in(tmp_path / "uploads", pattern)


def spoil(directory: Path) -> None:
    """The last number of the weights is none."""
    path = directory / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-4] + np.float32("nan").tobytes())


@pytest.fixture
def slow_look(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], bool]], None]:
    """The look at the numbers waits for something first."""
    look = adapter_dir._look_at_values

    def wait_for(what: Callable[[], bool]) -> None:
        def waiting(*arguments: Any) -> Any:
            if threading.current_thread() is threading.main_thread():  # the client's look, not the server's
                assert eventually(what)
            return look(*arguments)

        monkeypatch.setattr(adapter_dir, "_look_at_values", waiting)

    return wait_for


@pytest.mark.parametrize("sent", ["some", "all"])
def test_an_adapter_that_is_refused_while_it_is_sent_leaves_nothing(
    sent: str, connect: ConnectAs, store: Hub, tmp_path: Path, slow_look: Any
) -> None:
    source = large_adapter(tmp_path / "a", 24)
    spoil(source)
    whole = (source / WEIGHTS_FILE).stat().st_size
    slow_look(lambda: staged(tmp_path) >= (whole if sent == "all" else MIB))
    hub = connect("*:push")
    with pytest.raises(NonFinite, match="NaN"):
        hub.push(source, "x")
    assert store.last_seq() == 0 and store.versions() == []
    assert not any(path.is_file() for path in (tmp_path / "hub" / "blobs").rglob("*"))
    assert not [thread for thread in threading.enumerate() if thread.name == "loraplex-upload"]
    sound = large_adapter(tmp_path / "b", 4)
    assert hub.push(sound, "x").version.number == 1
    assert store.verify() == []


def test_an_adapter_that_does_not_fit_its_base_leaves_nothing(
    connect: ConnectAs, store: Hub, tmp_path: Path, slow_look: Any
) -> None:
    base = write_base(tmp_path / "base")
    tensors = {
        key("q_proj", "lora_A.weight"): f32(np.ones((4, 99))),
        key("q_proj", "lora_B.weight"): f32(np.ones((16, 4))),
    }
    source = write_adapter(tmp_path / "a", config={"target_modules": ["q_proj"]}, tensors=tensors)
    slow_look(lambda: staged(tmp_path, "*/*") >= (source / WEIGHTS_FILE).stat().st_size)
    with pytest.raises(ShapeMismatch):
        connect("*:push").push(source, "x", base=str(base))
    assert store.last_seq() == 0


def test_a_refusal_does_not_wait_for_a_silent_server(store: Hub, tmp_path: Path, slow_look: Any) -> None:
    source = large_adapter(tmp_path / "a", 24)
    spoil(source)
    config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
    with RegistryServer(store, None, config) as server:
        proxy = CuttingProxy(server.address, "up", after=MIB, cuts=1, until=lambda: False)  # holds the line for 20 s
        slow_look(lambda: proxy.bytes["up"] > MIB)
        with RemoteHub(Connection(Address.parse(f"grpc://{proxy.address}"), None), Cache(tmp_path / "cache")) as hub:
            begun = time.monotonic()
            with pytest.raises(NonFinite):
                hub.push(source, "x")
            assert time.monotonic() - begun < 15
        proxy.close()


def test_a_refusal_is_told_also_where_the_server_is_away(tmp_path: Path) -> None:
    source = large_adapter(tmp_path / "a", 4)
    spoil(source)
    connection = Connection(Address.parse("grpc://127.0.0.1:1"), None, patience_seconds=20)
    with RemoteHub(connection, Cache(tmp_path / "cache")) as hub:
        begun = time.monotonic()
        with pytest.raises(NonFinite):
            hub.push(source, "x")
        assert time.monotonic() - begun < 15


def test_progress_is_told_of_one_thing_after_the_other(store: Hub, tmp_path: Path, slow_look: Any) -> None:
    source = large_adapter(tmp_path / "a", 8)
    told: list[str] = []
    slow_look(lambda: staged(tmp_path) >= 4 * MIB)
    config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
    with RegistryServer(store, None, config) as server:
        connection = Connection(Address.parse(f"grpc://{server.address}"), None)
        with RemoteHub(connection, Cache(tmp_path / "cache")) as hub:
            hub.push(source, "x", progress=lambda what, done, total: told.append(what))
    assert list(dict.fromkeys(told)) == ["checking", "uploading"]
    assert told == sorted(told)


def test_the_servers_file_becomes_the_hubs_blob(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    source = large_adapter(tmp_path / "a", 4)
    hub = connect("*:push")
    version = hub.push(source, "x").version
    digits = version.manifest.files[WEIGHTS_FILE].sha256.hex
    blob = tmp_path / "hub" / "blobs" / "sha256" / digits[:2] / digits
    assert blob.stat().st_mode & 0o222 == 0
    assert blob.stat().st_nlink == 1, "the upload's name is left beside it"
    hub.pull("x", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(source)
    assert store.verify() == store.fsck() == []


def test_a_file_that_another_server_still_writes_is_copied(tmp_path: Path) -> None:
    """Two servers that share a directory: what the other appends must not come into a blob."""
    uploads = Uploads(tmp_path / "uploads")
    data = b"bytes" * 1000
    digest: Digest = digest_of(data)
    uploads.receive("ada", "README.md", digest, len(data), 0, iter([data]))
    [whole] = (tmp_path / "uploads").glob("*/*")
    with uploads.directory() as directory:
        with whole.open("ab"):
            assert uploads.place("ada", digest, directory / "one")
        assert uploads.place("ada", digest, directory / "two")
        assert not (directory / "one").samefile(whole)
        assert (directory / "two").samefile(whole)
        assert (directory / "one").read_bytes() == (directory / "two").read_bytes() == data
        assert not uploads.place("ada", digest_of(b"another"), directory / "three")
