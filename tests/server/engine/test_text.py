"""Detokenizing one token at a time, and stop strings across tokens."""

import random
from pathlib import Path

import pytest

from server.config import ModelConfig
from server.errors import InvalidRequest
from server.model.base import load_base
from server.model.text import StopScanner, Text


@pytest.fixture(scope="module")
def text(tiny_base: Path) -> Text:
    return Text(load_base(ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1)))


@pytest.mark.parametrize("sample", ["plain", "Grüße, 世界 🌍!", "a  b\n\n", ""])
def test_the_pieces_make_the_whole(text: Text, sample: str) -> None:
    stream = text.stream()
    pieces = [stream.push(token) for token in text.encode(sample)]
    assert "".join(pieces) + stream.flush() == sample


def test_half_a_character_waits_and_ends_as_a_replacement(text: Text) -> None:
    stream = text.stream()
    first, *rest = text.encode("é")
    assert rest
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"


def test_chat_template_and_its_refusal(text: Text) -> None:
    ids = text.render_chat([{"role": "user", "content": "hi"}])
    assert ids[-1] == text.encode("<|assistant|>")[0]
    text._tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(InvalidRequest, match="no system here"):
        text.render_chat([{"role": "system", "content": "x"}])


def test_a_stop_string_is_found_however_the_text_is_cut() -> None:
    rng = random.Random()
    for _ in range(300):
        body = "".join(rng.choice("ab#") for _ in range(rng.randrange(12)))
        stop = "".join(rng.choice("ab#") for _ in range(rng.randrange(1, 5)))
        whole = body + stop + "tail"
        scanner, shown, at, stopped = StopScanner([stop, "never-there"]), "", 0, False
        while at < len(whole) and not stopped:
            step = rng.randrange(1, 4)
            piece, stopped = scanner.push(whole[at : at + step])
            shown, at = shown + piece, at + step
        assert stopped
        assert shown == whole[: whole.find(stop)]


def test_what_was_held_back_comes_out_at_the_end() -> None:
    scanner = StopScanner(["stop"])
    assert scanner.push("a sto") == ("a ", False)
    assert scanner.flush() == "sto"
