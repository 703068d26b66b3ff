from __future__ import annotations

import random

import pytest

from training import near_duplicates
from training.near_duplicates import near_copies, near_matches, shingles, similarity, unframed

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
@pytest.mark.parametrize("instruction", ["", "Sort the ticket into one queue, and say nothing else. Ticket: " * 4])
def test_the_pairs_are_those_of_comparing_everything_with_everything(
    seed: int, threshold: float, instruction: str
) -> None:
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
    given = [instruction + text for text in given]
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


def test_symbols_tell_apart_and_hyphens_within_words_do_not() -> None:
    sums = [shingles(text) for text in ("82 + 88", "82 - 88", "82 * 88", "82 / 88", "82+88", "82 88", "82 = 88")]
    assert len(set(sums)) == len(sums) - 1 and sums[0] == sums[4]
    assert shingles("Great 👍") != shingles("Great 👎")
    assert shingles("C is a language") != shingles("C++ is a language") != shingles("C# is a language")
    assert shingles("A well-known one.") == shingles("a well known one")


def test_what_all_texts_share_at_their_ends_is_left_out_by_whole_words() -> None:
    asked = [f"Name the queue of: number {n} please, in lower case" for n in range(100, 120)]
    assert unframed(asked) == [str(n) for n in range(100, 120)]
    assert unframed(asked[:5]) == asked[:5]
    assert unframed(["same words"] * 20) == ["words"] * 20
    assert near_copies(asked, 0.9) == []


def test_only_texts_of_one_kind_are_copies_of_each_other() -> None:
    text = "please list every bucket of the account"
    given = [text, text + " now", text, "what is the weather like", text + "!"]
    found = near_copies(given, 0.8, ["yes", "no", "yes", "yes", "no"])
    assert [(pair.index, pair.other) for pair in found] == [(1, 0), (2, 0), (4, 1)]


def test_many_texts_of_one_long_instruction_take_no_longer_than_others() -> None:
    """Also where others have another one or none."""
    instruction = "Classify the following support ticket into exactly one of the queues and say nothing else: " * 3
    bare = texts(0) * 3
    plain = [f"{text} {n}" for n, text in enumerate(bare)]
    counted: list[int] = []
    compared = 0

    def spy(first: frozenset[str], second: frozenset[str]) -> float:
        nonlocal compared
        compared += 1
        return len(first & second) / len(first | second)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(near_duplicates, "similarity", spy)
        given = [worded + text for worded in (instruction, instruction.upper()) for text in plain[2:]] + plain[:2]
        near_copies(given, 0.9, counted=counted.append)
    assert counted == list(range(1, len(given) + 1))
    assert compared < 10 * len(given)


def test_one_question_under_two_instructions_is_no_copy() -> None:
    rude = "Say whether the text below is rude, with yes or no and nothing else: " * 5
    bills = "Say whether the text below is about a bill, with yes or no and nothing else: " * 5
    words = texts(0)[:20]
    plain = near_copies(words, 0.9)
    both = near_copies([rude + text for text in words] + [bills + text for text in words], 0.9)
    assert len(both) == 2 * len(plain)
    given = ["the same question", "another one", "the same question"]
    assert near_copies(given, 0.9, apart=["a", "a", "b"]) == []
    [pair] = near_matches([rude + words[0], bills + "what is the weather like"], [rude + text for text in words], 0.9)
    assert (pair.index, pair.similarity) == (0, 1.0)


def test_matches_between_two_sets() -> None:
    train = ["please list every bucket of the account", "what is the weather like", "completely different words here"]
    held = ["nothing in common at all, really", "Please list every bucket of the account!"]
    [pair] = near_matches(train, held, 0.9)
    assert (pair.index, pair.other, pair.similarity) == (0, 1, 1.0)
    assert near_matches(train, [], 0.9) == []
