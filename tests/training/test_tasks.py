"""The builders on the real packages: disjoint, repeatable, labelled as described."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from training.build import build_task
from training.data import read_jsonl
from training.errors import DataTooSmall, SourceUnavailable, UnknownTask
from training.tasks import MODULES, packages, sentiment, task_named
from training.tasks.archive import read_member
from training.tasks.aws_summary import operations, plain_text
from training.tasks.iam_definition import actions
from training.tasks.policy import is_valid
from training.tasks.split import split_by_group


@pytest.mark.parametrize("name", MODULES)
def test_a_build_is_repeatable_and_grows_at_its_end(name: str, tmp_path: Path) -> None:
    small = build_task(name, tmp_path / "small", 12, 6, 0)
    again = build_task(name, tmp_path / "again", 12, 6, 0)
    larger = build_task(name, tmp_path / "larger", 30, 6, 0)
    other = build_task(name, tmp_path / "other", 12, 6, 1)
    assert small.card == again.card
    for file, entry in small.card["files"].items():
        dataset = read_jsonl(tmp_path / "small" / file)
        assert (dataset.digest, len(dataset)) == (entry["digest"], entry["examples"])
    assert small.card["files"]["train.jsonl"]["examples"] == 12
    assert small.card["files"]["eval.jsonl"] == larger.card["files"]["eval.jsonl"]
    assert small.card["files"]["train.jsonl"]["digest"] != other.card["files"]["train.jsonl"]["digest"]
    assert small.card["provenance"] and small.card["licence"]
    shorter, longer = (read_jsonl(tmp_path / size / "train.jsonl").examples for size in ("small", "larger"))
    assert longer[:12] == shorter
    evaluation = read_jsonl(tmp_path / "small" / "eval.jsonl").examples
    assert not {example.prompt for example in longer} & {example.prompt for example in evaluation}


def test_asking_for_too_much_or_for_nothing_known_is_refused() -> None:
    with pytest.raises(DataTooSmall, match="1000000"):
        task_named("aws-summary").build(1_000_000, 1, 0)
    with pytest.raises(UnknownTask, match="sentiment"):
        task_named("poetry")


def test_groups_do_not_meet() -> None:
    items = [f"{group}/{number}" for group in range(40) for number in range(5)]
    train, held = split_by_group(
        items, group=lambda i: i.split("/")[0], identity=lambda i: i, train=100, evaluation=20, seed=3
    )
    assert len(set(train)) == 100 and len(set(held)) == 20
    assert not {i.split("/")[0] for i in train} & {i.split("/")[0] for i in held}


def test_labels_follow_the_ratings() -> None:
    assert sentiment.label_of([3, 2, 1, 2]) == "positive"
    assert sentiment.label_of([-3, -2, 1, -2]) == "negative"
    assert sentiment.label_of([0, 0, 1, 0, -1, 0, 0, 1]) == "neutral"
    assert sentiment.label_of([3, 2, -2, -3, 0, 0]) == "mixed"
    assert sentiment.label_of([1, 1, 1, -1, -1, -1, 4, 4, 4, 4]) == "mixed"  # opposed raters, whatever the mean


def test_the_snippets_are_the_published_ones() -> None:
    found = list(sentiment.snippets())
    counts = Counter(snippet.label for snippet in found)
    assert 23_000 < len(found) <= 23_703
    assert set(counts) == set(sentiment.LABELS)
    assert 500 < counts["mixed"] < counts["neutral"] < counts["negative"] < counts["positive"]
    corpora = Counter(snippet.id.split("/")[0] for snippet in found)
    assert set(corpora) == {"amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets"}
    documents = {snippet.document for snippet in found if snippet.id.startswith("nyt")}
    assert 490 < len(documents) <= 500  # editorials, of about ten sentences each


def test_every_gold_policy_is_valid_and_unseen_actions_are_asked_for(tmp_path: Path) -> None:
    built = task_named("iam-policy").build(60, 20, 0)
    names = []
    for side in (built.train, built.evaluation, *built.apart.values()):
        policies = [json.loads(example.answer) for example in side]
        assert all(is_valid(policy) for policy in policies)
        names.append({name for policy in policies for s in policy["Statement"] for name in s["Action"]})
    assert not names[0] & names[1]
    assert len(built.apart["eval-sam-templates"]) > 50
    assert all("${" not in example.answer for example in built.apart["eval-sam-templates"])
    several = [e for e in built.train if len(json.loads(e.answer)["Statement"][0]["Action"]) == 2]
    assert 5 <= len(several) <= 30
    for example in built.train:
        resource = json.loads(example.answer)["Statement"][0]["Resource"]
        assert resource == "*" or resource in example.prompt[-1].content


def test_descriptions_come_from_the_list_of_actions() -> None:
    described, version = actions()
    get = next(action for action in described if action.full_name == "s3:GetObject")
    assert get.phrase == "retrieve objects from Amazon S3"
    assert get.arns[0] == "arn:${Partition}:s3:::${BucketName}/${ObjectName}"
    assert len(described) > 15_000 and version


def test_summaries_join_two_packages() -> None:
    found = list(operations())
    assert len(found) > 2_000 and len({operation.service for operation in found}) > 150
    assert all(300 <= len(operation.documentation) <= 2500 for operation in found)
    assert all(len(operation.summary.split()) >= 6 for operation in found)
    assert len({operation.summary.lower() for operation in found}) == len(found)
    assert plain_text("<p>Lists <a href='x'>queues</a> , at most 1 &amp; 2.</p>\n<p>Next</p>") == (
        "Lists queues, at most 1 & 2. Next"
    )


def test_another_archive_than_the_pinned_one_is_refused_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fake(distribution: str, version: str, directory: Path) -> Path:
        path = directory / "a.tar.gz"
        path.write_bytes(b"something else")
        return path

    monkeypatch.setattr(packages, "_downloaded", fake)
    with pytest.raises(SourceUnavailable, match="not the pinned one"):
        packages.source_archive("some", "1.0", "0" * 64)
    assert not list(tmp_path.rglob("*.tar.gz"))
    with pytest.raises(SourceUnavailable, match="pip install nothing-here"):
        packages.installed_directory("nothing_here", "nothing-here")


@pytest.mark.parametrize("kind", ["link", "absent", "large"])
def test_members_are_read_as_plain_bounded_files_only(kind: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("member" if kind != "absent" else "other")
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        else:
            member.size = 10
        archive.addfile(member, io.BytesIO(b"0123456789"))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive, pytest.raises(SourceUnavailable, match="member"):
        read_member(archive, "member", limit=9)
