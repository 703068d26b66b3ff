"""Chat JSONL: the one form in which examples travel.

A line is `{"messages": [{"role": …, "content": …}, …]}`, the last message the assistant's. Lines for evaluation may
carry `"gold": {…}`, whatever the task's scoring needs beyond the answer itself.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.errors import DataInvalid

ROLES = frozenset({"system", "user", "assistant"})

_FORM = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form chat templates read."""
        return {"role": self.role, "content": self.content}


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the answer wanted."""

    messages: Messages  # >= 2; the last one the assistant's
    gold: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> Messages:
        """What the model is shown: everything but the answer."""
        return self.messages[:-1]

    @property
    def questions(self) -> tuple[Messages, ...]:
        """What stands in front of each turn of the assistant's that answers, the prompt last: training teaches all."""
        inner = range(1, len(self.messages) - 1)
        asked = [at for at in inner if self.messages[at - 1].role == "user" and self.messages[at].role == "assistant"]
        return (*(self.messages[:at] for at in asked), self.prompt)

    @property
    def answer(self) -> str:
        """The text wanted."""
        return self.messages[-1].content

    @classmethod
    def of(cls, *, user: str, answer: str, system: str | None = None, gold: Mapping[str, Any] | None = None) -> Example:
        """A single question and its answer, with the instruction in the system message."""
        head = (Message("system", system),) if system is not None else ()
        return cls((*head, Message("user", user), Message("assistant", answer)), gold or {})

    def as_line(self) -> str:
        """The example as one line of JSON, keys in a fixed order, so that equal data has equal digests."""
        row: dict[str, Any] = {"messages": [message.as_dict() for message in self.messages]}
        if self.gold:
            row["gold"] = dict(self.gold)
        return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Dataset:
    """Examples and the SHA-256 of the file they came from."""

    examples: tuple[Example, ...]
    digest: str  # "sha256:<64 hex>" of the JSONL bytes

    def __len__(self) -> int:
        return len(self.examples)


def read_jsonl(path: Path) -> Dataset:
    """Parse a chat JSONL file.

    Raises `DataInvalid`, naming file and line, for anything that is not a conversation ending with an answer.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataInvalid(f"cannot read {path}: {error.strerror}") from error
    lines = decode_lines(data, path)
    examples = tuple(parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
    if not examples:
        raise DataInvalid(f"{path} holds no examples")
    return Dataset(examples, digest_of(data))


def write_jsonl(path: Path, examples: Iterable[Example]) -> str:
    """Write the examples, one a line; returns the file's digest."""
    data = "".join(example.as_line() + "\n" for example in examples).encode()
    path.write_bytes(data)
    return digest_of(data)


def digest_of(data: bytes) -> str:
    """`sha256:<hex>` of the bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def decode_lines(data: bytes, path: Path) -> list[str]:
    """The lines of a file, blank ones too, without a byte order mark. Raises `DataInvalid` when it is no UTF-8."""
    try:
        return data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        again = f"write it anew: iconv -f {likely_encoding(data)} -t UTF-8"
        raise DataInvalid(f"{path} is not UTF-8 (byte {error.start}); {again}") from error


def likely_encoding(data: bytes) -> str:
    """What text that is no UTF-8 is probably in: UTF-16 by its byte order mark, else the Windows of the West."""
    return "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "cp1252"


def parse_line(line: str, where: str) -> Example:
    """One line as a conversation. Raises `DataInvalid`, whose message begins with `where`."""
    if line.lstrip().startswith("["):
        raise DataInvalid(f"{where}: a list; wanted is one conversation a line, as of `jq -c '.[]' LIST.json`")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataInvalid(f"{where}: not JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataInvalid(f"{where}: not JSON ({error})") from error
    if "\\ud" in line.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise DataInvalid(f"{where}: {half} is half of a character, and stands alone") from error
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise DataInvalid(f'{where}: not an object with a list "messages", as in {_FORM}')
    messages = tuple(_parse_message(message, where) for message in row["messages"])
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise DataInvalid(f"{where}: the conversation must end with an answer of the assistant")
    if not messages[-1].content:
        raise DataInvalid(f"{where}: the assistant's answer is empty")
    gold = row.get("gold", {})
    if not isinstance(gold, dict):
        raise DataInvalid(f'{where}: "gold" is not an object')
    return Example(messages, gold)


def _parse_message(message: object, where: str) -> Message:
    match message:
        case {"role": str(role), "content": str(content)} if role in ROLES:
            return Message(role, content)
    raise DataInvalid(f'{where}: a message needs "role" ({", ".join(sorted(ROLES))}) and a text "content"')
