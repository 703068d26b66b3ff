"""Metrics against the libraries that define them, and against policies made by hand."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from training.data import Example
from training.errors import DataInvalid
from training.tasks import task_named
from training.tasks.iam_policy import policy_text
from training.tasks.policy import action_f1, f1, grants, is_valid, parse_json
from training.tasks.sentiment import LABELS, parse_label

BUCKET = "arn:aws:s3:::orders"


def test_sentiment_scores_are_scikit_learns() -> None:
    generator = random.Random(0)
    wanted = generator.choices(LABELS, [5, 4, 2, 1], k=200)
    given = [label if generator.random() < 0.6 else generator.choice(LABELS) for label in wanted]
    examples = [Example.of(user="x", answer=label) for label in wanted]
    scores = task_named("sentiment").score(examples, given)
    assert scores["accuracy"] == pytest.approx(accuracy_score(wanted, given))
    assert scores["macro_f1"] == pytest.approx(f1_score(wanted, given, average="macro"))
    assert scores["parse_rate"] == 1.0


def test_answers_that_name_no_class_count_against_the_model() -> None:
    examples = [Example.of(user="x", answer="positive"), Example.of(user="y", answer="negative")]
    scores = task_named("sentiment").score(examples, ["Positive!", "I cannot say"])
    assert scores == {"accuracy": 0.5, "macro_f1": 0.5, "parse_rate": 0.5}


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("negative", "negative"),
        (" The sentiment is Mixed.", "mixed"),
        ("NEUTRAL, not positive", "neutral"),
        ("unmixed positively", None),
        ("", None),
    ],
)
def test_the_first_class_named_is_the_answer(answer: str, label: str | None) -> None:
    assert parse_label(answer) == label


@pytest.mark.parametrize(
    ("answer", "parses"),
    [
        ('{"a": 1}', True),
        ('```json\n{"a": 1}\n```', True),
        ('{"a": 1,}', False),  # parliament would take it
        ('Here it is: {"a": 1}', False),
        ('{"a": 1} and more', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_json_is_parsed_strictly(answer: str, parses: bool) -> None:
    assert (parse_json(answer) is not None) == parses


def policy(action: object, resource: object = BUCKET, **more: object) -> dict[str, object]:
    statement = {"Effect": "Allow", "Action": action, "Resource": resource, **more}
    return {"Version": "2012-10-17", "Statement": [statement]}


@pytest.mark.parametrize(
    ("judged", "valid"),
    [
        (policy("s3:ListBucket"), True),
        (policy(["s3:ListBucket", "s3:GetBucketTagging"]), True),
        (policy("s3:ListBukket"), False),
        (policy("s33:ListBucket"), False),
        (policy("s3:GetObject"), False),  # acts on objects, the resource is a bucket
        (policy("s3:ListBucket", "no arn"), False),
        (policy("s3:ListBucket", Effect="Maybe"), False),
        (policy("s3:ListBucket", Condition={"StringBanana": {"aws:SourceIp": "1.2.3.4"}}), False),
        ({"Version": "2012-10-17"}, False),
        ({"Statement": "all"}, False),
        ([1, 2], False),
        (None, False),
        (policy(3), False),
        (policy([]), False),
        ({"Statement": [{"Effect": "Allow", "NotAction": "s3:*", "Resource": "*"}]}, True),
        (policy("glue:GetTable", "*", Condition={"ArnLike": {"glue:SecurityGroupIds": {"x": []}}}), False),
    ],
)
def test_validity_is_parliaments_word_and_never_an_exception(judged: object, valid: bool) -> None:
    assert is_valid(judged) is valid


def test_policies_are_compared_by_what_they_grant() -> None:
    one = policy(["s3:ListBucket", "s3:GetBucketTagging"])
    two = {"Statement": [policy("S3:getbuckettagging")["Statement"][0], policy("s3:ListBucket")["Statement"][0]]}  # type: ignore[index]
    assert grants(one) == grants(two)
    assert grants(one) != grants(policy("s3:ListBucket"))
    assert grants(one) != grants(policy(["s3:ListBucket", "s3:GetBucketTagging"], "arn:aws:s3:::other"))
    assert grants(policy("s3:ListBucket")) != grants(policy("s3:ListBucket", Effect="Deny"))
    assert grants(policy("s3:ListBucket")) != grants(policy("s3:ListBucket", Condition={"Bool": {"x": "true"}}))
    assert grants(policy("sqs:*Permission", "*")) == grants(policy(["sqs:AddPermission", "sqs:RemovePermission"], "*"))
    assert grants({"Statement": [{"Effect": "Allow", "NotAction": "s3:*", "Resource": "*"}]}) is None


def test_policy_scores_on_hand_made_answers() -> None:
    wanted = [
        policy_text(["s3:ListBucket", "s3:GetBucketTagging"], BUCKET),
        policy_text(["sqs:AddPermission"], "*"),
    ] * 2
    examples = [Example.of(user="x", answer=answer) for answer in wanted]
    answers = [
        json.dumps(policy(["s3:GetBucketTagging", "s3:ListBucket"])),  # right, in other order
        json.dumps(policy("sqs:AddPermision", "*")),  # valid JSON, unknown action
        json.dumps(policy("s3:ListBucket")),  # half of it
        "I would rather not",
    ]
    scores = task_named("iam-policy").score(examples, answers)
    assert scores == {
        "policy_accuracy": 0.25,
        "action_f1": pytest.approx((1 + 0 + 2 / 3 + 0) / 4),
        "valid_json": 0.75,
        "valid_policy": 0.5,
    }


def test_an_answer_that_is_no_policy_scores_nothing_whatever_was_wanted() -> None:
    task = task_named("iam-policy")
    for wanted in (policy("iam:CreateUser", "*", Effect="Deny"), {"Effect": "Deny", "NotAction": "iam:*"}):
        scores = task.score([Example.of(user="x", answer=json.dumps(wanted))], ["no idea"])
        assert (scores["policy_accuracy"], scores["action_f1"]) == (0.0, 0.0)


def test_denied_actions_count_where_some_are_wanted() -> None:
    allowed, denied = policy("sqs:AddPermission", "*"), policy("sqs:AddPermission", "*", Effect="Deny")
    both = {"Statement": [allowed["Statement"][0], denied["Statement"][0]]}  # type: ignore[index]

    def score(wanted: object, given: object) -> float:
        return action_f1(grants(wanted), grants(given))

    assert score(denied, denied) == score(both, both) == score(allowed, both) == 1.0
    assert score(denied, allowed) == score(allowed, denied) == 0.0
    assert score(both, allowed) == score(denied, both) == pytest.approx(2 / 3)


def test_wanted_policies_that_cannot_be_compared_are_refused_before_any_answer() -> None:
    good, bad = policy("s3:ListBucket"), {"Statement": [{"Effect": "Deny", "NotAction": ["iam:*"], "Resource": "*"}]}
    examples = [Example.of(user="x", answer=json.dumps(wanted)) for wanted in (good, bad)]
    with pytest.raises(DataInvalid, match=r"the answer of example 2 is no policy.*NotAction.*own-json"):
        task_named("iam-policy").check(examples)


policy_keys = st.sampled_from(["Statement", "Action", "Effect", "Resource", "x"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(policy_keys, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)  # the first call imports a library
@given(json_values)
def test_no_answer_makes_scoring_fail(value: object) -> None:
    is_valid(value)
    action_f1(grants(policy("s3:ListBucket")), grants(value))


@settings(deadline=None)  # the first call imports a library
@given(st.lists(st.text(max_size=30) | json_values.map(json.dumps), min_size=2, max_size=2))
def test_no_answer_makes_a_task_fail(answers: list[str]) -> None:
    for name, wanted in (
        ("sentiment", "mixed"),
        ("iam-policy", policy_text(["s3:ListBucket"], BUCKET)),
        ("aws-summary", "Delete the queue that has a name"),
    ):
        task = task_named(name)
        examples = [Example.of(user="Some text. More of it.", answer=wanted)] * 2
        scores = task.score(examples, answers)
        assert task.headline in scores
        assert all(0 <= value <= 1 for metric, value in scores.items() if not metric.endswith("_count"))
        assert task.score(examples, [wanted] * 2)[task.headline] == 1.0


def test_f1_of_sets() -> None:
    assert f1(frozenset("ab"), frozenset("bc")) == 0.5
    assert f1(frozenset("ab"), frozenset()) == 0.0
    assert f1(frozenset(), frozenset()) == 1.0


def test_summary_scores_are_rouge_scores_beside_the_first_sentence() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    documents = [
        "Creates a queue. More follows. And more.",
        "This API is old. Deletes the queue of a given name. More.",
    ]
    wanted = ["Create a queue", "Delete the queue that has a name"]
    answers = ["Creates one queue", "Delete a queue"]
    examples = [Example.of(user=d, answer=w) for d, w in zip(documents, wanted, strict=True)]
    scores = task_named("aws-summary").score(examples, answers)
    own = [scorer.score(w, a)["rougeL"].fmeasure for w, a in zip(wanted, answers, strict=True)]
    lead = [
        scorer.score(w, s)["rougeL"].fmeasure
        for w, s in zip(wanted, ["Creates a queue.", "This API is old."], strict=True)
    ]
    assert scores["rouge_l"] == pytest.approx(sum(own) / 2)
    assert scores["rouge_l_lead"] == pytest.approx(sum(lead) / 2)
    assert lead[0] == 1.0 and lead[1] < 0.6
    assert scores["rouge_l_hard"] == pytest.approx(own[1])  # only the second is not answered by its first sentence
    assert scores["rouge_l_lead_hard"] == pytest.approx(lead[1])
