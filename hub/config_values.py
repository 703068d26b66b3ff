"""Readers for the values of adapter_config.json.

Each takes the key's name, for the message, and JSON's value, and returns what `LoraConfig` holds. All raise
ConfigMalformed on the wrong type; ranks out of bounds raise RankInvalid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, Literal

from hub.errors import ConfigMalformed, RankInvalid

MAX_RANK: Final = 4096
MAX_PATTERNS: Final = 2048
MAX_NAME_CHARS: Final = 256  # of a module name or a pattern
Bias = Literal["none", "all", "lora_only"]


def flag(name: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ConfigMalformed(f"{name} is {shown(value)}, not true or false")
    return value


def rank(name: str, value: Any) -> int:
    """A rank, 1…MAX_RANK."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigMalformed(f"{name} is {shown(value)}, not an integer")
    if not 1 <= value <= MAX_RANK:
        raise RankInvalid(f"{name} is {value}; ranks are 1 to {MAX_RANK}")
    return value


def alpha(name: str, value: Any) -> float:
    """A number of moderate size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e9:
        raise ConfigMalformed(f"{name} is {shown(value)}, not a number of at most 1e9")
    return value


def text(name: str, value: Any) -> str:
    """A line of text."""
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise ConfigMalformed(f"{name} is {shown(value)}, not a line of text")
    return value


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARS or not value.isprintable():
        raise ConfigMalformed(f"{name} holds {shown(value)}, not a name of at most {MAX_NAME_CHARS} characters")
    return value


def names(name: str, value: Any) -> tuple[str, ...]:
    """A list of names."""
    if not isinstance(value, list):
        raise ConfigMalformed(f"{name} is {shown(value)}, not a list of names")
    return tuple(_name(name, item) for item in value)


def names_or_regex(name: str, value: Any) -> tuple[str, ...] | str:
    """A list of names, or one text."""
    return text(name, value) if isinstance(value, str) else names(name, value)


def indices(name: str, value: Any) -> tuple[int, ...]:
    """One index or a list of them."""
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**31:
            raise ConfigMalformed(f"{name} holds {shown(item)}, not an index")
    return tuple(items)


def indices_by_module(name: str, value: Any) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    """Indices, or an object of them."""
    if isinstance(value, dict):
        return {_name(name, key): indices(name, item) for key, item in value.items()}
    return indices(name, value)


def bias(name: str, value: Any) -> Bias:
    """PEFT's three words for bias."""
    if value not in ("none", "all", "lora_only"):
        raise ConfigMalformed(f"{name} is {shown(value)}, not none, all or lora_only")
    return value  # type: ignore[no-any-return]


def unchecked(name: str, value: Any) -> str | bool:
    """As it is: checked elsewhere."""
    return value  # type: ignore[no-any-return]


def rank_patterns(name: str, value: Any) -> Mapping[str, int]:
    """An object of patterns and ranks."""
    return {key: rank(f"{name}[{shown(key)}]", item) for key, item in _patterns(name, value).items()}


def alpha_patterns(name: str, value: Any) -> Mapping[str, float]:
    """An object of patterns and alphas."""
    return {key: alpha(f"{name}[{shown(key)}]", item) for key, item in _patterns(name, value).items()}


def _patterns(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigMalformed(f"{name} is {shown(value)}, not an object")
    if len(value) > MAX_PATTERNS:
        raise ConfigMalformed(f"{name} has {len(value)} entries; at most {MAX_PATTERNS} are taken")
    for pattern in value:
        _name(name, pattern)
        _check_pattern(name, pattern)
    return value


def _check_pattern(name: str, pattern: str) -> None:
    """Refuse what takes Python's backtracking matcher exponential time; `match_steps` bounds the rest."""
    if re.search(r"\)[*+{]", _bare(pattern)) or re.search(r"\\[1-9]|\(\?(?!:)", pattern):
        raise ConfigMalformed(f"{name} has the pattern {shown(pattern)}: repeated or special groups are not taken")
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigMalformed(f"{name} has the pattern {shown(pattern)}, which is no regular expression") from error


def match_steps(pattern: str, length: int) -> int:
    """A bound on the matcher's steps for a checked pattern on a name of `length` characters.

    Every repetition may end anywhere behind the one before it, and PEFT puts one more in front; every choice between
    alternatives may be tried for each of these.
    """
    bare = _bare(pattern)
    repetitions = len(re.findall(r"[*+?{]", bare)) + 1
    choices, bars = 1, [0]  # alternatives of the groups closed so far; "|" in the groups still open
    for char in f"{bare})":
        if char == "(":
            bars.append(0)
        elif char == "|":
            bars[-1] += 1
        elif char == ")":
            choices *= bars.pop() + 1
    return math.comb(length + repetitions, repetitions) * choices


def _bare(pattern: str) -> str:
    """`pattern` with every escape and every class made one plain character."""
    return re.sub(r"\\.|\[\^?\]?[^]]*\]", "c", pattern).replace("(?:", "(")


def shown(value: Any) -> str:
    """`value` for a message: ASCII, escaped, cut."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
