"""Marks become examples: which ones, with which answer, and the way from a served request to a plan's train_file."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from hub.errors import RefInvalid
from hub.hub import Hub
from server.adapters.directory import hub_fetch
from server.client import Client
from server.config import MIB, EngineLimits, FeedbackConfig, ModelConfig
from server.engine.request import AdapterUse, FinishReason
from server.feedback.mark import Mark, parse_mark
from server.feedback.store import FeedbackStore
from tests.server.api.fakes import QUIET, RunningServer
from training.cli_continual import continual
from training.cli_data import data
from training.continual.collect import AnsweredBy, collect, example
from training.continual.plan import ContinualPlan
from training.continual.tasks import prepare_data
from training.data import Message, read_jsonl, write_jsonl

DIGEST = "sha256:" + "a" * 64
PLAIN = Mark(
    marked="2026-11-28T10:00:01.000000Z",
    answered="2026-11-28T10:00:00.000000Z",
    answer_id="0",
    index=0,
    tenant="blue",
    request_id="r",
    prompt=(("system", "Judge."), ("user", "A charming film.")),
    answer="positive",
    finish=FinishReason.STOP,
    base="tiny",
    adapters=(AdapterUse(DIGEST, "team/a@3"),),
    rating="good",
    correction=None,
    comment="",
)


def mark(number: int, **changes: Any) -> Mark:
    answered = f"2026-11-{number % 28 + 1:02}T10:00:00.000000Z"
    return replace(PLAIN, answer_id=str(number), answered=answered, marked=answered.replace(":00.", ":01."), **changes)


def store(root: Path, *marks: Mark) -> Path:
    root.mkdir(exist_ok=True)
    kept = FeedbackStore(root, retention_seconds=1e9, max_tenant_bytes=MIB)
    for each in marks:
        kept.append(each)
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(continual, ["collect", *map(str, arguments)])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompt": "a text\n\u2028 with \x00 in it"},
        {"rating": None, "correction": "so 🙂", "comment": "c"},
        {"adapters": (), "finish": FinishReason.STOP_STRING},
        {"adapters": (AdapterUse(DIGEST, "a@1", -0.5), AdapterUse(DIGEST, "b@1", 2.0))},
    ],
)
def test_a_line_is_the_mark(changes: dict[str, Any]) -> None:
    line = replace(PLAIN, **changes).as_line()
    assert line.count(b"\n") == 1 and parse_mark(line) == replace(PLAIN, **changes)
    for cut in range(1, len(line) - 1, 7):
        with pytest.raises(ValueError):
            parse_mark(line[:cut])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 2), (("rating",), "fine"), (("index",), "0"), (("prompt",), {}), (("prompt",), {"messages": []}),
        (("prompt", "messages"), [{"role": "user"}]), (("finish",), "soon"), (("adapters",), [{"version": "a@1"}]),
        (("correction",), 7), (("answer",), None),
    ],
)  # fmt: skip
def test_a_line_that_is_no_mark_is_refused(path: tuple[str, ...], value: object) -> None:
    row = json.loads(PLAIN.as_line())
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError):
        parse_mark(json.dumps(row).encode())


def test_corrections_win_good_answers_stay_and_bad_ones_go() -> None:
    marks = [
        mark(0),
        mark(1, rating="good", correction="negative"),
        mark(2, rating="bad", correction="mixed"),
        mark(3, rating=None, correction="neutral"),
        mark(4, rating="bad"),
        mark(5, finish=FinishReason.LENGTH),
    ]
    found = collect(marks)
    assert [each.answer for each in found.examples] == ["positive", "negative", "mixed", "neutral", "positive"]
    assert (found.found, found.good, found.corrected, found.bad, found.unasked, found.cut_off) == (6, 2, 3, 1, 0, 1)
    assert found.versions == {"team/a@3": 5} and found.only([4]).versions == {"team/a@3": 1}
    assert (found.first, found.last) == (marks[0].answered, marks[5].answered)
    assert [each.answer for each in collect(marks, ratings="good").examples] == ["positive", "positive"]
    only = collect(marks, ratings="corrected")
    assert ([each.answer for each in only.examples], only.unasked, only.bad) == (["negative", "mixed", "neutral"], 2, 1)


def test_a_conversation_stays_one_and_a_text_is_the_users() -> None:
    assert example(PLAIN).messages == (
        Message("system", "Judge."), Message("user", "A charming film."), Message("assistant", "positive"),
    )  # fmt: skip
    text = example(replace(PLAIN, prompt="Once upon a time"))
    assert text.messages == (Message("user", "Once upon a time"), Message("assistant", "positive"))


def test_an_adapter_is_a_name_or_a_version_and_no_alias() -> None:
    other = "sha256:" + "b" * 64
    marks = [
        mark(0),
        mark(1, adapters=(AdapterUse(other, "team/a@4", 0.5), AdapterUse(DIGEST, "team/b@1"))),
        mark(2, adapters=()),
        mark(3, adapters=(AdapterUse(other, "team/ab@3"),)),
    ]
    for ref, good in (("team/a", 2), ("team/a@3", 1), (f"team/a@{other}", 2), ("team/b", 1), ("team/c", 0)):
        assert collect(marks, answered_by=AnsweredBy.parse(ref)).good == good, ref
    assert collect(marks).versions == {"team/a@3": 1, "team/a@4 × 0.5 + team/b@1": 1, "tiny": 1, "team/ab@3": 1}
    for alias in ("team/a:prod", "team/a:latest"):
        with pytest.raises(RefInvalid, match="an alias, which moves"):
            AnsweredBy.parse(alias)


def test_the_table_accounts_for_every_mark(tiny_base: Path, tmp_path: Path) -> None:
    def asked(text: str) -> tuple[tuple[str, str], ...]:
        return (("user", text),)

    root = store(
        tmp_path / "kept",
        mark(0, prompt=asked("one thing"), answer="yes"),
        mark(1, prompt=asked("one thing"), answer="yes"),  # word for word
        mark(2, prompt=asked("another matter"), answer="no"),
        mark(3, prompt=asked("another matter"), answer="yes"),  # contradicts
        mark(4, prompt=asked("something else"), rating="bad"),
        mark(5, prompt=asked("what is evaluated"), answer="no"),
        mark(6, prompt=asked("a third subject"), rating="bad", tenant="red"),
        mark(6, prompt=asked("a third subject"), rating=None, correction="no", tenant="red"),  # the later mark counts
        mark(7, prompt=asked("silence"), answer=""),
        mark(8, prompt=asked("unlike"), answer="yes"),
    )
    with next(root.glob("blue-*/*-09.jsonl")).open("ab") as file:
        file.write(mark(9).as_line()[:-30])
    held = tmp_path / "held.jsonl"
    write_jsonl(held, [example(mark(5, prompt=asked("what is evaluated"), answer="no"))])
    out = tmp_path / "next.jsonl"
    result = run(root, out, "--base", tiny_base, "--task", "sentiment", "--eval", held)
    assert result.exit_code == 0, result.output
    rows = {line.split("  ")[0].strip(): line.split()[-1] for line in result.output.splitlines()}
    told = json.loads((tmp_path / "next.provenance.json").read_text("utf-8"))
    assert told["marks"] | {"answered_by": 0, "answered_from": 0, "answered_until": 0} == {
        "found": 9, "good": 7, "corrected": 1, "bad_dropped": 1, "not_asked_for": 0, "good_but_cut_off": 0,
        "answered_by": 0, "answered_from": 0, "answered_until": 0, "replaced": 1, "unreadable_lines": 1,
    }  # fmt: skip
    assert told["removed"] == {"schema": 1, "duplicates": 1, "contradictions": 2, "leakage": 1}
    assert told["examples"] == 3 == 7 + 1 - 5 == sum(told["marks"]["answered_by"].values())
    assert rows["kept"] == told["digest"] == read_jsonl(out).digest
    assert "removed: contradictions" in result.output and "lines unreadable" in result.output
    assert [each.answer for each in read_jsonl(out).examples] == ["yes", "no", "yes"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (out, out.with_suffix(".provenance.json"))] == [0o600] * 2
    assert "matter" not in (tmp_path / "next.provenance.json").read_text("utf-8")  # counts, no text of anybody's
    again = run(root, out, "--base", tiny_base)
    assert getattr(again.exception, "reason", None) == "OUTPUT_EXISTS"


def test_tenant_since_and_what_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    root = store(
        tmp_path / "kept",
        mark(0, tenant="../../blue", prompt="one"),
        mark(5, tenant="../../blue", prompt="five"),
        mark(6, tenant="red", prompt="six"),
    )
    out = tmp_path / "out.jsonl"

    def prompts(*options: object) -> list[str]:
        result = run(root, out, "--base", tiny_base, *options)
        assert result.exit_code == 0, result.output
        found = [each.prompt[-1].content for each in read_jsonl(out).examples]
        out.unlink()
        out.with_suffix(".provenance.json").unlink()
        return found

    assert prompts() == ["one", "five", "six"]
    assert prompts("--tenant", "../../blue") == ["one", "five"]
    assert prompts("--since", "2026-11-06") == ["five", "six"]
    assert prompts("--since", "2026-11-06", "--tenant", "red", "--json") == ["six"]
    for options, reason in (
        (("--tenant", "nobody"), "DATA_TOO_SMALL"),
        (("--adapter", "team/a:prod"), "REF_INVALID"),
        (("--ratings", "corrected"), "DATA_TOO_SMALL"),
    ):
        result = run(root, out, "--base", tiny_base, *options)
        assert getattr(result.exception, "reason", None) == reason, result.output
        assert not out.exists()
    missing = run(root, tmp_path / "nowhere" / "out.jsonl", "--base", tiny_base)
    assert getattr(missing.exception, "reason", None) == "OUTPUT_UNWRITABLE"
    assert run(root, out, "--since", "yesterday").exit_code == 2


def test_from_a_served_request_to_the_next_stage(
    tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Serve, mark, collect; the file passes `hub data check` and a plan takes it as its train_file."""
    from server.engine.engine import Engine

    kept, out = tmp_path / "kept", tmp_path / "next.jsonl"
    with Hub.open(str(tmp_path / "hub")) as hub:
        hub.push(make_adapter(tiny_base, tmp_path / "a", seed=1, b_std=0.3), "team/a", base=str(tiny_base))
        engine = Engine.build(
            ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1),
            EngineLimits(kv_memory_bytes=32 * MIB, adapter_memory_bytes=4 * MIB),
            hub_fetch(hub),
        )
        server = RunningServer(engine, hub, replace(QUIET, feedback=FeedbackConfig(kept)))
        server.serve()
        try:
            with Client(server.address) as client:
                for number in range(24):
                    question = [
                        {"role": "user", "content": f"Film {number} {'never ends' * (number % 5)}, is it good?"}
                    ]
                    answer = client.generate(question, "team/a", choice=["positive", "negative"])
                    good = answer.text == "positive"
                    match number % 3:
                        case 0:
                            client.feedback(answer.request_id, "good")
                        case 1:
                            client.feedback(answer.request_id, "bad", "negative" if good else "positive")
                        case 2:
                            client.feedback(answer.request_id, "bad")
                ids = client.tokenize("as token ids")
                answer = client.generate([token.id for token in ids], max_new_tokens=3)
                client.feedback(answer.request_id, correction="negative")
        finally:
            server.close()
    result = run(kept, out, "--base", tiny_base, "--task", "sentiment", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["marks"]["found"], told["marks"]["good"], told["marks"]["corrected"]) == (25, 8, 9)
    by = told["marks"]["answered_by"]  # of what is left after cleaning
    assert set(by) == {"team/a@1", "tiny"} and sum(by.values()) == told["examples"]
    assert told["examples"] == len(read_jsonl(out)) == 17 - sum(told["removed"].values())
    assert read_jsonl(out).examples[-1].messages == (Message("user", "as token ids"), Message("assistant", "negative"))

    checked = CliRunner().invoke(data, ["check", str(out), "--base", str(tiny_base), "--task", "sentiment"])
    assert checked.exit_code == 0, checked.output
    assert "no faults" in checked.output

    write_jsonl(tmp_path / "held.jsonl", read_jsonl(out).examples[:2])
    task = {"task": "sentiment", "label": "next", "train_file": out.name, "eval_file": "held.jsonl"}
    plan_file = tmp_path / "plan.yaml"
    plan_file.write_text(
        yaml.safe_dump({"name": "team/a", "base": str(tiny_base), "strategy": "sequential", "tasks": [task]})
    )
    (prepared,) = prepare_data(ContinualPlan.read(plan_file), tmp_path)
    assert prepared.train.digest == told["digest"]
