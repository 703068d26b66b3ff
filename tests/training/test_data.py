from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import Example, Message, read_jsonl, write_jsonl
from training.errors import DataInvalid, DataTooSmall
from training.hold_out import hold_out

texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)


def test_what_is_written_is_read_back_with_the_same_digest(tmp_path: Path) -> None:
    examples = (
        Example.of(user="naïve\nquestion", answer="réponse", gold={"service": "s3"}),
        Example((Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))),
    )
    digest = write_jsonl(tmp_path / "a.jsonl", examples)
    read = read_jsonl(tmp_path / "a.jsonl")
    assert read.examples == examples
    assert read.digest == digest
    assert write_jsonl(tmp_path / "b.jsonl", read.examples) == digest


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON \\(Expecting property name enclosed in double quotes, column 2\\)"),
        ("[]", "one conversation a line"),
        ('{"instruction": "add", "output": "2"}', '"messages", as in'),
        ('{"messages": "hello"}', "messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "end with an answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "end with an answer"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}', "empty"),
        ('{"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}', "role"),
        ('{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}', "content"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "gold": 1}', "gold"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    good = Example.of(user="q", answer="a").as_line()
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(DataInvalid, match=rf"line 3: .*{says}"):
        read_jsonl(path)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    example = Example.of(user="q", answer="a")
    (path := tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + example.as_line().encode() + b"\n")
    assert read_jsonl(path).examples == (example,)


@pytest.mark.parametrize(("encoding", "named"), [("utf-16", "utf-16"), ("cp1252", "cp1252")])
def test_another_encoding_is_refused_with_what_to_do(tmp_path: Path, encoding: str, named: str) -> None:
    (path := tmp_path / "other.jsonl").write_bytes(Example.of(user="très", answer="a").as_line().encode(encoding))
    with pytest.raises(DataInvalid, match=f"iconv -f {named} -t UTF-8"):
        read_jsonl(path)


def test_half_a_character_is_refused_by_its_line(tmp_path: Path) -> None:
    path, whole = tmp_path / "half.jsonl", Example.of(user="q 👍", answer="a")
    lines = [json.dumps(json.loads(whole.as_line()))]
    path.write_text(lines[0] + "\n")
    assert "\\ud83d" in lines[0] and read_jsonl(path).examples == (whole,)
    for wrong in (lines[0].replace("\\udc4d", ""), lines[0][:-1] + ', "gold": {"a": "\\uD83D"}}'):
        path.write_text(lines[0] + "\n" + wrong + "\n")
        with pytest.raises(DataInvalid, match=r"line 2: \\ud83d is half of a character"):
            read_jsonl(path)


def test_files_that_are_no_text_or_empty_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_bytes(b"\n\n")
    for name, says in (("binary", "UTF-8"), ("empty", "no examples"), ("absent", "cannot read")):
        with pytest.raises(DataInvalid, match=says):
            read_jsonl(tmp_path / name)


@settings(deadline=None)  # a busy machine is no fault
@given(
    prompts=st.lists(texts, min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.5),
    seed=st.integers(0, 5),
)
def test_no_prompt_is_on_both_sides_of_the_hold_out(prompts: list[str], fraction: float, seed: int) -> None:
    examples = [Example.of(user=prompt, answer=str(number)) for number, prompt in enumerate(prompts)]
    if len(set(prompts)) == 1:
        with pytest.raises(DataTooSmall):
            hold_out(examples, fraction, seed)
        return
    training, validation = hold_out(examples, fraction, seed)
    assert sorted(e.answer for e in (*training, *validation)) == sorted(e.answer for e in examples)
    assert training and validation
    assert not {e.prompt for e in training} & {e.prompt for e in validation}
    wanted = max(1, round(len(prompts) * fraction))
    repeats = Counter(prompts).values()
    assert len(validation) <= max(wanted, min(repeats))
    assert len(validation) == wanted or len(set(prompts)) < len(prompts)
    assert hold_out(examples, fraction, seed) == (training, validation)


@pytest.mark.parametrize("fraction", [0.05, 0.1])
def test_a_question_asked_in_most_rows_is_not_put_aside(fraction: float) -> None:
    same = [Example.of(user="the same", answer=str(n)) for n in range(90)]
    examples = [*same, *(Example.of(user=f"q{n}", answer="a") for n in range(10))]
    for seed in range(8):
        training, validation = hold_out(examples, fraction, seed)
        assert len(validation) == round(100 * fraction) and all(one in training for one in same)
    twice = [Example.of(user=f"q{n // 2}", answer=str(n)) for n in range(6)]
    assert len(hold_out(twice, 0.1, 0)[1]) == 2  # one is wanted, and no question stands alone


def test_chats_that_share_a_question_are_on_one_side() -> None:
    def chat(*texts: str) -> Example:
        return Example(tuple(Message(("user", "assistant")[at % 2], text) for at, text in enumerate(texts)))

    examples = [chat(f"Q{n}", f"A{n}") for n in range(40)]
    examples += [chat(f"Q{n}", f"A{n}", f"Thanks {n}.", "Welcome.") for n in range(20)]
    examples += [chat(f"Q{n}", "Another answer.", "Thanks.", "Welcome.") for n in range(10, 20)]
    for seed in range(8):
        training, validation = hold_out(examples, 0.1, seed)
        first = [{e.messages[0].content for e in side} for side in (training, validation)]
        assert len(validation) == 7 and not first[0] & first[1]
    greeted = [chat("Hi", "Hello.", f"Q{n}", f"A{n}") for n in range(20)]
    assert len(hold_out(greeted, 0.1, 0)[1]) == 2


def test_single_questions_are_split_as_ever() -> None:
    """What was trained before is told by a digest of its data; the split is the seed's and the prompts'."""
    examples = [Example.of(system="Do it.", user=f"question {n}", answer="a") for n in range(40)]
    _, validation = hold_out(examples, 0.1, 3)
    assert [e.prompt[1].content for e in validation] == ["question 0", "question 22", "question 35", "question 37"]


def test_the_hold_out_depends_on_the_seed_and_nothing_else(conversations: tuple[Example, ...]) -> None:
    _, first = hold_out(conversations, 0.3, 0)
    _, reordered = hold_out(conversations[::-1], 0.3, 0)
    _, other = hold_out(conversations, 0.3, 1)
    assert len(first) == 6
    assert {e.prompt for e in first} == {e.prompt for e in reordered}
    assert {e.prompt for e in first} != {e.prompt for e in other}
    assert hold_out(conversations, 0, 0) == (conversations, ())
