"""The verbs as people use them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from hub.cli import group
from hub.errors import RefInvalid
from hub.hub import Hub
from hub.registry.server import RegistryConfig, RegistryServer
from hub.remote.cache import Cache
from training.commands import COMMANDS
from training.data import Example, read_jsonl, write_jsonl
from training.errors import DataInvalid, DataTooSmall, OutputExists, OutputUnwritable, RecipeInvalid, UnknownRecipe
from training.presets import ARTICLES, RECIPES
from training.recipe import Recipe


def run(*args: str | Path, fails: type[Exception] | None = None) -> Result:
    result = CliRunner().invoke(group, [str(arg) for arg in args], catch_exceptions=fails is not None)
    if fails is None:
        assert result.exit_code == 0, result.output
    else:
        assert isinstance(result.exception, fails)
    return result


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "labelled.jsonl"
    labels = ["positive", "negative", "neutral", "mixed"] * 6
    write_jsonl(path, [Example.of(user=f"text {n}", answer=label) for n, label in enumerate(labels)])
    return path


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_verb_explains_itself(command: object) -> None:
    verb = group.get_command(click.Context(group), command.name)  # type: ignore[attr-defined]
    assert verb is not None
    help_text = run(command.name, "--help").output  # type: ignore[attr-defined]
    assert "Usage:" in help_text and len(help_text) > 200


def test_a_data_set_is_built_and_shown(tmp_path: Path) -> None:
    out = tmp_path / "iam"
    output = run("data", "build", "iam-policy", "--out", out, "--train", "20", "--eval", "10").output
    for words in ("train.jsonl", "20", "eval-sam-templates.jsonl", "parliament", "assistant", "2012-10-17"):
        assert words in output
    card = json.loads(
        run("data", "build", "iam-policy", "--out", out, "--train", "20", "--eval", "10", "--json").output
    )
    assert card == json.loads((out / "dataset.json").read_text())
    shown = json.loads(run("data", "show", out / "eval.jsonl", "--number", "2", "--json").output)
    assert (shown["examples"], len(shown["first"])) == (10, 2)
    assert shown["digest"] == card["files"]["eval.jsonl"]["digest"]
    assert "10 examples" in run("data", "show", out / "eval.jsonl").output


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl", "eval-sam-templates.jsonl", "dataset.json"])
def test_a_build_replaces_only_what_it_made(name: str, tmp_path: Path) -> None:
    common = ("data", "build", "iam-policy", "--out", tmp_path, "--train", "4", "--eval", "2")
    (tmp_path / name).write_text('{"task": "sentiment", "files": {}}')
    run(*common, fails=OutputExists)
    assert (tmp_path / name).read_text() == '{"task": "sentiment", "files": {}}' and len([*tmp_path.iterdir()]) == 1
    (tmp_path / name).unlink()
    (tmp_path / "mine.jsonl").write_text("mine")
    run(*common)
    run(*common, "--seed", "1")


def test_what_data_holds_reaches_no_terminal_as_it_is(tmp_path: Path) -> None:
    write_jsonl(file := tmp_path / "osc.jsonl", [Example.of(user="a\x1b]0;title\x07\nsecond", answer="\x1b[31mred")])
    shown = run("data", "show", file).output
    assert "\x1b" not in shown and "\\x1b]0;title" in shown and "             second" in shown


def test_train_push_and_eval(tiny_base: Path, labelled: Path, tmp_path: Path) -> None:
    out, hub = tmp_path / "out", tmp_path / "hub"
    common = ("--base", tiny_base, "--hub", hub, "--threads", "1", "--json")
    settings = ("--rank", "4", "--batch", "4", "--epochs", "1", "--max-length", "100", "--recipe", "demo")
    trained = run("train", labelled, "--out", out, "--push", "team/tiny:prod", *settings, *common)
    told = json.loads(trained.stdout)
    assert told["pushed"] == "team/tiny@1" and told["metrics"]["steps"] == 6
    assert told["datasets"]["digest"] == read_jsonl(labelled).digest
    facts = json.loads((out / "loraplex.json").read_text())
    assert facts["base"]["name"] == tiny_base.name and facts["base"]["fingerprint"].startswith("sha256:")
    shown = json.loads(run("show", "team/tiny:prod", "--hub", hub, "--json").stdout)
    assert shown["manifest"]["base"]["fingerprint"] == facts["base"]["fingerprint"]
    assert shown["manifest"]["datasets"]["digest"] == read_jsonl(labelled).digest

    models = ("base", "team/tiny:prod", str(out))
    answers = tmp_path / "answers.jsonl"
    evaluation = ("eval", *models, "--task", "sentiment", "--data", labelled, "--limit", "5", "--answers", answers)
    scores = json.loads(run(*evaluation, *common).stdout)
    assert list(scores["models"]) == list(models)
    assert scores["data"]["examples"] == 5
    assert set(scores["models"]["base"]) == {"accuracy", "macro_f1", "parse_rate"}
    assert scores["models"]["team/tiny:prod"] == scores["models"][str(out)]
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 5 and rows[1]["wanted"] == "negative" and set(rows[0]["answers"]) == set(models)
    table = run(*evaluation, *common[:-1]).stdout
    assert "accuracy *" in table and "team/tiny:prod" in table
    for model, each in scores["intervals"]["models"].items():
        assert all(low <= scores["models"][model][name] <= high for name, (low, high) in each.items())

    text = tmp_path / "held-out.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    wanted = ("team/tiny:prod", "--task", "sentiment", "--data", labelled, "--limit", "5", "--compare", "base")
    compared = json.loads(run("eval", *wanted, "--text", text, *common).stdout)
    assert list(compared["models"]) == ["base", "team/tiny:prod"] and compared["compare"]["to"] == "base"
    [(model, each)] = compared["compare"]["differences"].items()
    assert model == "team/tiny:prod" and set(each) == {"accuracy", "macro_f1", "parse_rate", "text_nats_per_token"}
    for name, difference in each.items():
        own, base = (compared["models"][which][name] for which in (model, "base"))
        assert difference["value"] == pytest.approx(own - base)
        assert difference["interval"][0] <= difference["value"] <= difference["interval"][1]
    assert compared["text"]["digest"].startswith("sha256:")
    told = run("eval", *wanted, "--text", text, *common[:-1]).stdout
    assert "minus base, on the same questions" in told and "text nats per token" in told

    again = run("train", labelled, "--out", out, *common, fails=OutputExists)
    assert again.exception.reason == "OUTPUT_EXISTS"  # type: ignore[union-attr]


def test_the_data_that_a_version_names_is_what_it_was_trained_on(
    tiny_base: Path, labelled: Path, tmp_path: Path
) -> None:
    fixed, hub = tmp_path / "fixed.jsonl", tmp_path / "hub"
    with labelled.open("a") as lines:
        lines.write("no conversation\n")
    checked = run("data", "check", labelled, "--fix", fixed, "--base", tiny_base, "--json")
    report = json.loads(checked.stdout)
    settings = ("--rank", "2", "--batch", "4", "--max-steps", "1", "--max-length", "100", "--threads", "1")
    run("train", fixed, "--out", tmp_path / "out", "--base", tiny_base, "--push", "team/tiny", "--hub", hub, *settings)
    recorded = json.loads(run("show", "team/tiny", "--hub", hub, "--json").stdout)["manifest"]["datasets"]
    assert recorded["digest"] == report["fix"]["digest"] != report["digest"]
    assert recorded["digest"] == "sha256:" + hashlib.sha256(fixed.read_bytes()).hexdigest()


def test_wrong_use_is_refused_before_anything_is_loaded(labelled: Path, tmp_path: Path) -> None:
    run("train", labelled, "--out", tmp_path / "o", "--rank", "0", fails=RecipeInvalid)
    for ref in ("bad ref", "team/tiny@3"):
        run("train", labelled, "--out", tmp_path / "o", "--push", ref, fails=RefInvalid)
    assert not (tmp_path / "o").exists()
    twice = CliRunner().invoke(group, ["eval", "base", "base", "--task", "sentiment", "--data", str(labelled)])
    assert twice.exit_code == 2 and "twice" in twice.output
    alone = CliRunner().invoke(
        group, ["eval", "base", "--task", "sentiment", "--data", str(labelled), "--compare", "base"]
    )
    assert alone.exit_code == 2 and "nothing to compare" in alone.output
    unknown = CliRunner().invoke(group, ["data", "build", "poetry", "--out", str(tmp_path / "o")])
    assert unknown.exit_code == 2 and "sentiment" in unknown.output


def test_an_evaluation_finds_its_faults_before_any_answer(
    tiny_base: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("server.engine.engine.Engine.build", never)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 10)
    common = ("eval", "base", "--base", tiny_base, "--data", labelled, "--task")
    run(*common, "sentiment", "--text", tmp_path / "latin.txt", fails=DataInvalid)
    (tmp_path / "empty.txt").touch()
    short = run(*common, "sentiment", "--text", tmp_path / "empty.txt", fails=DataTooSmall)
    assert "empty.txt: the text has fewer than two tokens" in str(short.exception)
    run(*common, "sentiment", "--answers", tmp_path / "nodir" / "a.jsonl", fails=OutputUnwritable)
    for task in ("address-json", "iam-policy", "own-json"):
        run(*common, task, fails=DataInvalid)


def test_long_labels_are_not_cut(tiny_base: Path, tmp_path: Path) -> None:
    write_jsonl(file := tmp_path / "long.jsonl", [Example.of(user=f"q{n}", answer="a label " * 5) for n in range(2)])
    common = ("eval", "base", "--base", tiny_base, "--data", file, "--task", "own-label", "--threads", "1")
    told = json.loads(run(*common, "--json").stdout)
    assert told["max_new_tokens"] == 48 and set(told["cut_off"]) == {"base"}
    short = run(*common, "--max-new-tokens", "1")
    assert "base: 2 of 2 answers ended at the limit of 1 tokens" in short.stderr


def test_a_file_with_faults_fails_until_it_is_fixed(tiny_base: Path, tmp_path: Path) -> None:
    questions = ["where is the station", "how old is the bridge", "what does tea cost here", "when do they open today"]
    good = [
        Example.of(user=f"{q} {'abcdefgh'[n] * 9}", answer="yes" if n % 2 else "no")
        for n in range(8)
        for q in questions
    ]
    file, held, fixed = (tmp_path / name for name in ("mine.jsonl", "held.jsonl", "fixed.jsonl"))
    write_jsonl(file, [*good, good[3], good[3]])
    with file.open("a") as lines:
        lines.write('{"messages": "\x1b[31m"}\n')
    write_jsonl(held, [Example.of(user="something else entirely, isn't it", answer="no"), good[5]])
    common = ("data", "check", file, "--eval", held, "--base", tiny_base)
    bad = CliRunner().invoke(group, [str(arg) for arg in common])
    assert bad.exit_code == 1
    for words in (
        "schema: 1 lines",
        "line 35:",
        "duplicates: 2",
        "leakage: 1",
        "4 of 35 lines",
        "tokens",
        "label",
        "48.4%",
    ):
        assert words in bad.output
    assert "\x1b" not in bad.output
    told = CliRunner().invoke(group, [str(arg) for arg in (*common, "--json")])
    report = json.loads(told.stdout)
    assert told.exit_code == 1 and not report["ok"] and report["kept"] == 31 and report["answers"] == "label"
    assert report["faults"][0]["examples"][0]["line"] == 35
    report = json.loads(run(*common, "--fix", fixed, "--json").stdout)
    assert report["fix"] == {"file": str(fixed), "digest": read_jsonl(fixed).digest, "examples": 31}
    assert fixed.read_text().splitlines() == [example.as_line() for example in good if example is not good[5]]
    clean = run("data", "check", fixed, "--eval", held, "--base", tiny_base)
    assert "no faults in 31 examples" in clean.output
    run(*common, "--fix", fixed, fails=OutputExists)
    assert run("data", "check", fixed, "--answers", "json", "--fix", tmp_path / "none", fails=DataTooSmall)
    assert not (tmp_path / "none").exists()


def test_a_fix_that_cannot_be_written_is_refused_before_the_checks(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise KeyError("checked")

    monkeypatch.setattr("training.data_check.check_file", never)
    monkeypatch.setattr("training.cli_data_check.token_counter", lambda base: None)
    run("data", "check", labelled, "--fix", tmp_path / "nodir" / "clean.jsonl", fails=OutputUnwritable)
    run("data", "check", labelled, "--fix", tmp_path / "clean.jsonl", fails=KeyError)
    assert not (tmp_path / "clean.jsonl").exists()  # only looked at so far


def test_a_built_file_knows_its_task(tiny_base: Path, tmp_path: Path) -> None:
    run("data", "build", "name-json", "--out", tmp_path, "--train", "40", "--eval", "4")
    report = json.loads(run("data", "check", tmp_path / "train.jsonl", "--base", tiny_base, "--json").stdout)
    assert report["ok"] and report["answers"] == "json" and "json" in report["passed"]


def test_recipes_are_compared_and_shown_whole() -> None:
    table = run("recipes").stdout
    assert all(name in table for name in RECIPES)
    planner = Path(__file__).parents[2] / "docs" / "planner.md"
    assert ARTICLES in table and "## The articles\n" in planner.read_text(encoding="utf-8")
    shown = run("recipes", "show", "article-001").stdout
    assert "attention; rate" in shown and "--learning-rate" in shown and "q k v o" in shown
    told = json.loads(run("recipes", "show", "low-data", "--json").stdout)
    assert told["learning_rate"] == 1e-4 and told["source"]
    assert [recipe["name"] for recipe in json.loads(run("recipes", "--json").stdout)] == list(RECIPES)
    run("recipes", "show", "best", fails=UnknownRecipe)


def test_every_number_of_a_recipe_can_be_overridden_and_is_recorded(
    tiny_base: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given: dict[str, object] = {
        "rank": 3, "alpha": 5, "dropout": 0.25, "targets": ["q_proj", "v_proj"], "variant": "rslora",
        "learning_rate": 3e-3, "schedule": "linear", "warmup": 0.2, "epochs": 0.5, "batch": 2, "accumulation": 3,
        "max_length": 90, "precision": "float32", "init": "qera",
        "weight_decay": 0.2, "clip": 0.5, "hold_out": 0.2, "gradient_checkpointing": True, "seed": 9, "method": "qlora",
    }  # fmt: skip
    assert set(given) == {field.name for field in dataclasses.fields(Recipe)} - {"name", "source", "when"}
    options: list[str] = []
    for field, value in given.items():
        flag = f"--{field.replace('_', '-')}"
        options += [flag] if value is True else [flag, ",".join(value) if isinstance(value, list) else str(value)]
    run("train", labelled, "--out", out, "--base", tiny_base, "--threads", "1", "--recipe", "article-001", *options)
    recorded = json.loads((out / "loraplex.json").read_text())["recipe"]
    assert {field: recorded[field] for field in given} == given
    assert recorded["name"] == "article-001"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (3, 5, ["q_proj", "v_proj"])


def test_a_recipe_brings_its_method(tiny_base: Path, labelled: Path, tmp_path: Path) -> None:
    settings = ("--base", tiny_base, "--threads", "1", "--max-steps", "1", "--batch", "2", "--recipe", "article-001")
    run("train", labelled, "--out", tmp_path / "own", *settings)
    run("train", labelled, "--out", tmp_path / "other", "--method", "lora", *settings)
    facts = [json.loads((tmp_path / name / "loraplex.json").read_text()) for name in ("own", "other")]
    assert [(fact["recipe"]["method"], fact["base"]["quantization"]) for fact in facts] == [
        ("qlora", "nf4"),
        ("lora", "none"),
    ]


@pytest.mark.timeout(180)
def test_a_full_fine_tune_becomes_a_version_a_base_and_a_lora(tiny_base: Path, labelled: Path, tmp_path: Path) -> None:
    out, hub = tmp_path / "out", tmp_path / "hub"
    common = ("--hub", hub, "--threads", "1", "--json")
    settings = ("--batch", "4", "--epochs", "1", "--max-length", "100", "--recipe", "demo", "--learning-rate", "1e-3")
    told = json.loads(
        run(
            "train", labelled, "--base", tiny_base, "--method", "full", "--out", out, "--push", "team/whole:prod",
            "--extract-rank", "8", *settings, *common,
        ).stdout
    )  # fmt: skip
    assert told["pushed"] == "team/whole@1"
    extracted = told["extracted"]
    assert extracted["out"] == str(tmp_path / "out-r8") and 0 < extracted["relative_error"] < 1
    shown = json.loads(run("show", "team/whole", "--hub", hub, "--json").stdout)["manifest"]
    assert shown["schema"] == "loraplex.model/1" and shown["recipe"]["method"] == "full"
    assert (
        shown["base"]["fingerprint"]
        == json.loads((tmp_path / "out-r8" / "loraplex.json").read_text())["base"]["fingerprint"]
    )

    # The fine-tune is a base: it is scored by its reference, and adapters are trained on it.
    scores = ("--task", "own-label", "--data", labelled, "--limit", "4")
    answers = tmp_path / "answers.jsonl"
    by_ref = json.loads(run("eval", "base", *scores, "--base", "team/whole:prod", "--answers", answers, *common).stdout)
    by_directory = json.loads(run("eval", "base", *scores, "--base", out, *common).stdout)
    assert by_ref["models"] == by_directory["models"] and by_ref["base"]["name"] == "team/whole:prod"
    on_it = tmp_path / "on-it"
    run(
        "train",
        labelled,
        "--base",
        "team/whole@1",
        "--out",
        on_it,
        "--push",
        "team/on-it",
        "--max-steps",
        "1",
        *settings,
        *common,
    )
    facts = json.loads((on_it / "loraplex.json").read_text())
    from hub.fingerprint import fingerprint_directory

    assert facts["base"]["fingerprint"] == fingerprint_directory(out).fingerprint
    refused = CliRunner().invoke(group, ["eval", "base", *map(str, scores), "--base", "team/on-it", "--hub", str(hub)])
    assert getattr(refused.exception, "reason", "") == "BASE_NOT_FOUND"


@pytest.mark.timeout(180)
def test_scores_are_recorded_beside_the_version_that_was_scored(
    tiny_base: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.errors import NothingToRecord

    hub = tmp_path / "hub"
    common = ("--base", tiny_base, "--hub", hub, "--threads", "1")
    settings = ("--rank", "2", "--batch", "4", "--max-steps", "1", "--max-length", "100", "--recipe", "demo")
    run("train", labelled, "--out", tmp_path / "out", "--push", "team/tiny:prod", *settings, *common)
    scores = ("--task", "sentiment", "--data", labelled, "--limit", "4")
    told = json.loads(run("eval", "base", "team/tiny:prod", *scores, "--record", *common, "--json").stdout)
    [kept] = json.loads(run("show", "team/tiny@1", "--hub", hub, "--json").stdout)["evaluations"]
    assert kept["metrics"] == told["models"]["team/tiny:prod"] and kept["task"] == "sentiment"
    assert kept["data"] == {"digest": told["data"]["digest"], "examples": 4} and kept["version"] == "team/tiny@1"
    assert {name: list(each) for name, each in kept["intervals"].items()} == told["intervals"]["models"][
        "team/tiny:prod"
    ]
    run("eval", "base", str(tmp_path / "out"), *scores, "--record", *common, fails=NothingToRecord)
    # Into a shared hub as well.
    monkeypatch.setattr(Cache, "of", lambda address: Cache(tmp_path / "client"))
    config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
    with Hub.open(str(hub)) as store, RegistryServer(store, None, config) as server:
        shared = ("--base", tiny_base, "--hub", f"grpc://{server.address}", "--threads", "1")
        run("eval", "team/tiny:prod", *scores, "--record", *shared)
        before, after = store.evaluations(store.resolve("team/tiny@1").digest)
        assert (after.metrics, after.data, after.base) == (before.metrics, before.data, before.base)


def test_wrong_use_of_the_newer_options_is_refused(labelled: Path, tmp_path: Path) -> None:
    def refused(*args: str | Path) -> str:
        result = CliRunner().invoke(group, [str(arg) for arg in args])
        assert result.exit_code == 2
        return result.output

    assert "--method full" in refused("train", labelled, "--out", tmp_path / "o", "--extract-rank", "4")
    assert "skill-share" in refused("train", labelled, "--out", tmp_path / "o", "--skill-share", "1")
    assert "--question" in refused("data", "import", labelled, "--question", "q", "--out", tmp_path / "o")
    table = tmp_path / "t.csv"
    table.write_text("a,b\n1,2\n")
    assert "needs --question" in refused("data", "import", table, "--out", tmp_path / "o")


@pytest.mark.timeout(180)
def test_watching_and_mixing_are_options_of_train(tiny_base: Path, labelled: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    skills = tmp_path / "skills.jsonl"
    write_jsonl(skills, [Example.of(user=f"Say {n}", answer=str(n)) for n in range(12)])
    told = json.loads(
        run(
            "train", labelled, "--base", tiny_base, "--out", tmp_path / "out", "--recipe", "demo", "--rank", "2",
            "--epochs", "2", "--batch", "4", "--max-length", "100", "--threads", "1", "--variant", "rslora",
            "--skill-data", skills, "--skill-share", "0.2", "--validation-steps", "2", "--early-stop", "50",
            "--curves", tmp_path / "c.json", "--curves", tmp_path / "c.png", "--tensorboard", tmp_path / "tb", "--json",
        ).stdout
    )  # fmt: skip
    mixed = told["datasets"]["skills"]["examples"]
    assert mixed == round((told["datasets"]["train_examples"] - mixed) * 0.25)
    curves = json.loads((tmp_path / "c.json").read_text())
    assert len(curves["training"]) == told["metrics"]["steps"]
    assert [step for step, _ in curves["validation"]] == [*range(0, told["metrics"]["steps"] + 1, 2)]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG") and list((tmp_path / "tb").iterdir())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_rslora"] is True
