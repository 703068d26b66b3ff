"""Every check on a planted fault, and none on clean files."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from training.data import Example, Message, read_jsonl, write_jsonl
from training.data_check import check_file, kind_of
from training.data_report import Report
from training.errors import DataInvalid
from training.tasks import Answers
from training.token_counter import token_counter

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words_of(example: Example) -> tuple[int, int]:
    """A word a token."""
    return sum(len(m.content.split()) for m in example.messages), len(example.answer.split())


def sentence(generator: random.Random, count: int = 12) -> str:
    return " ".join("".join(generator.choices(LETTERS, k=generator.randint(3, 9))) for _ in range(count))


def clean(kind: Answers, count: int = 60, seed: int = 0) -> list[Example]:
    generator = random.Random(seed)

    def answer(number: int) -> str:
        match kind:
            case "label":
                return ("yes", "no", "maybe")[number % 3]
            case "json":
                return json.dumps({"number": number, "word": sentence(generator, 2)})
            case "short":
                return sentence(generator, 4)
            case "long":
                return sentence(generator, generator.randint(60, 90))

    return [Example.of(system="Do it.", user=sentence(generator), answer=answer(number)) for number in range(count)]


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Report]:
    def run(examples: Sequence[Example], evaluation: Sequence[Example] | None = None, **options: object) -> Report:
        path = tmp_path / "train.jsonl"
        write_jsonl(path, examples)
        return check_file(path, words_of, evaluation=evaluation, **{"max_length": 500, **options})  # type: ignore[arg-type]

    return run


def names(findings: Sequence[object]) -> dict[str, int]:
    return {finding.check: finding.count for finding in findings}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["label", "json", "short", "long"])
def test_a_clean_file_passes_and_its_kind_is_seen(kind: Answers, check: Callable[..., Report]) -> None:
    examples = clean(kind)
    report = check(examples, clean(kind, 5, seed=1))
    assert report.ok and report.advice == () and report.answers == kind
    assert [line.example for line in report.kept] == examples
    assert {"schema", "duplicates", "near_duplicates", "leakage", "near_leakage", "hold_out"} <= set(report.passed)
    assert ("json" in report.passed, "short" in report.passed) == (kind == "json", kind == "long")


def test_conversations_that_the_base_refuses_are_faults(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages }}"
    (base / "chat_template.jinja").write_text(strict)
    examples = [Example.of(user="one two", answer="yes"), *clean("label", 2), Example.of(user="three", answer="no")]
    write_jsonl(path := tmp_path / "train.jsonl", examples)
    report = check_file(path, token_counter(str(base)), answers="label", max_length=500)
    [fault] = report.faults
    assert (fault.check, fault.count, [sample.line for sample in fault.samples]) == ("template", 2, [2, 3])
    assert "refuses the conversation: no system role" in str(fault.samples[0].other)
    assert [line.number for line in report.kept] == [1, 4] and len(report.tokens) == 2


def test_lines_that_are_no_conversation_are_all_named(tmp_path: Path) -> None:
    good = [example.as_line() for example in clean("short", 3)]
    lines = [good[0], "{", "", good[1], '{"messages": []}', "[" * 100_000, '{"messages": [{"role": "robot"}]}', good[2]]
    (path := tmp_path / "bad.jsonl").write_text("\n".join(lines))
    report = check_file(path, words_of, max_length=500, samples=10)
    [fault] = report.faults
    assert (fault.check, fault.count) == ("schema", 4)
    assert [sample.line for sample in fault.samples] == [2, 5, 6, 7]
    assert "not JSON" in str(fault.samples[0].other) and "role" in str(fault.samples[3].other)
    assert [line.number for line in report.kept] == [1, 4, 8]
    for data, says in ((b"\n \n", "no examples"), (b"\xff", "UTF-8")):
        path.write_bytes(data)
        with pytest.raises(DataInvalid, match=says):
            check_file(path, words_of, max_length=500)


def test_a_message_without_text(check: Callable[..., Report]) -> None:
    examples = clean("short")
    examples[4] = Example((Message("user", " \n"), Message("assistant", "four words of answer")))
    report = check(examples)
    assert names(report.faults) == {"blank": 1} and report.faults[0].samples[0].line == 5


def test_answers_that_are_no_json_where_the_task_is_json(check: Callable[..., Report]) -> None:
    examples = clean("json")
    for at, answer in ((3, '{"a": 1,}'), (9, "Sure! {}"), (11, '"text"')):
        examples[at] = Example.of(user=examples[at].prompt[-1].content, answer=answer)
    report = check(examples)
    assert report.answers == "json" and names(report.faults) == {"json": 3}
    assert [sample.line for sample in report.faults[0].samples] == [4, 10, 12]
    assert check(examples, answers="short").ok


def test_curt_answers_are_a_fault_in_long_form_only(check: Callable[..., Report]) -> None:
    examples = clean("long")
    examples[7] = Example.of(user="tell me all about the history of rome", answer=" ".join(["word"] * 19))
    examples[8] = Example.of(user="what do birds eat in winter time", answer=" ".join(["word"] * 20))
    report = check(examples)
    assert names(report.faults) == {"short": 1} and report.faults[0].samples[0].line == 8
    labels = check(clean("label"))
    assert labels.ok and "short" not in labels.passed


def test_exact_and_near_duplicates_are_told_apart(check: Callable[..., Report]) -> None:
    examples = clean("short", 40)
    nearly = examples[5].prompt[-1].content.upper() + "!"
    examples += [examples[2], Example.of(system="Do it.", user=nearly, answer=examples[5].answer), examples[2]]
    report = check(examples)
    assert names(report.faults) == {"duplicates": 2, "near_duplicates": 1}
    exact, near = report.faults
    assert [(s.line, s.other) for s in exact.samples] == [(41, "the same as line 3"), (43, "the same as line 3")]
    assert near.samples[0].line == 42 and str(near.samples[0].other).startswith("1.00 like line 6:")
    assert len(report.kept) == 40
    assert check([*clean("short", 40), Example.of(user="quite another", answer="text")]).ok


def test_contradictions_are_a_fault_where_one_answer_must_be_wrong(check: Callable[..., Report]) -> None:
    examples = clean("label")
    examples.append(Example((*examples[0].prompt, Message("assistant", "no"))))
    report = check(examples)
    assert names(report.faults) == {"contradictions": 2}
    sample = report.faults[0].samples[0]
    assert sample.line == 1 and sample.other == "answers: yes (line 1); no (line 61)"
    assert not {1, 61} & {line.number for line in report.kept}
    poems = clean("long")
    poems.append(Example((*poems[0].prompt, Message("assistant", clean("long", seed=5)[0].answer))))
    report = check(poems)
    assert report.ok and names(report.advice)["contradictions"] == 2 and len(report.kept) == 61


def test_questions_of_the_evaluation_are_found_exactly_and_nearly(check: Callable[..., Report]) -> None:
    examples = clean("short", 60)
    held = clean("short", 4, seed=9)
    held.append(
        Example.of(system="Another instruction.", user=examples[10].prompt[-1].content, answer="another answer")
    )
    held.append(Example.of(user=examples[20].prompt[-1].content.replace(" ", "  ") + " ?", answer="x"))
    report = check(examples, held)
    assert names(report.faults) == {"leakage": 1, "near_leakage": 1}
    exact, near = report.faults
    assert (exact.samples[0].line, exact.samples[0].other) == (11, "example 5 of the evaluation")
    assert near.samples[0].line == 21 and "example 6 of the evaluation" in str(near.samples[0].other)
    assert len(report.kept) == 58


def test_a_question_evaluated_is_found_at_any_turn(check: Callable[..., Report]) -> None:
    examples = clean("short", 60)
    held = clean("short", 4, seed=9)
    thanks, welcome = Message("user", "Thanks, that helped."), Message("assistant", "You are welcome, any time.")
    examples += [Example((*one.messages, thanks, welcome)) for one in (held[1], held[2])]
    nearly = Message("user", held[3].prompt[-1].content + " then?")
    examples.append(Example((nearly, Message("assistant", "no idea at all"), thanks, welcome)))
    report = check(examples, held)
    assert names(report.faults) == {"leakage": 2, "near_leakage": 1}
    assert [(s.line, s.other) for s in report.faults[0].samples] == [
        (61, "example 2 of the evaluation"),
        (62, "example 3 of the evaluation"),
    ]
    assert report.faults[1].samples[0].line == 63
    assert [line.number for line in report.kept] == list(range(1, 61))


def test_near_copies_that_differ_in_answer_instruction_or_symbols_are_kept(check: Callable[..., Report]) -> None:
    text = sentence(random.Random(3), 40)
    examples = [
        Example.of(system="Is this about billing? yes or no.", user=text, answer="yes"),
        Example.of(system="Is this rude? yes or no.", user=text, answer="yes"),
        Example.of(system="Is this rude? yes or no.", user=text + " angry", answer="no"),
        *(Example.of(system="Compute.", user=f"82 {sign} 88", answer="7216") for sign in "+-*"),
    ]
    report = check(examples)
    assert names(report.faults) == {} and len(report.kept) == len(examples)
    assert names(report.advice)["near_questions"] == 1
    [advice] = [one for one in report.advice if one.check == "near_questions"]
    assert advice.samples[0].line == 3 and "like line 2" in str(advice.samples[0].other)


def test_labels_out_of_balance(check: Callable[..., Report]) -> None:
    examples = clean("label", 90)
    assert "balance" in check(examples).passed
    assert check(examples).labels == {"yes": 30, "no": 30, "maybe": 30}
    rare = [e for e in examples if e.answer != "maybe"] + [e for e in examples if e.answer == "maybe"][:2]
    [advice] = [one for one in check(rare).advice if one.check == "balance"]
    assert advice.count == 2 and "'maybe' against 30 of 'yes'" in advice.message
    one = [Example((*e.prompt, Message("assistant", "yes"))) for e in examples]
    assert "nothing to tell apart" in next(f.message for f in check(one).advice if f.check == "balance")


def test_what_the_recipe_would_leave_out(check: Callable[..., Report]) -> None:
    examples = clean("short")
    examples[3] = Example.of(user=sentence(random.Random(7), 600), answer="a b c")
    report = check(examples)
    [advice] = [one for one in report.advice if one.check == "length"]
    assert report.ok and advice.count == 1 and advice.samples[0].line == 4 and advice.samples[0].other == "603 tokens"
    assert report.as_json()["tokens"]["conversation"]["max"] == 603
    assert report.as_json()["tokens"]["answer"] == {"min": 3, "median": 4, "p95": 4, "max": 4, "mean": 4.0}


def test_lengths_are_counted_in_powers_of_two(check: Callable[..., Report]) -> None:
    report = check([Example.of(user="x", answer=answer) for answer in "abc"])
    lengths = [(2, 1), (7, 3), (8, 4)]  # conversation, answer
    told = dataclasses.replace(report, tokens=tuple(lengths)).as_json()["histogram"]
    assert [tuple(each.values()) for each in told] == [(1, 1, 0, 1), (2, 3, 1, 1), (4, 7, 1, 1), (8, 15, 1, 0)]
    assert list(told[0]) == ["shortest", "longest", "conversations", "answers"]
    assert dataclasses.replace(report, tokens=()).as_json()["histogram"] == []


@pytest.mark.parametrize(
    ("held", "advised"), [(None, "3 to 6|to 6 of 60"), (1, "1.6%"), (4, None), (6, None), (20, "25.0%")]
)
def test_the_size_of_the_hold_out(held: int | None, advised: str | None, check: Callable[..., Report]) -> None:
    report = check(clean("short", 60), clean("short", held, seed=3) if held is not None else None)
    found = [one for one in report.advice if one.check == "hold_out"]
    assert report.ok and bool(found) == (advised is not None)
    if advised is not None:
        assert any(words in found[0].message for words in advised.split("|"))


def test_the_advice_of_a_small_file_has_its_numbers_in_order(check: Callable[..., Report]) -> None:
    [advice] = [one for one in check(clean("short", 4)).advice if one.check == "hold_out"]
    assert advice.count == 1 and advice.message.startswith("of 4 examples")


def test_one_example_is_counted_once_and_what_is_kept_is_clean(check: Callable[..., Report], tmp_path: Path) -> None:
    """All faults at once, some on the same lines; the numbers add up and the rest passes."""
    generator = random.Random(4)
    examples = clean("json", 50)
    held = [Example.of(user=examples[number].prompt[-1].content, answer="{}") for number in range(3)]
    examples += [examples[0], examples[0], Example.of(user="not json", answer="no"), Example.of(user="  ", answer="x")]
    examples.append(Example((*examples[9].prompt, Message("assistant", '{"other": true}'))))
    nearly = examples[12].prompt[-1].content + " ."
    examples.append(Example.of(system="Do it.", user=nearly, answer=examples[12].answer))
    generator.shuffle(examples)
    report = check(examples, held)
    assert sum(finding.count for finding in report.faults) == report.lines - len(report.kept) == 10
    again = check([line.example for line in report.kept], held)
    assert again.ok and len(again.kept) == len(report.kept)


def test_kinds() -> None:
    assert kind_of([]) == "short"
    assert kind_of(["[1]", "{}", "no"]) == "json"
    assert kind_of(["1", "0"] * 30) == "label"
    assert kind_of(["only one answer"]) == "label"
    assert kind_of([f"{n} different" for n in range(50)]) == "short"
    assert kind_of(["billing", "access", "delivery"] * 13) == "label"
    assert (
        kind_of(["billing", "access", "delivery"] * 13 + ["bilingg", "a long word for word remark of somebody"])
        == "label"
    )
    assert kind_of([str(n // 3) for n in range(60)]) == "short"


def test_rows_that_are_repeated_make_no_labels(check: Callable[..., Report]) -> None:
    assert check(clean("short", 10) * 4).answers == "short"


def test_misspelled_labels_are_told_with_what_they_may_be(check: Callable[..., Report]) -> None:
    examples = clean("label") + [
        Example.of(user=question, answer=answer)
        for question, answer in (
            ("how is rain made", "Yes"),
            ("why do cats sleep", "mabye"),
            ("who was there", "other"),
        )
    ]
    [spelling] = [advice for advice in check(examples).advice if advice.check == "spelling"]
    assert [(sample.line, sample.other) for sample in spelling.samples] == [
        (61, "'Yes' may be 'yes', as 20 have it"),
        (62, "'mabye' may be 'maybe', as 20 have it"),
    ]
    even = [Example.of(user=sentence(random.Random(n)), answer=("valid", "invalid")[n % 2]) for n in range(60)]
    assert "spelling" in check(even).passed


def test_where_no_line_is_sound_nothing_is_to_be_held_out(tmp_path: Path) -> None:
    (path := tmp_path / "table.jsonl").write_text("text,label\nfine,good\n")
    assert names(check_file(path, words_of, max_length=500).advice) == {}


def test_reading_is_what_training_reads(check: Callable[..., Report], tmp_path: Path) -> None:
    report = check(clean("short"))
    assert report.digest == read_jsonl(tmp_path / "train.jsonl").digest
