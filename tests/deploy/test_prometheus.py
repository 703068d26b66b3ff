"""The Prometheus files mean something to Prometheus, and name only metrics that the server has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from server.metrics import Metrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "rules" / "loraplex.yml"


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


def test_rules_name_only_metrics_of_the_server() -> None:
    text = RULES.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![:\w])loraplex_\w+", text))  # not after a colon: those are names of recorded rules

    assert named
    assert named <= _series_names(), f"unknown: {sorted(named - _series_names())}"


def _series_names() -> set[str]:
    from server.engine.observer import EngineSnapshot

    metrics = Metrics()
    metrics.attach(EngineSnapshot, lambda: {"host": 0, "device": 0})
    names = set()
    for family in metrics.registry.collect():
        suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(family.type, ("",))
        names.update(family.name + suffix for suffix in suffixes)
        names.add(family.name)  # as alerts' texts call a histogram
    return names
