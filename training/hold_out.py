"""The part of a data set that is put aside before anything else looks at it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence

from training.data import Example, Messages
from training.errors import DataTooSmall


def hold_out(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split into (training, validation); `fraction` 0 holds nothing out.

    Examples that share a question, at any turn, are on one side; which one depends on the seed and their prompts alone.
    So many are held as asked for, or fewer where the next ones are too many together, but never none. Raises
    `DataTooSmall` when all share one question.
    """
    if fraction == 0:
        return tuple(examples), ()
    groups = _by_question(examples, seed)
    if len(groups) < 2:
        raise DataTooSmall(f"{len(examples)} examples with one prompt cannot be split into training and validation")
    wanted = max(1, round(len(examples) * fraction))
    held: set[int] = set()
    for indices in groups:
        if len(held) + len(indices) <= wanted:
            held.update(indices)
    if not held:
        smallest = min(groups, key=len)
        held.update(smallest)
    training = tuple(example for index, example in enumerate(examples) if index not in held)
    return training, tuple(examples[index] for index in sorted(held))


def _by_question(examples: Sequence[Example], seed: int) -> list[list[int]]:
    """The examples' indices, those that share a question together, in the order that the seed gives their prompts."""
    asked = Counter(question for example in examples for question in example.questions)
    representative = list(range(len(examples)))

    def root(index: int) -> int:
        while representative[index] != index:
            representative[index] = index = representative[representative[index]]
        return index

    first: dict[Messages, int] = {}
    for index, example in enumerate(examples):
        for question in example.questions:
            # How most of the conversations open is a greeting, and would put nearly everything into one group.
            if question == example.prompt or asked[question] <= len(examples) / 2:
                representative[root(index)] = root(first.setdefault(question, index))
    places: dict[Messages, str] = {}
    groups: dict[int, list[int]] = defaultdict(list)
    order: dict[int, str] = {}
    for index, example in enumerate(examples):
        if example.prompt not in places:
            prompt = json.dumps([message.as_dict() for message in example.prompt])
            places[example.prompt] = hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest()
        group, place = root(index), places[example.prompt]
        groups[group].append(index)
        order[group] = min(place, order.get(group, place))
    return [groups[group] for group in sorted(groups, key=order.__getitem__)]
