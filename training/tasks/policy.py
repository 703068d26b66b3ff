"""IAM policies as answers: parsed strictly, judged by parliament, compared by what they grant."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Hashable, Iterator
from typing import Any, Final

# Findings that mean AWS would refuse the policy or it would not do what it says; the rest is advice.
_WRONG: Final = frozenset(
    {
        "UNKNOWN_ACTION",
        "UNKNOWN_PREFIX",
        "UNKNOWN_OPERATOR",
        "RESOURCE_MISMATCH",
        "UNKNOWN_CONDITION_FOR_ACTION",
        "MALFORMED",
        "MALFORMED_JSON",
        "INVALID_ARN",
    }
)
_FENCE: Final = re.compile(r"^```(?:json)?\s*\n(.*?)\n?```$", re.DOTALL)

Grant = tuple[str, str, str, str]  # effect, action (lower case, wildcards expanded), resource, condition as JSON


def parse_json(answer: str) -> Any | None:
    """The answer as JSON, a code fence around it allowed; None when it is not JSON and nothing else."""
    text = answer.strip()
    fenced = _FENCE.match(text)
    try:
        return json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return None


def is_valid(policy: Any) -> bool:
    """Whether parliament finds nothing wrong with it that would make AWS refuse it."""
    if not isinstance(policy, dict) or not all(_well_formed(statement) for statement in _statements(policy)):
        return False
    parliament = _parliament()
    try:
        judged = parliament.analyze_policy_string(json.dumps(policy))
        issues = {finding.issue for finding in judged.findings}
    except Exception:  # parliament raises plain Exception, and KeyError and others on types it does not know
        return False
    return not issues & _WRONG


def grants(policy: Any) -> frozenset[Grant] | None:
    """What the policy says, one tuple for each action and resource; None when it is no policy of Allow and Deny."""
    if not isinstance(policy, dict):
        return None
    found: set[Grant] = set()
    for statement in _statements(policy):
        if not isinstance(statement, dict) or statement.get("Effect") not in ("Allow", "Deny"):
            return None
        names, resources = _texts(statement.get("Action")), _texts(statement.get("Resource"))
        if not names or not resources:
            return None
        condition = json.dumps(statement.get("Condition") or {}, sort_keys=True)
        for name in names:
            for action in _expanded(name):
                found.update((statement["Effect"], action, resource, condition) for resource in resources)
    return frozenset(found)


def action_f1(wanted: frozenset[Grant] | None, given: frozenset[Grant] | None) -> float:
    """F1 of the actions with their effects, whatever the resource; 0 where either is no policy.

    What `given` denies counts only where `wanted` denies something.
    """
    if wanted is None or given is None:
        return 0.0
    effects = {"Allow", *(effect for effect, *_ in wanted)}
    first, second = (
        frozenset((effect, action) for effect, action, *_ in policy if effect in effects) for policy in (wanted, given)
    )
    return f1(first, second)


def f1(wanted: frozenset[Hashable], given: frozenset[Hashable]) -> float:
    """Harmonic mean of precision and recall of `given` as a set."""
    if not wanted and not given:
        return 1.0
    return 2 * len(wanted & given) / (len(wanted) + len(given))


def _statements(policy: dict[str, Any]) -> list[Any]:
    statements = policy.get("Statement")
    return statements if isinstance(statements, list) and statements else [statements]


def _well_formed(statement: object) -> bool:
    """What parliament takes for granted: effect, actions and resources, each of its type."""
    return (
        isinstance(statement, dict)
        and statement.get("Effect") in ("Allow", "Deny")
        and any(_texts(statement.get(key)) for key in ("Action", "NotAction"))
        and any(_texts(statement.get(key)) for key in ("Resource", "NotResource"))
    )


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    return texts if len(texts) == len(values) else []


def _expanded(action: str) -> Iterator[str]:
    if "*" not in action and "?" not in action:
        yield action.lower()
        return
    try:
        matches = _parliament().expand_action(action, raise_exceptions=False)
    except ValueError:  # not "service:action"
        matches = []
    if not matches:
        yield action.lower()
    for match in matches:
        yield f"{match['service']}:{match['action']}".lower()


def _parliament() -> Any:
    with warnings.catch_warnings():
        # It imports pkg_resources, which setuptools is going to remove, and leaves two files unclosed.
        warnings.filterwarnings("ignore", message=".*pkg_resources", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*pkg_resources", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=ResourceWarning)
        import parliament
    return parliament
