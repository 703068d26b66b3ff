"""`hub push --dataset --metrics`: what a pusher states is in the version, and the directory stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from hub.errors import FactsMalformed, UnexpectedFile
from hub.facts import Facts
from hub.hub import Hub
from hub.search import metric_numbers
from hub.stated_facts import dataset_facts, directory_with, metric_facts
from tests.hub.making import write_adapter


def push(hub: Hub, directory: Path, datasets: list[Path], metrics: dict[str, object]) -> dict[str, object]:
    with directory_with(directory, datasets, metrics) as source:
        version = hub.push(source, "team/x").version
    assert sorted(path.name for path in directory.parent.iterdir() if path.name.startswith(".")) == []
    told = version.manifest.to_json()
    return {"datasets": told["datasets"], "metrics": told["metrics"]}


def test_what_is_stated_is_in_the_version(tmp_path: Path) -> None:
    reviews = tmp_path / "reviews.jsonl"
    reviews.write_text('{"a": 1}\n\n{"a": 2}\n')
    other = tmp_path / "other.csv"
    other.write_text("a\n1\n")
    source = write_adapter(tmp_path / "a")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    digest = "sha256:" + hashlib.sha256(reviews.read_bytes()).hexdigest()
    one = {"file": "reviews.jsonl", "digest": digest, "bytes": 19, "examples": 2}
    with Hub.open(str(tmp_path / "hub")) as hub:
        assert push(hub, source, [reviews], {"f1": 0.83}) == {"datasets": one, "metrics": {"f1": 0.83}}
        both = push(hub, source, [reviews, other], {})
        assert both["datasets"] == [one, dataset_facts(other)]
        assert "examples" not in dataset_facts(other)
        assert [version.number for version in hub.versions()] == [1, 2]
        assert hub.verify() == []
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before


def test_it_adds_to_what_training_recorded(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a")
    trained = {"file": "train.jsonl", "digest": "sha256:" + "0" * 64}
    Facts(recipe={"rank": 4}, datasets=trained, metrics={"validation_loss": 0.5}, seeds={"training": 7}).write(source)
    extra = tmp_path / "extra.jsonl"
    extra.write_text("{}\n")
    with directory_with(source, [extra], {"f1": 0.83}) as copy:
        facts = Facts.parse((copy / "loraplex.json").read_bytes())
    assert facts.metrics == {"validation_loss": 0.5, "f1": 0.83}
    assert facts.datasets == [trained, dataset_facts(extra)]
    assert (facts.recipe, facts.seeds) == ({"rank": 4}, {"training": 7})
    with pytest.raises(FactsMalformed, match=r"the metric validation_loss is 0\.5 and 0\.4; say which"):
        with directory_with(source, [], {"validation_loss": 0.4}):
            pass


def test_metrics_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"sentiment": {"accuracy": 0.9}, "f1": 0.8}))
    assert metric_facts([str(file), "bleu=31.5"]) == {"sentiment": {"accuracy": 0.9}, "f1": 0.8, "bleu": 31.5}
    assert metric_facts(["f1=0.8", str(file)])["f1"] == 0.8
    with pytest.raises(FactsMalformed, match=r"the metric f1 is 0\.7 and 0\.8"):
        metric_facts(["f1=0.7", str(file)])
    for text, said in (
        ("f1=good", "the metric f1 is no number: 'good'"),
        ("f1=nan", "the metric f1 is no number"),
        ("nowhere.json", "nowhere.json is neither NAME=NUMBER nor a file of metrics: No such file or directory"),
    ):
        with pytest.raises(FactsMalformed, match=said):
            metric_facts([text])
    file.write_text('{"f1": NaN}')
    with pytest.raises(FactsMalformed, match=r"scores\.json"):
        metric_facts([str(file)])


def test_a_metric_within_an_object_is_the_one_with_dots(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a")
    Facts(metrics={"test": {"f1": 0.1}}).write(source)
    with pytest.raises(FactsMalformed, match=r"the metric test\.f1 is 0\.1 and 0\.9; say which"):
        with directory_with(source, [], {"test.f1": 0.9}):
            pass
    with directory_with(source, [], {"test.f1": 0.1}) as copy:
        assert dict(metric_numbers(Facts.parse((copy / "loraplex.json").read_bytes()).metrics)) == {"test.f1": 0.1}


def test_a_name_that_no_search_can_ask_for_is_none() -> None:
    for text in ("f1 macro=0.5", "é=1", "n" * 129 + "=1"):
        with pytest.raises(FactsMalformed, match="is no metric's name"):
            metric_facts([text])


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "lr=0.1" / "m.json").write_text('{"f1": 0.5}')
    assert metric_facts(["lr=0.1/m.json", "lr=0.1"]) == {"f1": 0.5, "lr": 0.1}


def test_what_is_no_adapter_is_refused_by_its_own_name(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a")
    with Hub.open(str(tmp_path / "hub")) as hub:
        for make in (
            lambda path: path.symlink_to("/etc/passwd"),
            lambda path: os.mkfifo(path),
            lambda path: path.mkdir(),
        ):
            for name in ("README.md", "loraplex.json"):
                strange = source / name
                make(strange)
                with pytest.raises(UnexpectedFile, match=f"{name} is "):
                    push(hub, source, [], {"f1": 0.8})
                strange.rmdir() if strange.is_dir() and not strange.is_symlink() else strange.unlink()
        (source / "adapter_model.safetensors").unlink()
        with pytest.raises(Exception, match=str(source)) as refused:
            push(hub, source, [], {"f1": 0.8})
        assert ".a-" not in str(refused.value)
