from __future__ import annotations

import random

import pytest

from training.near_duplicates import near_copies, near_matches, shingles, similarity

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def texts(seed: int) -> list[str]:
    """Random sentences, each followed by variants from hardly to heavily changed."""
    generator = random.Random(seed)
    found = []
    for _ in range(25):
        words = [
            "".join(generator.choices(LETTERS, k=generator.randint(2, 9))) for _ in range(generator.randint(5, 25))
        ]
        found.append(" ".join(words))
        for _ in range(3):
            changed = list(words)
            for _ in range(generator.randint(0, 3)):
                changed[generator.randrange(len(changed))] = generator.choice(words)
            found.append(" ".join(changed))
    generator.shuffle(found)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_the_pairs_are_those_of_comparing_everything_with_everything(seed: int, threshold: float) -> None:
    given = texts(seed)
    parts = [shingles(text) for text in given]
    kept: list[int] = []
    wanted = {}
    for index, own in enumerate(parts):
        best = max(((similarity(own, parts[other]), -other) for other in kept), default=(0.0, 0))
        if best[0] >= threshold:
            wanted[index] = (-best[1], best[0])
        else:
            kept.append(index)
    found = {pair.index: (pair.other, pair.similarity) for pair in near_copies(given, threshold)}
    assert len(wanted) > 10
    assert found == wanted
    assert near_copies([given[index] for index in kept], threshold) == []


def test_case_punctuation_and_spaces_do_not_matter() -> None:
    assert similarity(shingles("Wrong!  Really, wrong."), shingles("wrong really wrong")) == 1.0
    assert similarity(shingles("abc"), shingles("abd")) == 0.0
    assert similarity(shingles("!!!"), shingles("???")) == 0.0
    assert similarity(shingles(""), shingles("")) == 1.0
    assert similarity(shingles("日本語の文章です"), shingles("日本語の文章です")) == 1.0


def test_matches_between_two_sets() -> None:
    train = ["please list every bucket of the account", "what is the weather like", "completely different words here"]
    held = ["nothing in common at all, really", "Please list every bucket of the account!"]
    [pair] = near_matches(train, held, 0.9)
    assert (pair.index, pair.other, pair.similarity) == (0, 1, 1.0)
    assert near_matches(train, [], 0.9) == []
