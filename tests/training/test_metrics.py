"""Every metric against the library that defines it, over random inputs; intervals against their definition."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from training.bootstrap import interval, interval_of_difference
from training.data import Example
from training.metrics import Measured, Words, accuracy, bleu, fields_of, macro_f1, mean, micro_f1, per_token, rouge_l
from training.tasks.tagged_text import measure_records

SEEDS = range(8)
WORDS = (
    "the",
    "a",
    "bucket",
    "of",
    "lists",
    "deletes",
    "role",
    "key",
    "policy",
    "on",
    "running",
    "quickly,",
    "1.5",
    "(x)",
)


def sentences(generator: random.Random, count: int) -> list[str]:
    return [" ".join(generator.choices(WORDS, k=generator.randint(0, 14))) for _ in range(count)]


def edited(generator: random.Random, texts: list[str]) -> list[str]:
    """Some as they were, some with words changed, dropped or added."""
    found = []
    for text in texts:
        words = [word if generator.random() < 0.8 else generator.choice(WORDS) for word in text.split()]
        found.append(" ".join(words[: generator.randint(0, len(words) + 2)] + generator.choices(WORDS, k=1)))
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_accuracy_and_macro_f1_are_scikit_learns(seed: int) -> None:
    generator = random.Random(seed)
    labels = ["a", "b", "c", "d", "e"][: generator.randint(2, 5)]
    count = generator.randint(1, 60)
    wanted = generator.choices(labels, [generator.random() + 0.01 for _ in labels], k=count)
    given = [generator.choice([w, *labels, None]) for w in wanted]
    told = [g or "none" for g in given]
    assert accuracy(wanted, given).value == pytest.approx(accuracy_score(wanted, told))
    present = sorted(set(wanted))
    library = f1_score(wanted, told, labels=present, average="macro", zero_division=0.0)
    assert macro_f1(wanted, given, labels).value == pytest.approx(library)


@pytest.mark.parametrize("seed", SEEDS)
def test_rouge_l_is_rouge_scores(seed: int) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    generator = random.Random(seed)
    wanted = sentences(generator, 30)
    given = edited(generator, wanted)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    library = [scorer.score(w, g)["rougeL"].fmeasure for w, g in zip(wanted, given, strict=True)]
    assert rouge_l(wanted, given).value == pytest.approx(np.mean(library))
    weights = [generator.random() < 0.5 for _ in wanted]
    chosen = [score for score, weight in zip(library, weights, strict=True) if weight]
    assert rouge_l(wanted, given, weights).value == pytest.approx(np.mean(chosen) if chosen else 0.0)


ascii_words = st.sampled_from([*WORDS, "Running", "generalizations", "snake_case", "IPv6", "x86_64", "don't", "__"])


@settings(deadline=None)  # the first call imports a library
@drawn(
    st.text(st.characters(max_codepoint=127), max_size=80)
    | st.lists(ascii_words | st.text(st.characters(max_codepoint=127), max_size=8), max_size=12).map(" ".join)
)
def test_the_words_of_ascii_text_are_rouge_scores_own(text: str) -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    assert Words().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Größe, Grüße", ["grösse", "grüsse"]),
        ("cafe\u0301 \u2013 “Café”", ["café", "café"]),
        ("Большая рыба_и", ["большая", "рыба", "и"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("删除S3桶。", ["删", "除", "s3", "桶"]),
        ("カタカナ ｶﾅ", ["カ", "タ", "カ", "ナ", "ｶ", "ﾅ"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("ខ្មែរ", ["ខ្", "មែ", "រ"]),
    ],
)
def test_words_of_other_scripts(text: str, words: list[str]) -> None:
    assert Words().tokenize(text) == words


@pytest.mark.parametrize("text", ["Удалить очередь", "删除一个队列", "حذف قائمة الانتظار", "מחיקת התור", "ลบคิวนี้"])
def test_right_answers_in_any_script_score_full_marks_and_wrong_ones_none(text: str) -> None:
    other = "Größe zählt"
    assert rouge_l([text], [text]).value == 1.0
    assert rouge_l([text, "Größe"], [other, "Grüße"]).value == 0.0


def test_bleu_of_text_without_blanks_counts_characters() -> None:
    wanted, given = "这个操作删除一个消息队列", "这个操作删除一个队列"
    assert bleu([wanted], [wanted]).value == pytest.approx(1.0)
    assert 0.5 < bleu([wanted], [given]).value < 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_bleu_is_sacrebleus_on_the_whole_and_on_any_resample(seed: int) -> None:
    import sacrebleu

    generator = random.Random(seed)
    wanted = [text or "x" for text in sentences(generator, 25)]
    given = edited(generator, wanted)
    measured = bleu(wanted, given)
    assert measured.value == pytest.approx(sacrebleu.corpus_bleu(given, [wanted]).score / 100)
    drawn = generator.choices(range(25), k=25)
    again = sacrebleu.corpus_bleu([given[i] for i in drawn], [[wanted[i] for i in drawn]]).score / 100
    assert float(measured.of_totals(measured.counts[drawn].sum(axis=0))) == pytest.approx(again)


def test_bleu_of_nothing_right_and_of_silence() -> None:
    assert bleu(["a b c d e"], ["a b c d e"]).value == pytest.approx(1.0)
    assert bleu(["a b c d e"], ["v w x y z"]).value == 0.0
    assert bleu(["a b c d e"], [""]).value == 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_field_f1_is_scikit_learns_micro_f1(seed: int) -> None:
    generator = random.Random(seed)

    def record() -> dict[str, Any]:
        values: list[Any] = ["x", "y ", ["x", "z"], 3, None, {"deep": "x"}]
        return {name: generator.choice(values) for name in generator.sample("abcd", generator.randint(0, 4))}

    wanted = [record() for _ in range(20)]
    given = [generator.choice([w, record()]) for w in wanted]
    pairs = [[fields_of(r) for r in side] for side in (wanted, given)]
    binary = MultiLabelBinarizer().fit([*pairs[0], *pairs[1]])
    library = f1_score(*(binary.transform(side) for side in pairs), average="micro", zero_division=1.0)
    assert micro_f1(*pairs).value == pytest.approx(library)
    examples = [Example.of(user="q", answer=json.dumps(r)) for r in wanted]
    scores = measure_records(examples, [json.dumps(r) for r in given])
    assert scores["field_f1"].value == pytest.approx(library)
    assert scores["valid_json"].value == 1.0
    assert scores["exact_json"].value == np.mean([w == g for w, g in zip(wanted, given, strict=True)])


def test_field_f1_survives_any_answer() -> None:
    examples = [Example.of(user="q", answer='{"a":"x","b":"y"}')] * 5
    answers = ["", "[1]", '{"a":"x"}', '{"b":"y","a":"x"}', "```json\n" + '{"a": "x ", "b": ["y"]}' + "\n```"]
    scores = {name: measured.value for name, measured in measure_records(examples, answers).items()}
    assert scores["valid_json"] == pytest.approx(4 / 5)
    assert scores["exact_json"] == pytest.approx(1 / 5)
    assert scores["field_f1"] == pytest.approx(2 * (1 + 2 + 1) / (10 + 1 + 2 + 2))  # b as a list is another place


def test_nothing_wanted_and_nothing_given_is_right() -> None:
    assert micro_f1([frozenset()], [frozenset()]).value == 1.0
    assert mean([1.0, 0.0], [False, False]).value == 0.0


def test_cross_entropy_is_per_token_not_per_text() -> None:
    assert per_token([10.0, 1.0], [5, 20]).value == pytest.approx(11 / 25)


@pytest.mark.parametrize("seed", range(3))
def test_the_bootstrap_scores_resamples_as_they_would_be_scored_alone(seed: int) -> None:
    generator = random.Random(seed)
    wanted = generator.choices("abc", k=40)
    given = [w if generator.random() < 0.7 else generator.choice("abc") for w in wanted]
    measured = macro_f1(wanted, given, list("abc"))
    draws = np.random.default_rng(seed).multinomial(40, np.full(40, 1 / 40), size=100)
    alone = []
    for times in draws:
        rows = np.repeat(np.arange(40), times)
        w, g = [wanted[i] for i in rows], [given[i] for i in rows]
        alone.append(f1_score(w, g, labels=sorted(set(w)), average="macro", zero_division=0.0))
    low, high = np.quantile(alone, [0.025, 0.975])
    found = interval(measured, seed, resamples=100)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.low <= measured.value <= found.high


def test_intervals_of_accuracy_cover_what_they_should() -> None:
    """About 95 % of the intervals from samples of a coin hold the coin's true rate."""
    generator = np.random.default_rng(0)
    covered = sum(0.7 in interval(mean(generator.random(200) < 0.7), seed, resamples=400) for seed in range(200))
    assert 180 <= covered <= 198


def test_equal_seeds_give_equal_intervals_and_more_examples_narrower_ones() -> None:
    values = np.random.default_rng(2).random(2000).tolist()
    few, many = mean(values[:20]), mean(values)
    assert interval(few, 3) == interval(few, 3) != interval(few, 4)
    widths = [interval(one, 0).high - interval(one, 0).low for one in (few, many)]
    assert widths[1] < widths[0] / 5


def test_a_difference_is_paired() -> None:
    """Two models that differ on a few questions: paired, the others cancel out."""
    generator = np.random.default_rng(1)
    base = generator.random(300) < 0.5
    better = base.copy()
    better[:12] = True
    first, second = mean(better), mean(base)
    found = interval_of_difference(first, second, 0)
    assert first.value - second.value in found
    own = interval(first, 0)
    assert found.high - found.low < (own.high - own.low) / 2
    same = interval_of_difference(second, second, 0)
    assert (same.low, same.high) == (0.0, 0.0)


def test_a_metric_of_one_example_has_no_width() -> None:
    only = Measured(np.array([[1.0, 1.0]]), mean([1]).of_totals)
    assert interval(only, 0).low == interval(only, 0).high == 1.0
