"""The builders on the real packages: disjoint, repeatable, labelled as described."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from training.build import build_task
from training.data import Example, read_jsonl, write_jsonl
from training.data_check import check_file
from training.errors import DataTooSmall, SourceUnavailable, UnknownTask
from training.tasks import MODULES, address_json, name_json, nl_awscli, packages, sentiment, task_named
from training.tasks.archive import read_member
from training.tasks.aws_summary import operations, plain_text
from training.tasks.awscli_command import parse_command
from training.tasks.iam_definition import actions
from training.tasks.policy import is_valid
from training.tasks.split import split_by_group
from training.tasks.tagged_text import snake_case


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


@pytest.mark.parametrize("name", ["address-json", "name-json"])
def test_records_say_what_the_text_says(name: str) -> None:
    built = task_named(name).build(400, 100, 0)
    for example in (*built.train, *built.evaluation):
        text, record = example.prompt[-1].content, json.loads(example.answer)
        values = [v for value in record.values() for v in (value if isinstance(value, list) else [value])]
        assert record and all(value and value in text for value in values)
        assert all(key == key.lower() and " " not in key for key in record)
    letters = [
        {"".join(filter(str.isalnum, e.prompt[-1].content.lower())) for e in side}
        for side in (built.train, built.evaluation)
    ]
    assert not letters[0] & letters[1]
    assert task_named(name).score(built.evaluation, [e.answer for e in built.evaluation]) == {
        "field_f1": 1.0,
        "exact_json": 1.0,
        "valid_json": 1.0,
    }


def test_the_labelled_texts_are_the_published_ones() -> None:
    assert 1_500 < len(address_json.addresses()) <= 1_626
    assert 2_800 < len(name_json.names()) <= 4_281
    by_text = {tagged.text: tagged.record for tagged in address_json.addresses()}
    assert by_text["70 State Street, Charleston, SC 29401"] == {
        "address_number": "70",
        "street_name": "State",
        "street_name_post_type": "Street",
        "place_name": "Charleston",
        "state_name": "SC",
        "zip_code": "29401",
    }
    couple = {tagged.text: tagged.record for tagged in name_json.names()}["Mr. and Mrs. JOSE R VALLADARES ARIAS"]
    assert couple["prefix_marital"] == ["Mr.", "Mrs."] and couple["surname"] == "VALLADARES ARIAS"
    assert snake_case("USPSBoxGroupID") == "usps_box_group_id"


def test_commands_are_documented_without_their_names() -> None:
    found = nl_awscli.documented()
    assert len(found) > 4_000 and len({one.command.service for one in found}) > 150
    for one in found:
        assert len(one.line) <= 200 and "\n" not in one.line and one.request.endswith(".")
        assert not re.search(
            rf"\b{re.escape(one.command.operation)}\b", one.request.split(" Values: ")[0], re.IGNORECASE
        )
        for _, value in one.command.arguments:
            assert all(word.lower() in one.request.lower() for word in value.split())
    built = nl_awscli.TASK.build(300, 80, 0)
    operations = [
        {(c.service, c.operation) for e in side if (c := parse_command(e.answer))}
        for side in (built.train, built.evaluation)
    ]
    assert not operations[0] & operations[1]
    assert set(nl_awscli.TASK.score(built.evaluation, [e.answer for e in built.evaluation]).values()) == {1.0}


def test_a_page_of_the_manual() -> None:
    page = """**To show a host**

The following ``get-host`` example shows details about the host ``web-1``. ::

    aws codestar get-host \\
        --host-arn arn:aws:host/1 \\
        --name web-1

Output::

    {"Name": "web-1"}

This ``put-it`` example puts it there, with a pipe::

    aws s3api put-it --key a | jq .

The following example uses get-host to see a thing again::

    aws codestar get-host --host-arn <the arn>
"""
    [one] = nl_awscli.examples_of(page)
    assert one.request == "Shows details about the host web-1. Values: arn:aws:host/1."
    assert one.line == "aws codestar get-host --host-arn arn:aws:host/1 --name web-1"


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("aws s3 cp a.txt s3://b/ --acl private", ("s3", "cp", {("", "a.txt s3://b/"), ("--acl", "private")})),
        (
            "$ aws ec2 run-instances --dry-run --count=2",
            ("ec2", "run-instances", {("--dry-run", ""), ("--count", "2")}),
        ),
        ("```bash\naws iam list-roles \\\n  --max-items 5\n```", ("iam", "list-roles", {("--max-items", "5")})),
        ("aws ecs wait tasks-stopped --tasks a b", ("ecs", "wait tasks-stopped", {("--tasks", "a b")})),
        ("aws ec2 create-tags --tags 'Key=a b,Value=c'", ("ec2", "create-tags", {("--tags", "Key=a b,Value=c")})),
        ("aws s3", None),
        ("aws --version now", None),
        ("aws s3 ls\naws s3 ls", None),
        ('aws s3 ls "open', None),
        ("Sure: aws s3 ls", None),
        ("", None),
    ],
)
def test_commands_are_taken_apart(answer: str, parts: tuple[str, str, set[tuple[str, str]]] | None) -> None:
    command = parse_command(answer)
    assert parts == (None if command is None else (command.service, command.operation, set(command.arguments)))


def test_the_order_of_options_does_not_matter_but_their_values_do() -> None:
    wanted = "aws ec2 create-tags --resources i-1 --tags Key=a,Value=b"
    examples = [Example.of(user="x", answer=wanted)] * 4
    answers = [
        "aws ec2 create-tags --tags Key=a,Value=b --resources i-1",
        "aws ec2 create-tags --resources i-2 --tags Key=a,Value=b",
        "aws ec2 delete-tags --resources i-1",
        "no idea",
    ]
    scores = nl_awscli.TASK.score(examples, answers)
    assert scores == pytest.approx(
        {"operation_accuracy": 0.5, "argument_f1": 2 * 4 / (8 + 5), "exact_command": 0.25, "parse_rate": 0.75}
    )


@pytest.mark.parametrize("name", ["sentiment", "iam-policy", "nl-awscli", "address-json", "name-json"])
def test_a_built_task_has_no_duplicates_and_no_leak(name: str, tmp_path: Path) -> None:
    """Found by `hub data check` in two builders: an action listed twice, "Wrong!" in training and "wrong." outside."""
    built = task_named(name).build(600, 150, 1)
    write_jsonl(path := tmp_path / "train.jsonl", built.train)
    report = check_file(path, lambda example: (1, 1), evaluation=built.evaluation, similarity=1.0, max_length=9)
    assert {fault.check for fault in report.faults} <= {"near_duplicates"}  # of the labelled addresses, a few
    assert sum(fault.count for fault in report.faults) <= 3
