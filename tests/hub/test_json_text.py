from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub import json_text

# From RFC 8785, appendix B, and ECMAScript's borders between plain and exponent notation.
NUMBERS = {
    0.0: "0", 5e-324: "5e-324", -5e-324: "-5e-324", 1.7976931348623157e308: "1.7976931348623157e+308",
    9007199254740991.0: "9007199254740991", 1e21: "1e+21", 9.999999999999997e22: "9.999999999999997e+22",
    333333333.3333333: "333333333.3333333", 1e-6: "0.000001", 1e-7: "1e-7",
    3.3333333333333333e-6: "0.0000033333333333333333",
    123456.0: "123456", 1.5: "1.5", 100.0: "100", -0.03125: "-0.03125", 2.0**53: "9.007199254740992e+15",
}  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
INTEGERS, DOUBLES = st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | DOUBLES | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize(("value", "text"), NUMBERS.items())
def test_numbers_are_written_as_ecmascript_writes_them(value: float, text: str) -> None:
    assert json_text.canonical(value).decode() == text


@given(st.dictionaries(TEXT, JSON, max_size=5))
def test_canonical_json_is_json_of_the_same_value_and_a_fixed_point(value: dict[str, object]) -> None:
    text = json_text.canonical(value)
    assert json.loads(text) == value
    assert json_text.canonical(json_text.parse_object(text, max_bytes=10**6)) == text


@given(st.dictionaries(TEXT, JSON, max_size=5), st.lists(TEXT, max_size=2))
def test_an_object_without_some_of_its_keys_is_canonical_too(value: dict[str, object], others: list[str]) -> None:
    leaving = [*list(value)[:2], *others]
    kept = {key: item for key, item in value.items() if key not in leaving}
    assert json_text.without(json_text.canonical(value), *leaving) == json_text.canonical(kept)


def test_keys_are_sorted_by_utf_16_and_the_order_given_does_not_matter() -> None:
    # U+1F600 is written with the surrogate D83D in UTF-16, which sorts before U+FB33.
    text = json_text.canonical({"\ufb33": 1, "\U0001f600": 2, "a": 3}).decode()
    assert text == '{"a":3,"\U0001f600":2,"\ufb33":1}'
    assert json_text.digest_of({"a": 1, "b": 2}) == json_text.digest_of({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "too large"),
        (b"[1]", "not a JSON object"),
        (b'{"a": ', "not JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "deep"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
        (b'{"a": 36893488147419103232}', "64 bits"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": "' + b"x" * 300_000 + b'"}', "limit"),
    ],
)
def test_what_is_no_strict_json_object_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        json_text.parse_object(data, max_bytes=250_000)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**64])
def test_what_no_other_reader_could_take_is_not_written(value: float) -> None:
    with pytest.raises(ValueError, match=r"NaN|64 bits"):
        json_text.canonical({"a": value})
