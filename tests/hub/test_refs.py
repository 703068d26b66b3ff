from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.errors import RefInvalid
from hub.refs import AdapterRef, Alias, Digest, Version

PART = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True).filter(lambda text: ".." not in text)
SELECTOR = st.one_of(
    st.integers(1, 999_999_999).map(Version),
    st.from_regex(r"[0-9a-f]{64}", fullmatch=True).map(Digest.of_hex),
    PART.filter(lambda text: not text.isdigit()).map(Alias),
)


@given(st.builds(AdapterRef, st.none() | PART, PART, SELECTOR))
def test_every_ref_is_parsed_back_from_its_text(ref: AdapterRef) -> None:
    assert AdapterRef.parse(str(ref)) == ref


@given(st.text(max_size=90) | st.from_regex(r"[a-z./:@%, -]{1,40}", fullmatch=True))
def test_any_text_is_refused_or_means_what_it_says(text: str) -> None:
    try:
        ref = AdapterRef.parse(text)
    except RefInvalid:
        return
    assert text in (str(ref), ref.full_name)
    assert text.isascii()
    assert ".." not in text
    assert not text.startswith(("/", "."))


def test_parts_and_selectors() -> None:
    digest = "sha256:" + "ab" * 32
    assert AdapterRef.parse("team/sentiment@3") == AdapterRef("team", "sentiment", Version(3))
    assert AdapterRef.parse("sentiment") == AdapterRef(None, "sentiment", Alias("latest"))
    assert AdapterRef.parse("team/sentiment:prod").full_name == "team/sentiment"
    assert AdapterRef.parse(f"x@{digest}").selector == Digest(digest)
    assert str(AdapterRef.parse("team/x")) == "team/x:latest"


@pytest.mark.parametrize(
    "text",
    ["x@0", "x@03", "x@-1", "x@1.0", "x@", "x:", "x@latest", "x@1:prod", "x:prod@1", "a/b/c", "x@9999999999", ""],
)
def test_near_misses_are_refused(text: str) -> None:
    with pytest.raises(RefInvalid):
        AdapterRef.parse(text)


def test_an_alias_of_digits_is_answered_with_the_version_it_looks_like() -> None:
    with pytest.raises(RefInvalid, match="write @3"):
        AdapterRef.parse("x:3")


def test_parts_have_at_most_64_characters() -> None:
    AdapterRef.parse(f"{'n' * 64}/{'a' * 64}:{'b' * 64}")
    with pytest.raises(RefInvalid):
        AdapterRef.parse("a" * 65)
