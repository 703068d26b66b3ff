"""Facts that a pusher states beside what training recorded: data sets and metrics of trainers that record none."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hub import json_text
from hub.errors import FactsMalformed, HubError, QueryInvalid
from hub.facts import FACTS_FILE, MAX_FACTS_BYTES, Facts
from hub.search import METRIC_NAME, metric_numbers, parse_bound


def dataset_facts(file: Path) -> dict[str, Any]:
    """What a version tells of a data set: {"file", "digest", "bytes"} and, of JSON Lines, "examples".

    Raises FactsMalformed where the file cannot be read.
    """
    try:
        with file.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
            facts: dict[str, Any] = {"file": file.name, "digest": f"sha256:{digest}", "bytes": data.tell()}
            if file.suffix == ".jsonl":
                data.seek(0)
                facts["examples"] = sum(1 for line in data if line.strip())
    except OSError as error:
        raise FactsMalformed(f"the data set {file} cannot be read: {error.strerror}") from error
    return facts


def metric_facts(stated: Sequence[str]) -> dict[str, Any]:
    """The metrics in "NAME=NUMBER" and in files that hold a JSON object; raises FactsMalformed.

    What is a file's name is taken for one, whatever is in it.
    """
    metrics: dict[str, Any] = {}
    for text in stated:
        name, equals, number = text.partition("=")
        if equals and name and not os.path.isfile(text):  # noqa: PTH113 - a name too long is no file's
            _put(metrics, name, _number(name, number))
            continue
        try:
            found = json_text.parse_object(Path(text).read_bytes(), max_bytes=MAX_FACTS_BYTES)
        except OSError as error:
            raise FactsMalformed(f"{text} is neither NAME=NUMBER nor a file of metrics: {error.strerror}") from error
        except ValueError as error:
            raise FactsMalformed(f"{text} {error}") from error
        for key, value in found.items():
            _put(metrics, key, value)
    return metrics


@contextlib.contextmanager
def directory_with(directory: Path, datasets: Sequence[Path], metrics: Mapping[str, Any]) -> Iterator[Path]:
    """A directory with the files of `directory`, whose loraplex.json says this too, while inside; the original stays as
    it is.

    Raises FactsMalformed, also where a metric is recorded with another value. Errors from inside tell of the original.
    """
    if not datasets and not metrics:
        yield directory
        return
    recorded = directory / FACTS_FILE
    if recorded.is_symlink() or (recorded.exists() and not recorded.is_file()):
        yield directory  # refused as what it is by whoever reads it
        return
    facts = Facts.parse(recorded.read_bytes()) if recorded.exists() else Facts()
    merged = dict(facts.metrics)
    for name, value in metrics.items():
        _put(merged, name, value)
    known = facts.datasets if isinstance(facts.datasets, list) else [facts.datasets] if facts.datasets else []
    all_sets = [*known, *(dataset_facts(file) for file in datasets)]
    with _beside(directory) as copy:
        for entry in directory.iterdir():
            if entry.name != FACTS_FILE:
                _link(entry, copy / entry.name)
        replace(facts, metrics=merged, datasets=all_sets[0] if len(all_sets) == 1 else all_sets or {}).write(copy)
        try:
            yield copy
        except HubError as error:
            raise type(error)(str(error).replace(str(copy), str(directory))) from error


def _put(metrics: dict[str, Any], name: str, value: Any) -> None:
    """Add a metric; raises FactsMalformed where it is there with another value, as itself or within an object."""
    if name in metrics and metrics[name] != value:
        raise FactsMalformed(f"the metric {name} is {metrics[name]} and {value}; say which")
    known = dict(metric_numbers(metrics))
    for each, number in metric_numbers({name: value}):
        if known.get(each, number) != number:
            raise FactsMalformed(f"the metric {each} is {known[each]:g} and {number:g}; say which")
    metrics[name] = value


def _number(name: str, text: str) -> float:
    if not METRIC_NAME.fullmatch(name):
        raise FactsMalformed(
            f"{name[:80]!a} is no metric's name, as no search or gate could ask for it: write at most 128 of "
            "A-Z a-z 0-9 _ . : / @ -"
        )
    try:
        return parse_bound(text)
    except QueryInvalid as error:
        raise FactsMalformed(f"the metric {name} is no number: {text!a}") from error


@contextlib.contextmanager
def _beside(directory: Path) -> Iterator[Path]:
    """An empty directory on the same disk if that can be, so that files need not be copied."""
    try:
        made = tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.resolve().parent)
    except OSError:
        made = tempfile.mkdtemp(prefix="loraplex-push-")
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _link(entry: Path, target: Path) -> None:
    """The same file, link or directory under another name: what is no plain file is refused later, as it is."""
    if entry.is_symlink():
        target.symlink_to(entry.readlink())
    elif entry.is_dir():
        target.mkdir()
    elif entry.is_file():
        try:
            os.link(entry, target)
        except OSError:
            shutil.copyfile(entry, target)
    else:
        os.mkfifo(target)
