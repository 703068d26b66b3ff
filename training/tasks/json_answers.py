"""JSON objects as answers: what an evaluation needs of the wanted ones, and two of them compared place by place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from training.data import Example
from training.errors import DataInvalid
from training.tasks.policy import parse_json

Place = tuple[str, ...]  # keys from the outside in; _ELEMENT for those of a list, in whatever order
Field = tuple[Place, str]  # a place and the value there, as JSON

_ELEMENT = "[]"


def check_objects(examples: Sequence[Example]) -> None:
    """Raise `DataInvalid`, naming the example, where a wanted answer is no JSON object."""
    for number, example in enumerate(examples, 1):
        try:
            sound = isinstance(json.loads(example.answer), dict)
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            raise DataInvalid(f"the answer of example {number} is no JSON object: `hub data check` finds such lines")


def fields_of(record: Any) -> Counter[Field]:
    """What a JSON value says at each place, with how often.

    Types count ("1" is not 1, though 1.0 is), spaces around a text and the order of a list do not. An element of a list
    that is an object or a list is one value, right as a whole or wrong; so is an empty object or list.
    """
    found: Counter[Field] = Counter()
    left: list[tuple[Place, Any]] = [((), record)]
    while left:
        place, value = left.pop()
        match value:
            case Mapping() if value:
                left += [((*place, json.dumps(key)), inner) for key, inner in value.items()]
            case [_, *_]:
                found.update(((*place, _ELEMENT), _text(inner)) for inner in value)
            case _:
                found[place, _text(value)] += 1
    return found


def _text(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    match value:
        case Mapping():
            return {key: _plain(inner) for key, inner in value.items()}
        case list():
            return [_plain(inner) for inner in value]
        case str():
            return value.strip()
        case float() if value.is_integer():
            return int(value)
    return value


def parse_object(answer: str) -> dict[str, Any] | None:
    """The answer as a JSON object, a code fence around it allowed; None when it is none, or nested beyond measure."""
    parsed = parse_json(answer)
    try:
        _text(parsed)
    except RecursionError:
        return None
    return parsed if isinstance(parsed, dict) else None
