"""JSON at the hub's doors: strict in, canonical out.

Canonical JSON is RFC 8785 (keys sorted, no blanks, UTF-8, numbers as ECMAScript prints them), so that any language
computes the same digest. One change, because seeds need 64 bits: integers are written digit by digit, and doubles from
2^53 up with an exponent, so that neither is read back as the other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from hub.refs import Digest

MAX_DEPTH = 32
_DECODER = json.JSONDecoder()


def parse_object(data: bytes, *, max_bytes: int) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises ValueError, with a message fit for a person, on anything else: too long, not UTF-8, not JSON, NaN or
    Infinity, a key twice in one object, nested deeper than MAX_DEPTH, an integer of more than 64 bits, half a
    surrogate pair.
    """
    if len(data) > max_bytes:
        raise ValueError(f"has {len(data)} bytes, the limit is {max_bytes}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at line {error.lineno}") from error
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    _check(value, MAX_DEPTH)
    return value


def canonical(value: Any) -> bytes:
    """`value` (dicts with text keys, lists, tuples, text, numbers, booleans, None) as canonical JSON.

    Raises ValueError on NaN, infinities, integers above 64 bits and lone surrogates; TypeError on other types.
    """
    return _write(value).encode("utf-8")


def without(text: bytes, *keys: str) -> bytes:
    """The object in `text`, canonical JSON, without these of its own keys; canonical again."""
    whole, kept, at = text.decode(), [], 1
    while whole[at] != "}":
        begin = at
        key, colon = _DECODER.raw_decode(whole, begin)
        _, at = _DECODER.raw_decode(whole, colon + 1)
        if key not in keys:
            kept.append(whole[begin:at])
        at += whole[at] == ","
    return f"{{{','.join(kept)}}}".encode()


def digest_of(value: Any) -> Digest:
    """SHA-256 of `value`'s canonical JSON."""
    return Digest.of_hex(hashlib.sha256(canonical(value)).hexdigest())


def _write(value: Any) -> str:
    if value is None or isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        return str(_bounded(value))
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys of JSON objects are text")
        # RFC 8785 sorts by UTF-16 code units.
        keys = sorted(value, key=lambda key: key.encode("utf-16-be", "surrogatepass"))
        return "{" + ",".join(f"{_write(key)}:{_write(value[key])}" for key in keys) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_write, value)) + "]"
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _number(value: float) -> str:
    """`value` as ECMAScript's Number::toString writes it below 2^53; Python's repr has the same shortest digits."""
    if not math.isfinite(value):
        raise ValueError("NaN and infinities are no JSON numbers")
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    mantissa, _, exponent = f"{abs(value)!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    # The value is 0.<digits> · 10^point.
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))
    digits = digits.rstrip("0")
    if 0 < point <= 21 and abs(value) < 2**53:
        if len(digits) <= point:
            return sign + digits.ljust(point, "0")
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    tail = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{tail}e{'+' if point > 0 else '-'}{abs(point - 1)}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"has the key {key[:80]!a} twice")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is no JSON number")


def _check(value: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError("is nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            _check(key, 1)
            _check(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
    elif isinstance(value, str):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("holds half a surrogate pair")
    elif isinstance(value, int):
        _bounded(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("holds a number too large for a double")


def _bounded(value: int) -> int:
    if not -(2**63) <= value < 2**64:
        raise ValueError("holds an integer of more than 64 bits")
    return value
