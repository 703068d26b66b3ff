"""The Prometheus files mean something to Prometheus, and name only metrics that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from hub import errors
from hub.registry.metrics import RegistryMetrics
from server.api.interceptors import answer_for
from server.metrics import Metrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "rules" / "loraplex.yml"


def hub_failures(root: type[Exception] = errors.HubUnavailable) -> list[type[Exception]]:
    """The ways in which a server's hub does not give it what it asks for."""
    kinds = [each for child in root.__subclasses__() for each in hub_failures(child)]
    others = [errors.BlobCorrupt, errors.ServerBusy, errors.Unauthenticated, errors.Forbidden]
    return [root, *kinds, *(others if root is errors.HubUnavailable else ())]


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool (Debian package prometheus)")
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "deploy/prometheus.yml"],
        ["check", "rules", "deploy/rules/loraplex.yml"],
        ["test", "rules", "tests/deploy/rules_test.yml"],
    ],
    ids=["config", "rules", "rules' unit tests"],
)
def test_promtool_accepts(promtool: str, arguments: list[str]) -> None:
    done = subprocess.run([promtool, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test() -> None:
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((ROOT / "tests" / "deploy" / "rules_test.yml").read_text(encoding="utf-8"))["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]}

    assert fired == alerts


def test_rules_name_only_metrics_that_there_are() -> None:
    text = RULES.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![:\w])loraplex_\w+", text))  # not after a colon: those are names of recorded rules

    assert named
    assert named <= _series_names(), f"unknown: {sorted(named - _series_names())}"


@pytest.mark.parametrize("kind", hub_failures(), ids=lambda kind: kind.__name__)
def test_the_alert_of_a_failing_hub_knows_every_way_in_which_a_hub_fails(kind: type[Exception]) -> None:
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    alerts = {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    patterns = re.findall(r'reason=~"([^"]+)"', alerts["LoraplexHubFailing"])
    _, _, reason = answer_for(kind("what is wrong"))

    assert len(patterns) == 3
    assert all(re.fullmatch(pattern, reason) for pattern in patterns), reason


def _series_names() -> set[str]:
    from server.engine.observer import EngineSnapshot

    metrics = Metrics()
    metrics.attach(EngineSnapshot, lambda: {"host": 0, "device": 0})
    names = set()
    for family in (*metrics.registry.collect(), *RegistryMetrics().registry.collect()):
        suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(family.type, ("",))
        names.update(family.name + suffix for suffix in suffixes)
        names.add(family.name)  # as alerts' texts call a histogram
    return names
