"""Detokenizing one token at a time, and stop strings across tokens."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from server.config import ModelConfig
from server.errors import InvalidRequest
from server.model.base import load_base
from server.model.text import StopScanner, Text, longest_token


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


@pytest.fixture(scope="module")
def fallback() -> Text:
    """A tokenizer as Llama 2's: ids 3 to 258 are the bytes, then "▁", "a", "b" and "▁a"."""
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return Text(SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(generation_config=None)))  # type: ignore[arg-type]


def as_bytes(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


@pytest.mark.parametrize(
    ("ids", "pieces", "rest"),
    [
        ([260, *as_bytes("\n"), 3 + 0xE2, 261, 260], ["a", "\n", "", "\ufffdb", "a"], ""),
        ([260, *as_bytes("é"), 3 + 0xE2, 261, *as_bytes("é")], ["a", "", "é", "", "\ufffd\ufffdb", "", "é"], ""),
        ([*as_bytes("é"), 3 + 0xE2, 259, 262], ["", "é", "", "\ufffd\ufffd ", " a"], ""),
        ([*as_bytes("A"), 3 + 0xC3, 260, *as_bytes("A"), 3 + 0xC3], ["A", "", "\ufffda", "A", ""], "\ufffd"),
    ],
)
def test_half_a_character_after_a_whole_one_takes_nothing_back(
    fallback: Text, ids: list[int], pieces: list[str], rest: str
) -> None:
    """Decoded as a whole, the run of bytes is U+FFFD for each of them, those of the whole character too."""
    stream = fallback.stream()
    assert [stream.push(token) for token in ids] == pieces
    assert stream.flush() == rest


def test_the_pieces_of_any_bytes_make_the_whole_where_it_is_sound(fallback: Text) -> None:
    rng = random.Random(0)
    parts = [[260], [261], [262], [259], [1], *map(as_bytes, ("\n", "A", "é", "世", "🌍"))]
    sound = 0
    for _ in range(3000):
        ids = [token for part in rng.choices(parts, k=rng.randrange(12)) for token in part]
        for _ in range(rng.choice([0, 0, 1, 2])):
            ids.insert(rng.randint(0, len(ids)), rng.randrange(263))
        stream = fallback.stream()
        told = "".join([stream.push(token) for token in ids]) + stream.flush()
        whole = fallback.decode(ids)
        if "\ufffd" not in whole:
            sound += 1
            assert told == whole, ids
    assert 1000 < sound < 2500


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


def test_a_stop_string_counts_by_where_it_ends() -> None:
    rng = random.Random(0)
    met = 0
    for _ in range(2000):
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(2)]
        pieces = ["".join(rng.choices("ab", k=rng.randrange(3))) for _ in range(8)]
        counts_from = rng.randrange(9)
        scanner, shown, stopped, ended, before = StopScanner(stops), "", False, False, ""
        for index, piece in enumerate(pieces):
            told, stopped = scanner.push(piece, index >= counts_from)
            shown, whole = shown + told, before + piece
            ends = [whole.find(stop, max(0, len(before) - len(stop) + 1)) for stop in stops]
            ended = index >= counts_from and max(ends) >= 0
            assert stopped == ended, (stops, pieces, counts_from)
            if ended:
                assert shown == whole[: min(at for at in ends if at >= 0)]
                met += 1
                break
            assert whole.startswith(shown)
            before = whole
        if not ended:
            assert shown + scanner.flush() == before
    assert 500 < met < 1900


def test_what_was_held_back_comes_out_at_the_end() -> None:
    scanner = StopScanner(["stop"])
    assert scanner.push("a sto") == ("a ", False)
    assert scanner.flush() == "sto"


def byte_level(*first: Any, normalizer: Any = None, added: AddedToken | None = None) -> Tokenizer:
    """A small BPE, of words and of long runs."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = ["the cat sat on the mat, " * 3, " " * 40, "#" * 30, "Grüße à tous"]
    made.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    if added is not None:
        made.add_special_tokens([added])
    return made


def told(tokenizer: Tokenizer) -> int | None:
    return longest_token(json.loads(tokenizer.to_str()))


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(),
        byte_level(pre_tokenizers.Digits(individual_digits=True)),
        byte_level(pre_tokenizers.Split(" ", "isolated")),
        byte_level(normalizer=normalizers.NFC()),
        byte_level(added=AddedToken("<|a_long_special_token_indeed|>", special=True)),
    ],
    ids=["plain", "digits", "split", "nfc", "special"],
)
def test_no_text_has_fewer_tokens_than_its_length_says(tokenizer: Tokenizer) -> None:
    most = told(tokenizer)
    assert most is not None and most >= 16
    rng = random.Random()
    pieces = [" " * 40, "#" * 30, "the cat", "<|a_long_special_token_indeed|>", "\u1100\u1161\u11a8", "é", "🌍", "\n"]
    pieces.append("\u03b1\u0313\u0301\u0345")  # four characters that NFC makes one
    for _ in range(200):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 30))) * rng.randrange(1, 4)
        assert len(tokenizer.encode(text).ids) * most >= len(text)
    for piece in pieces:
        assert len(tokenizer.encode(piece * 50).ids) * most >= len(piece * 50)


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(pre_tokenizers.Split(" ", "removed")),
        byte_level(normalizer=normalizers.Strip()),
        byte_level(added=AddedToken("<mask>", lstrip=True)),
        Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
        Tokenizer(models.BPE()),
    ],
    ids=["dropped spaces", "strip", "lstrip", "wordpiece", "no bytes"],
)
def test_where_characters_may_vanish_there_is_no_telling(tokenizer: Tokenizer) -> None:
    assert told(tokenizer) is None


def test_the_served_tokenizer_tells(text: Text) -> None:
    most = text.longest_token
    assert most is not None
    sample = "".join(chr(random.randrange(32, 0x2FF)) for _ in range(1000))
    assert len(text.encode(sample)) * most >= len(sample)
