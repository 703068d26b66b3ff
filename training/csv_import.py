"""A table of questions and answers (CSV, TSV) as chat JSONL, with an evaluation set put aside before anything else."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from training.data import Example, likely_encoding
from training.errors import DataInvalid

MAX_FIELD_CHARS = 1024 * 1024
_NAMED = 20  # lines in one message
UTF8 = "utf-8-sig"  # with a byte order mark or without


@dataclass(frozen=True)
class Wording:
    """How a row becomes a conversation."""

    question: str  # a column's name, or a text with columns in braces: "Text: {text}"
    answer: str  # a column's name
    system: str | None = None  # the same in every conversation


def read_table(path: Path, wording: Wording, delimiter: str | None = None, encoding: str = UTF8) -> tuple[Example, ...]:
    """The examples of a table whose first row names the columns; rows with nothing in any field are left out.

    `delimiter` None splits a `.tsv` at tabs, anything else at commas. Raises `DataInvalid`, naming line and column:
    another encoding, a column that is not there, a row with too many or too few fields, and all rows whose question or
    answer is empty.
    """
    data = path.read_bytes()
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == UTF8 else encoding
        hint = f"say what it is in, --encoding {likely_encoding(data)}"
        raise DataInvalid(f"{path} is not {name} (byte {error.start}): {hint}") from error
    except LookupError as error:
        raise DataInvalid(f"no text encoding is called {encoding!r}") from error
    csv.field_size_limit(MAX_FIELD_CHARS)
    split_at = delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=split_at, strict=True)
    examples: list[Example] = []
    empty: list[int] = []
    try:
        columns = next(rows, [])
        if len(set(columns)) < len(columns):
            raise DataInvalid(f"{path}: two columns have one name")
        parts = _parts(wording.question, columns, path)
        if wording.answer not in columns:
            raise _no_column(wording.answer, columns, path)
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if not any(field.strip() for field in row):
                continue
            if len(row) != len(columns):
                raise DataInvalid(f"{where}: {len(row)} fields, the first row has {len(columns)}")
            example = _example(dict(zip(columns, row, strict=True)), parts, wording)
            if example is None:
                empty.append(rows.line_num)
            else:
                examples.append(example)
    except csv.Error as error:
        raise DataInvalid(f"{path}, line {rows.line_num}: {error}") from error
    if empty:
        named = ", ".join(map(str, empty[:_NAMED])) + (
            f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        )
        raise DataInvalid(f"{path}, line {named}: an empty question or answer; fill the rows in or take them out")
    if not examples:
        raise DataInvalid(f"{path} holds no rows")
    return tuple(examples)


def _no_column(name: str, columns: list[str], path: Path) -> DataInvalid:
    other = next((mark for mark in ";\t|" if len(columns) == 1 and mark in columns[0]), None)
    hint = f" (fields between {other!r} need --delimiter)" if other is not None else ""
    return DataInvalid(f"{path} has no column {name!r}; it has: {', '.join(columns)}{hint}")


def _parts(question: str, columns: list[str], path: Path) -> list[tuple[str, str | None]]:
    """The question as (text, the column whose value follows it)."""
    if question in columns:
        return [("", question)]
    try:
        parsed = list(Formatter().parse(question))
    except ValueError as error:
        raise DataInvalid(f"the question {question!r}: {error}") from error
    asked = [name for _, name, _, _ in parsed if name is not None]
    missing = [name for name in asked if name not in columns]
    if missing or not asked:
        raise _no_column((missing or [question])[0], columns, path)
    if any(spec or conversion for _, _, spec, conversion in parsed):
        raise DataInvalid(f"the question {question!r} may hold column names in braces and nothing more")
    return [(text, name) for text, name, _, _ in parsed]


def _example(row: Mapping[str, str], parts: list[tuple[str, str | None]], wording: Wording) -> Example | None:
    """None where the question or the answer would be empty."""
    question = "".join(text + (row[name] if name is not None else "") for text, name in parts)
    if not question.strip() or not row[wording.answer].strip():
        return None
    return Example.of(user=question.strip(), answer=row[wording.answer].strip(), system=wording.system)
