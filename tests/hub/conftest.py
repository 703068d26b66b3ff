from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hub.hub import Hub


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees this user's hub or fingerprint cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LORAPLEX_HUB", str(tmp_path / "default-hub"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub.open(str(tmp_path / "hub")) as opened:
        yield opened
