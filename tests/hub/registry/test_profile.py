"""A shared hub's profile holds for whoever pushes, and its refusal arrives as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub.errors import ProfileMalformed, ProfileRefused
from hub.hub import Hub
from tests.hub.making import write_adapter
from tests.hub.registry.conftest import ConnectAs


def test_a_push_from_afar_keeps_to_it(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    profile = tmp_path / "limits.toml"
    profile.write_text("max_rank = 3")
    store.profile_file = profile
    hub, source = connect("*:push"), write_adapter(tmp_path / "a")
    with pytest.raises(ProfileRefused, match="x is not what this hub's servers take: rank 4, at most 3 is served"):
        hub.push(source, "x")
    profile.write_text("max_rank = ")
    with pytest.raises(ProfileMalformed, match=r"the hub's limits\.toml: "):
        hub.push(source, "x")
    profile.write_text("max_rank = 4")
    assert hub.push(source, "x").created
