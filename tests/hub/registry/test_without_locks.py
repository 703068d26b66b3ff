"""File systems on which `flock` does nothing: many readers of one cache get right bytes, and leave it whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hub.hub import Hub
from hub.registry.server import RegistryConfig, RegistryServer
from tests.hub.making import write_adapter
from tests.hub.registry.test_transfer import files_of, large_adapter

WORKER = """
import fcntl, sys
fcntl.flock = lambda *arguments: None
from hub.opening import open_hub

url, out = sys.argv[1:]
with open_hub(url) as hub:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in (1, 2):
        hub.pull(f"x@{number}", f"{out}-{number}")
"""


def race(url: str, out: Path, workers: int) -> None:
    """Let processes whose locks do nothing pull the same versions into one cache at the same moment."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, url, str(out / str(number))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(workers)
    ]  # fmt: skip
    try:
        for each in running:
            assert each.stdout is not None and each.stdout.readline() == "ready\n"
        for each in running:
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        for each in running:
            _, errors = each.communicate(timeout=50)
            assert each.returncode == 0, errors
    finally:
        for each in running:
            each.kill()
            each.communicate()


@pytest.mark.timeout(120)
def test_processes_that_fetch_the_same_without_locks_all_get_it_right(store: Hub, tmp_path: Path) -> None:
    sources = [large_adapter(tmp_path / "a", 24), write_adapter(tmp_path / "b")]
    for source in sources:
        store.push(source, "x")
    config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
    with RegistryServer(store, None, config) as server:
        race(f"grpc://{server.address}", tmp_path / "out", 4)
    for worker in range(4):
        for number, source in enumerate(sources, 1):
            assert files_of(tmp_path / "out" / f"{worker}-{number}") == files_of(source)
    cached = [path for path in (tmp_path / "cache").rglob("sha256/??/*") if path.is_file()]
    assert len(cached) == 6  # two adapters' files and manifests


@pytest.mark.timeout(120)
def test_the_cache_before_s3_needs_no_locks_either(s3_url: str, tmp_path: Path) -> None:
    sources = [large_adapter(tmp_path / "a", 24), write_adapter(tmp_path / "b")]
    url = f"file://{tmp_path / 's3-hub'}?blobs={s3_url}"
    with Hub.open(url) as hub:
        for source in sources:
            hub.push(source, "x")
    (tmp_path / "out").mkdir()
    race(url, tmp_path / "out", 4)
    for worker in range(4):
        for number, source in enumerate(sources, 1):
            assert files_of(tmp_path / "out" / f"{worker}-{number}") == files_of(source)
    with Hub.open(url) as hub:
        assert hub.verify() == hub.fsck() == []
