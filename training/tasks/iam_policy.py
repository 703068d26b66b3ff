"""IAM policies from a sentence: synthetic requests made of real descriptions, with exact gold answers.

The request is worded from the action's own description and names the resource; the answer is the policy that grants
exactly that. Actions of the evaluation never occur in training. A second evaluation set, reported apart, is made of
the policy templates that people wrote for the AWS Serverless Application Model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from training.data import Example
from training.errors import DataInvalid, DataTooSmall, SourceUnavailable
from training.metrics import Measured, mean
from training.tasks import Answers, Built, Task
from training.tasks.iam_definition import Action, actions
from training.tasks.json_answers import check_objects
from training.tasks.packages import installed_directory
from training.tasks.policy import action_f1, grants, is_valid, parse_json
from training.tasks.split import RANKS, is_held, rank, split_by_group

INSTRUCTION: Final = "Write the AWS IAM policy as compact JSON."
APART: Final = "eval-sam-templates"

_WORDINGS: Final = (
    "Allow to {phrase} on {resource}",
    "Let the role {phrase}. Resource: {resource}",
    "I need to {phrase}, only on {resource}",
    "A policy for {resource}: {phrase}",
)
_NAMES: Final = ("orders", "billing", "reports", "web", "staging", "archive", "metrics", "team-a", "catalog", "audit")
_REGIONS: Final = ("us-east-1", "eu-west-1", "ap-south-1", "*")
_ACCOUNTS: Final = ("111122223333", "123456789012", "*")
_SECOND_ACTION_SHARE: Final = 0.25
_MAX_PHRASE_CHARS: Final = 120


class IamPolicy(Task):
    """Sentence → policy."""

    name = "iam-policy"
    title = "request in words → AWS IAM policy in JSON"
    max_new_tokens = 120
    headline = "policy_accuracy"
    answers: Answers = "json"

    def build(self, train: int, evaluation: int, seed: int) -> Built:
        """See `Task.build`; each gold policy has passed parliament."""
        described, version = actions()
        # By name: the list has some actions twice.
        once = {action.full_name: action for action in reversed(described)}
        usable = [
            action
            for action in described
            if action is once[action.full_name] and action.phrase and len(action.phrase) <= _MAX_PHRASE_CHARS
        ]
        # More than wanted, for those whose gold parliament refuses.
        sides = split_by_group(
            usable,
            group=lambda action: action.name,  # one name in several services is one thing to learn
            identity=lambda action: action.full_name,
            train=_with_spare(train),
            evaluation=_with_spare(evaluation),
            seed=seed,
        )
        # Second actions come from the same side, whether sampled or not, so that the sides stay apart.
        partners = [_by_service([a for a in usable if is_held(seed, a.name) == side]) for side in (False, True)]
        training, held = (
            _first(_requests(side, pool, seed), wanted)
            for side, pool, wanted in zip(sides, partners, (train, evaluation), strict=True)
        )
        sam, sam_version = sam_templates()
        return Built(
            training,
            held,
            provenance=f"synthetic from real: requests worded from the IAM action descriptions shipped in parliament "
            f"{version}, resources filled into their ARN templates; {APART} from the human-written policy templates "
            f"of aws-sam-translator {sam_version}",
            licence="BSD-3-Clause (parliament), Apache-2.0 (aws-sam-translator)",
            apart={APART: sam},
        )

    def check(self, examples: Sequence[Example]) -> None:
        """See `Task.check`: a wanted answer that is no object, or no policy that `grants` reads."""
        check_objects(examples)
        for number, example in enumerate(examples, 1):
            if grants(json.loads(example.answer)) is None:
                raise DataInvalid(
                    f"the answer of example {number} is no policy that {self.name} can score: each statement needs "
                    "Effect (Allow or Deny), Action and Resource; NotAction and NotResource cannot be compared, so "
                    "score such policies with the task own-json"
                )

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
        """Shares of exactly right policies, valid JSON and valid policies, and the mean F1 of the action sets."""
        parsed = [parse_json(answer) for answer in answers]
        wanted = [grants(json.loads(example.answer)) for example in examples]
        pairs = list(zip(wanted, map(grants, parsed), strict=True))
        return {
            "policy_accuracy": mean([g is not None and g == w for w, g in pairs]),
            "action_f1": mean([action_f1(w, g) for w, g in pairs]),
            "valid_json": mean([policy is not None for policy in parsed]),
            "valid_policy": mean([is_valid(policy) for policy in parsed]),
        }


TASK = IamPolicy()


def policy_text(names: Sequence[str], resource: str) -> str:
    """A policy of one statement, as compact JSON."""
    statement = {"Effect": "Allow", "Action": list(names), "Resource": resource}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]}, separators=(",", ":"))


def sam_templates() -> tuple[tuple[Example, ...], str]:
    """(the valid policy templates of aws-sam-translator with their parameters filled in, its version)."""
    directory, version = installed_directory("samtranslator", "aws-sam-translator")
    file = directory / "policy_templates_data" / "policy_templates.json"
    try:
        templates = json.loads(file.read_text("utf-8"))["Templates"]
    except OSError as error:
        raise SourceUnavailable("the installed aws-sam-translator has no policy_templates.json") from error
    found = []
    for name, template in templates.items():
        values = {parameter: _kebab(parameter) for parameter in template.get("Parameters", {})}
        policy = {"Version": "2012-10-17", **_resolved(template["Definition"], values)}
        given = "".join(f" {parameter}: {value}." for parameter, value in values.items())
        request = f"{template['Description'].rstrip('.')}.{given} Region us-east-1, account 123456789012."
        if is_valid(policy):
            answer = json.dumps(policy, separators=(",", ":"))
            found.append(Example.of(system=INSTRUCTION, user=request, answer=answer, gold={"template": name}))
    return tuple(found), version


def _requests(side: Sequence[Action], partners: dict[str, list[Action]], seed: int) -> Iterator[Example]:
    for action in side:
        resource = _filled(action.arns[0], seed, action.full_name) if action.arns else "*"
        chosen = [action]
        others = [
            other
            for other in partners[action.prefix]
            if other is not action and other.arns[:1] == action.arns[:1] and other.name != action.name
        ]
        if others and rank(seed, "second", action.full_name) < _SECOND_ACTION_SHARE * RANKS:
            chosen.append(others[rank(seed, "partner", action.full_name) % len(others)])
        answer = policy_text([one.full_name for one in chosen], resource)
        if not is_valid(json.loads(answer)):
            continue
        wording = _WORDINGS[rank(seed, "wording", action.full_name) % len(_WORDINGS)]
        where = resource if action.arns else f"all {action.prefix} resources"
        phrase = " and ".join(one.phrase or "" for one in chosen)
        yield Example.of(system=INSTRUCTION, user=wording.format(phrase=phrase, resource=where), answer=answer)


def _by_service(pool: Sequence[Action]) -> dict[str, list[Action]]:
    found: dict[str, list[Action]] = {}
    for action in pool:
        found.setdefault(action.prefix, []).append(action)
    return found


def _with_spare(wanted: int) -> int:
    return wanted + wanted // 4 + 8


def _first(examples: Iterator[Example], wanted: int) -> tuple[Example, ...]:
    taken = tuple(example for example, _ in zip(examples, range(wanted), strict=False))
    if len(taken) < wanted:
        raise DataTooSmall(f"only {len(taken)} of {wanted} policies are valid")
    return taken


def _filled(template: str, seed: int, key: str) -> str:
    """An ARN from its template: partition aws, one region or any, one account or any, short names."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name == "Partition":
            return "aws"
        choices = {"Region": _REGIONS, "Account": _ACCOUNTS}.get(name, _NAMES)
        return choices[rank(seed, "arn", key, name) % len(choices)]

    return re.sub(r"\$\{([^}]*)\}", value, template)


def _resolved(value: Any, parameters: dict[str, str]) -> Any:
    """CloudFormation's Ref and Fn::Sub replaced by what they stand for."""
    match value:
        case {"Ref": str(name), **rest} if not rest:
            return parameters.get(name, _pseudo(name))
        case {"Fn::Sub": [str(text), dict(variables)], **rest} if not rest:
            return _substituted(text, {name: str(_resolved(v, parameters)) for name, v in variables.items()})
        case {"Fn::Sub": str(text), **rest} if not rest:
            return _substituted(text, parameters)
        case dict():
            return {key: _resolved(inner, parameters) for key, inner in value.items()}
        case list():
            return [_resolved(inner, parameters) for inner in value]
    return value


def _substituted(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{([^}!]*)\}", lambda match: values.get(match.group(1), _pseudo(match.group(1))), text)


def _pseudo(name: str) -> str:
    known = {"AWS::Partition": "aws", "AWS::Region": "us-east-1", "AWS::AccountId": "123456789012"}
    return known.get(name, _kebab(name))


def _kebab(name: str) -> str:
    """ "TableName" → "table-name"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()
