"""The guide for newcomers, run as it stands: every command of docs/your-data.md, on forty rows and a tiny base."""

from __future__ import annotations

import csv
import json
import random
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from hub.cli import group
from training.csv_import import Wording, read_table
from training.data import Example, read_jsonl
from training.errors import DataInvalid, OutputExists
from training.tasks import task_named

GUIDE = Path(__file__).parents[2] / "docs" / "your-data.md"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
# What only a test adds: few threads, a port of its own, a base without quantization.
ADDED = {
    "train": ("--threads", "1", "--json"),
    "eval": ("--threads", "1", "--json"),
    "advise": ("--threads", "1"),
}

VOCABULARY = ["".join(random.Random(n).choices("abcdefghijklmnop", k=5)) for n in range(300)]


def commands() -> Iterator[list[str]]:
    """Every `hub …` line of the guide, in order, as words."""
    for block in re.findall(r"```sh\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[0] == "hub", line
            yield words[1:]


def write_table(path: Path) -> None:
    subjects = {"billing": "invoice", "access": "login", "delivery": "parcel"}
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["subject", "text", "queue"])
        for number in range(40):
            queue = list(subjects)[number % 3]
            about = " ".join(random.choices(VOCABULARY, k=12))
            table.writerow([f"Case {number}", f'About "{subjects[queue]}",\n{about}', queue])


