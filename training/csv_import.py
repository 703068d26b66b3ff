"""A table of questions and answers (CSV, TSV) as chat JSONL, with an evaluation set put aside before anything else."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from training.data import Example
from training.errors import DataInvalid

MAX_FIELD_CHARS = 1024 * 1024
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
    another encoding, a column that is not there, a row with too many or too few fields, an empty question or answer.
    """
    try:
        text = path.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == UTF8 else encoding
        raise DataInvalid(f"{path} is not {name} (byte {error.start}): say what it is in, --encoding cp1252") from error
    except LookupError as error:
        raise DataInvalid(f"no text encoding is called {encoding!r}") from error
    csv.field_size_limit(MAX_FIELD_CHARS)
    split_at = delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=split_at, strict=True)
    examples: list[Example] = []
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
            examples.append(_example(dict(zip(columns, row, strict=True)), parts, wording, where))
    except csv.Error as error:
        raise DataInvalid(f"{path}, line {rows.line_num}: {error}") from error
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


def _example(row: Mapping[str, str], parts: list[tuple[str, str | None]], wording: Wording, where: str) -> Example:
    question = "".join(text + (row[name] if name is not None else "") for text, name in parts)
    if not question.strip() or not row[wording.answer].strip():
        raise DataInvalid(f"{where}: an empty question or answer")
    return Example.of(user=question.strip(), answer=row[wording.answer].strip(), system=wording.system)
