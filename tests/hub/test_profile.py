"""A hub's profile: what its servers cannot take is refused at the push, with what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub.bundle import Bundle
from hub.errors import ProfileMalformed, ProfileRefused
from hub.exporting import export_bundle
from hub.hub import Hub
from hub.profile import Limits, Profile
from tests.hub.making import lora_tensors, write_adapter, write_base


@pytest.fixture
def place(tmp_path: Path) -> Path:
    with Hub.open(str(tmp_path / "hub")):
        return tmp_path / "hub"


def write(place: Path, text: str) -> None:
    (place / "profile.toml").write_text(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_rank = 3", "team/x is not what this hub's servers take: rank 4, at most 3 is served"),
        ('targets = ["q_proj"]', "targets v_proj, served are q_proj"),
        ('dtypes = ["BF16", "F16"]', "dtypes F32, served are BF16, F16"),
        ("features = []", None),
        ('max_bytes = "1 kB"', r"[\d,]+ bytes, at most 1,000 are served"),
        ("max_bytes = 1000", "at most 1,000 are served"),
        ('max_bytes = "1.5 MiB"', None),
        ('bases = ["other", "another"]', "the base tiny-base, served is other, another"),
        ('bases = ["tiny-base"]', None),
        ("verified_base = true", "the base is unverified: give --base"),
        ("max_rank = 3\nverified_base = true", "at most 3 is served; the base is unverified"),
        ('max_rank = 3\n[for."team/*"]\nmax_rank = 4', None),
        ('[for."other/*"]\nmax_rank = 3', None),
        ('[for."team/*"]\n[for."*"]\nmax_rank = 3', None),
    ],
)
def test_what_it_says_holds(text: str, said: str | None, place: Path, tmp_path: Path) -> None:
    write(place, text)
    source = write_adapter(tmp_path / "a")
    with Hub.open(str(place)) as hub:
        if said is None:
            assert hub.push(source, "team/x").created
            return
        with pytest.raises(ProfileRefused, match=said):
            hub.push(source, "team/x")
        assert hub.versions() == []
        write(place, "")  # read anew at every push
        assert hub.push(source, "team/x").created


def test_a_verified_base_is_one_that_was_hashed(place: Path, tmp_path: Path) -> None:
    write(place, "verified_base = true")
    base = write_base(tmp_path / "base")
    with Hub.open(str(place)) as hub:
        version = hub.push(write_adapter(tmp_path / "a"), "x", base=str(base)).version
        write(place, f'bases = ["{version.manifest.base.fingerprint}"]')
        assert hub.push(write_adapter(tmp_path / "b", tensors=lora_tensors(seed=2)), "x", base=str(base)).created


def test_features_are_named(place: Path, tmp_path: Path) -> None:
    write(place, 'features = ["dora"]')
    config = {"use_rslora": True}
    with Hub.open(str(place)) as hub:
        with pytest.raises(ProfileRefused, match="features rslora, served are dora"):
            hub.push(write_adapter(tmp_path / "a", config=config), "x")
        write(place, 'features = ["rslora", "dora"]')
        assert hub.push(tmp_path / "a", "x").created


def test_what_is_imported_keeps_to_it(place: Path, tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "other")) as other:
        other.push(write_adapter(tmp_path / "a"), "team/x")
        export_bundle(other, ["team/x"], tmp_path / "x.bundle")
    write(place, "max_rank = 3")
    with Hub.open(str(place)) as hub, Bundle(tmp_path / "x.bundle") as bundle:
        with pytest.raises(ProfileRefused, match="rank 4, at most 3"):
            hub.adopt(bundle.arrivals, bundle.lay_out)
        assert hub.versions() == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_rank = 0", "max_rank is no positive number"),
        ("max_rank = true", "max_rank is no positive number"),
        ('targets = "q_proj"', "targets is no list of names"),
        ('max_bytes = "much"', "max_bytes: 'much' is no size: write 512MiB"),
        ("verified_base = 1", "verified_base is neither true nor false"),
        ("max_ranks = 4", "has the unknown key 'max_ranks'; known: bases, dtypes, "),
        ("[for.x]\nfor = 1", "has the unknown key 'for'"),
        ("for = 1", "for: is no table of names"),
        ("max_rank = ", r"the hub's profile\.toml: "),
    ],
)
def test_one_that_cannot_be_read_stops_pushes(text: str, said: str, place: Path, tmp_path: Path) -> None:
    write(place, text)
    with Hub.open(str(place)) as hub, pytest.raises(ProfileMalformed, match=said) as refused:
        hub.push(write_adapter(tmp_path / "a"), "x")
    assert str(place) not in str(refused.value)


def test_no_file_no_limits(tmp_path: Path) -> None:
    assert Profile.read(tmp_path / "profile.toml") == Profile(Limits(), {})