@pytest.mark.timeout(120)
def test_the_guide_works(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAPLEX_HUB", str(tmp_path / "hub"))
    write_table(tmp_path / "tickets.csv")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    served: subprocess.Popen[str] | None = None
    said: dict[str, str] = {}
    try:
        for words in commands():
            words = [word.replace("$BASE", str(tiny_base)) for word in words]
            name = " ".join(words[: 2 if words[0] == "data" else 1])
            if name == "serve":
                assert words[-1] == "&"
                served = subprocess.Popen(
                    [
                        sys.executable, "-c", "from hub.cli import main; main()", *words[:-1], "--listen", address,
                        "--metrics-port", "-1", "--quantize", "none", "--threads", "1", "--kv-memory", "32MiB",
                    ],
                    stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                assert served.stdout is not None and served.stdout.readline().startswith("ready ")
                continue
            if name == "generate":
                words += ["--server", address, "--max-new-tokens", "8"]
            result = CliRunner().invoke(group, [*words, *ADDED.get(name, ())], catch_exceptions=False)
            assert result.exit_code == 0, (words, result.output)
            said[name] = result.stdout
            if name == "generate":
                again = CliRunner().invoke(group, [*words, "--json"], catch_exceptions=False)
                answer = json.loads(again.stdout)
    finally:
        if served is not None:
            served.terminate()
            served.communicate(timeout=30)

    train, held = (read_jsonl(tmp_path / "data" / "tickets" / f"{name}.jsonl") for name in ("train", "eval"))
    assert (len(train), len(held)) == (36, 4)
    assert train.examples[0].messages[0].content == "Name the queue: billing, access or delivery."
    assert train.examples[0].messages[1].content.startswith("Case ") and '"' in train.examples[0].prompt[1].content
    assert (tmp_path / "out" / "tickets-losses.svg").read_text().count("<svg") == 1
    scores = json.loads(said["eval"])
    assert set(scores["models"]["team/tickets:candidate"]) == {"accuracy", "macro_f1", "label_rate"}
    assert json.loads(said["train"])["metrics"]["validation_loss"] is not None
    shown = CliRunner().invoke(group, ["show", "team/tickets:candidate"], catch_exceptions=False).output
    assert "evaluation: own-label" in shown and ":prod" in shown
    assert served is not None and served.returncode == 0
    assert said["generate"] == answer["text"] + "\n" and 0 < answer["completion_tokens"] <= 8
    assert [used["version"] for used in answer["adapters"]] == ["team/tickets@1"]  # which :prod names


def test_tables_become_conversations(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text('\ufeffa,b,"c, d"\n1,"x\ny",z\n\n2,{a},w\n', "utf-8")
    first, second = read_table(file, Wording("{a}: {b}!", "c, d", "Do."))
    assert [message.content for message in first.messages] == ["Do.", "1: x\ny!", "z"]
    assert second.prompt[1].content == "2: {a}!"  # a value is never read as a template
    [first, _] = read_table(file, Wording("b", "a"))
    assert (first.prompt[0].content, first.answer) == ("x\ny", "1")
    for encoding in ("utf-8", "utf-16-le"):  # Excel's mark, whatever the encoding is called
        file.write_text("\ufefftext,queue\nq,a\n", encoding)
        assert read_table(file, Wording("text", "queue"), None, encoding)[0].prompt[0].content == "q"
    tabs = tmp_path / "t.tsv"
    tabs.write_text("q\ta\nhow, so?\tno\n")
    assert read_table(tabs, Wording("q", "a"))[0].prompt[0].content == "how, so?"


def test_tables_as_spreadsheets_write_them(tmp_path: Path) -> None:
    file = tmp_path / "T.TSV"
    file.write_text("q\ta\nhow, so?\tno\n\t\n")
    assert [e.prompt[0].content for e in read_table(file, Wording("q", "a"))] == ["how, so?"]
    semicolons = tmp_path / "s.csv"
    semicolons.write_bytes("q;a\nÄrger?;ja\n;\n \n".encode("cp1252"))
    [one] = read_table(semicolons, Wording("q", "a"), ";", "cp1252")
    assert (one.prompt[0].content, one.answer) == ("Ärger?", "ja")
    with pytest.raises(DataInvalid, match="--encoding cp1252"):
        read_table(semicolons, Wording("q", "a"), ";")
    with pytest.raises(DataInvalid, match="';' need --delimiter"):
        read_table(semicolons, Wording("q", "a"), None, "cp1252")
    semicolons.write_bytes("q;a\nÄrger?;ja\n".encode("utf-16"))
    with pytest.raises(DataInvalid, match="--encoding utf-16"):
        read_table(semicolons, Wording("q", "a"), ";")
    for name in ("klingon", "base64"):
        with pytest.raises(DataInvalid, match=f"no text encoding is called '{name}'"):
            read_table(semicolons, Wording("q", "a"), ";", name)


def test_an_import_takes_what_people_have_and_overwrites_nothing(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(b"q;a\n" + b"".join(f"frage {n} \xe9;ja\n".encode("latin-1") for n in range(10)))
    words = [
        "data",
        "import",
        str(table),
        "--question",
        "q",
        "--answer",
        "a",
        "--delimiter",
        ";",
        "--encoding",
        "latin-1",
    ]
    assert CliRunner().invoke(group, [*words, "--out", str(tmp_path / "out")]).exit_code == 0
    chats = tmp_path / "chats.json"
    chats.write_bytes((tmp_path / "out" / "train.jsonl").read_bytes())
    assert CliRunner().invoke(group, ["data", "import", str(chats), "--out", str(tmp_path / "chats")]).exit_code == 0
    assert CliRunner().invoke(group, [*words, "--delimiter", ";;", "--out", str(tmp_path / "o")]).exit_code == 2
    for name in ("train.jsonl", "eval.jsonl", "dataset.json"):
        (there := tmp_path / f"with-{name}").mkdir()
        (there / name).write_text("mine")
        refused = CliRunner().invoke(group, [*words, "--out", str(there)])
        assert isinstance(refused.exception, OutputExists)
        assert [file.name for file in there.iterdir()] == [name] and (there / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "question", "words"),
    [
        ("q,a\nx\n", "q", "line 2: 1 fields"),
        ("q,a\nx,\n", "q", "line 2: an empty"),
        ("q,a\nx,\nx,y\n ,y\n", "q", "line 2, 4: an empty"),
        ("q,a\n" + "x,\n" * 25, "q", "20, 21 and 5 more: an empty"),
        ("q,a\n", "q", "no rows"),
        ("q,q\nx,y\n", "q", "one name"),
        ("q,b\nx,y\n", "q", "no column 'a'"),
        ("q,a\nx,y\n", "z", "no column 'z'"),
        ("q,a\nx,y\n", "{z}", "no column 'z'"),
        ("q,a\nx,y\n", "{q.__class__}", "no column 'q.__class__'"),
        ("q,a\nx,y\n", "{q!r}", "nothing more"),
        ("q,a\nx,y\n", "{q", "expected"),
        ('q,a\n"x,y\n', "q", "line"),
    ],
)
def test_bad_tables_are_refused_by_line(tmp_path: Path, text: str, question: str, words: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(DataInvalid, match=re.escape(words)):
        read_table(file, Wording(question, "a"))


def test_own_scores_are_scikit_learns(tmp_path: Path) -> None:
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score

    random = np.random.default_rng()
    labels = ["Refund", "Access to account", "other"]
    wanted = [labels[i] for i in random.integers(0, 3, 60)]
    given = [labels[i] if i < 3 else "what?" for i in random.integers(0, 4, 60)]
    examples = [Example.of(user=f"q{n}", answer=answer) for n, answer in enumerate(wanted)]
    worded = [f" {answer.upper()}." if n % 2 else answer for n, answer in enumerate(given)]
    found = task_named("own-label").score(examples, worded)
    assert found["accuracy"] == pytest.approx(accuracy_score(wanted, given))
    present = sorted(set(wanted))
    assert found["macro_f1"] == pytest.approx(
        f1_score(wanted, given, labels=present, average="macro", zero_division=0.0)
    )
    assert found["label_rate"] == pytest.approx(sum(answer in labels for answer in given) / 60)

    records = [Example.of(user="q", answer='{"a": 1, "b": "x"}')] * 2
    assert task_named("own-json").score(records, ['{"b":"x","a":1}', "nonsense"]) == pytest.approx(
        {"field_f1": 2 * 2 / (4 + 2), "exact_json": 0.5, "valid_json": 0.5}
    )
    with pytest.raises(DataInvalid, match="example 1"):
        task_named("own-json").check([Example.of(user="q", answer="[1]")])
    texts = [Example.of(user="q", answer="the cat sat on the mat")]
    assert task_named("own-text").score(texts, ["the cat  sat on the mat"]) == pytest.approx(
        {"rouge_l": 1.0, "bleu": 1.0, "exact": 1.0}
    )


def test_answers_of_ones_own_may_be_as_long_as_the_longest_wanted() -> None:
    long = [Example.of(user="q", answer="word " * 400), Example.of(user="q", answer="yes")]
    for name, usual in (("own-label", 16), ("own-json", 256), ("own-text", 200)):
        task = task_named(name)
        assert task.answer_limit(long, lambda text: len(text.split())) == 408
        assert task.answer_limit(long[1:], lambda text: len(text.split())) == usual == task.max_new_tokens
    task = task_named("address-json")
    assert task.answer_limit(long, len) == task.max_new_tokens
