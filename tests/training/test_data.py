from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import Example, Message, hold_out, read_jsonl, write_jsonl
from training.errors import DataInvalid, DataTooSmall

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
        ("{", "not JSON"),
        ("[]", "messages"),
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
    assert hold_out(examples, fraction, seed) == (training, validation)


def test_the_hold_out_depends_on_the_seed_and_nothing_else(conversations: tuple[Example, ...]) -> None:
    _, first = hold_out(conversations, 0.3, 0)
    _, reordered = hold_out(conversations[::-1], 0.3, 0)
    _, other = hold_out(conversations, 0.3, 1)
    assert len(first) == 6
    assert {e.prompt for e in first} == {e.prompt for e in reordered}
    assert {e.prompt for e in first} != {e.prompt for e in other}
    assert hold_out(conversations, 0, 0) == (conversations, ())
