"""Weighted aliases, rollback and promotion, over both catalog engines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.canary import pick, primary
from hub.errors import (
    AliasMoved,
    AliasNotFound,
    GateMalformed,
    GateRefused,
    NothingToRollBack,
    QueryInvalid,
    RefInvalid,
    VersionNotFound,
)
from hub.facts import Facts
from hub.gate import Gate
from hub.hub import Hub
from hub.refs import AdapterRef, Digest
from hub.versions import Target
from tests.hub.making import lora_tensors, write_adapter

WEIGHTS = st.dictionaries(st.integers(1, 50), st.integers(1, 1_000_000), min_size=1, max_size=6)


def adapter(tmp_path: Path, seed: int, **metrics: Any) -> Path:
    directory = write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))
    if metrics:
        Facts(metrics=metrics).write(directory)
    return directory


def targets(weights: dict[int, int]) -> list[Target]:
    return [Target(number, Digest.of_hex("0" * 64), weight) for number, weight in weights.items()]


def picked(weights: dict[int, int], key: str) -> int:
    return pick(targets(weights), "team/x", "prod", key).version


@given(WEIGHTS, st.text())
def test_a_key_gets_one_of_the_versions_whatever_their_order(weights: dict[int, int], key: str) -> None:
    number = picked(weights, key)
    assert number in weights
    assert number == picked(dict(reversed(weights.items())), key)
    assert picked({7: 3}, key) == 7


@given(WEIGHTS, st.integers(1, 1_000_000), st.data())
def test_moving_share_to_the_newest_moves_nobody_between_the_others(
    weights: dict[int, int], more: int, data: st.DataObject
) -> None:
    """The total stays, the newest takes from the one before it: only keys of that one move, and only to the newest."""
    newest = max(weights) + 1
    before = {**weights, newest: 5}
    giver = max(weights)
    more = min(more, weights[giver] - 1)
    after = {**before, giver: weights[giver] - more, newest: 5 + more}
    for key in data.draw(st.lists(st.text(), max_size=30)):
        old, new = picked(before, key), picked(after, key)
        assert new == old or (old, new) == (giver, newest)


def test_shares_are_those_of_the_weights_and_the_rule_is_the_one_that_format_md_gives() -> None:
    weights = {3: 90, 4: 10}
    keys = [f"user-{number}" for number in range(20_000)]
    share = sum(picked(weights, key) == 4 for key in keys) / len(keys)
    assert abs(share - 0.1) < 0.01
    for key in keys[:50]:  # written again from docs/FORMAT.md
        number = int(hashlib.sha256(b"team/x:prod\0" + key.encode()).hexdigest()[:16], 16)
        assert picked(weights, key) == (3 if number * 100 // 2**64 < 90 else 4)
    others = sum(pick(targets(weights), "team/x", "other", key).version == picked(weights, key) for key in keys)
    assert others < 0.9 * len(keys)  # another alias draws anew


def test_without_a_key_the_heaviest_is_taken_and_of_equals_the_oldest() -> None:
    assert primary(targets({3: 90, 4: 10})).version == 3
    assert primary(targets({5: 1, 4: 1})).version == 4


def test_a_split_alias_resolves_by_key_and_sticks(hub: Hub, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        hub.push(adapter(tmp_path, seed), "x")
    state = hub.split([("x@1", 70), ("x@3", 30)], "prod")
    assert [(target.version, target.weight) for target in state.targets] == [(1, 70), (3, 30)]
    assert hub.aliases("x")["prod"] == state
    assert hub.resolve("x:prod").number == 1
    found = {key: hub.resolve("x:prod", key=key).number for key in map(str, range(60))}
    assert set(found.values()) == {1, 3}
    assert found == {key: pick(state.targets, "x", "prod", key).version for key in found}
    assert {hub.resolve("x@2", key=key).number for key in found} == {2}
    assert hub.events()[-1].after == ((1, 70), (3, 30))
    assert hub.events()[-1].version == 1


def test_compare_and_swap_on_a_split_alias(hub: Hub, tmp_path: Path) -> None:
    for seed in (1, 2):
        hub.push(adapter(tmp_path, seed), "x")
    with pytest.raises(AliasMoved):
        hub.split([("x@1", 1), ("x@2", 1)], "prod", expect=1)
    hub.split([("x@1", 1), ("x@2", 1)], "prod", expect=0)
    with pytest.raises(AliasMoved, match="split over versions 1, 2"):
        hub.tag("x@1", "prod", expect=1)
    last = hub.last_seq()
    hub.split([("x@2", 1), ("x@1", 1)], "prod")
    assert hub.last_seq() == last  # that is what it holds
    assert hub.tag("x@2", "prod").number == 2
    assert hub.aliases("x")["prod"].targets[0].weight == 1
    assert hub.untag("x", "prod", expect=2).number == 2


@pytest.mark.parametrize(
    "wanted",
    [[], [("x@1", 0)], [("x@1", -1)], [("x@1", 10**7)], [("x@1", True)], [("x@1", 1.5)], [("x@1", 1), ("x@1", 2)],
     [("x@1", 1), ("y@1", 1)]],
)  # fmt: skip
def test_weights_are_whole_and_versions_of_one_adapter_once(hub: Hub, tmp_path: Path, wanted: Any) -> None:
    for name in ("x", "y"):
        hub.push(adapter(tmp_path, 1), name)
    with pytest.raises(QueryInvalid):
        hub.split(wanted, "prod")


def test_the_same_version_by_two_names_is_still_the_same(hub: Hub, tmp_path: Path) -> None:
    hub.push(adapter(tmp_path, 1), "x:stable")
    with pytest.raises(QueryInvalid, match="twice"):
        hub.split([("x@1", 1), ("x:stable", 2)], "prod")


def test_rollback_goes_back_move_by_move(hub: Hub, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        hub.push(adapter(tmp_path, seed), "x")
    for ref in ("x@1", "x@2", "x@3"):
        hub.tag(ref, "prod")
    hub.split([("x@3", 9), ("x@1", 1)], "prod")
    assert hub.rollback("x", "prod").targets[0].version == 3
    assert hub.rollback("x", "prod", expect=3).version == 2
    hub.tag("x@3", "prod")  # a move after a rollback starts from there
    assert [hub.rollback("x", "prod").version for _ in range(2)] == [2, 1]
    with pytest.raises(NothingToRollBack):
        hub.rollback("x", "prod")
    assert [event.note for event in hub.events() if event.alias == "prod"].count("rollback") == 4
    with pytest.raises(AliasMoved):
        hub.rollback("x", "prod", expect=2)
    with pytest.raises(AliasNotFound):
        hub.rollback("x", "never-was")


def test_rollback_brings_an_alias_back_and_not_a_removed_version(hub: Hub, tmp_path: Path) -> None:
    for seed in (1, 2):
        hub.push(adapter(tmp_path, seed), "x")
    hub.split([("x@1", 1), ("x@2", 3)], "prod")
    hub.untag("x", "prod")
    assert [(target.version, target.weight) for target in hub.rollback("x", "prod").targets] == [(1, 1), (2, 3)]
    hub.tag("x@2", "prod")
    hub.remove("x@1")
    with pytest.raises(VersionNotFound, match="x@1 was removed"):
        hub.rollback("x", "prod")
    assert hub.resolve("x:prod").number == 2


def test_promotion_reads_the_recorded_metrics(hub: Hub, tmp_path: Path) -> None:
    hub.push(adapter(tmp_path, 1, f1=0.81, test={"loss": 1.0}), "x:prod")
    hub.push(adapter(tmp_path, 2, f1=0.80, test={"loss": 1.1}), "x")
    hub.push(adapter(tmp_path, 3, f1=0.85, test={"loss": 0.9}), "x")
    hub.push(adapter(tmp_path, 4), "x")
    gate = Gate.parse(b'require = ["f1 > 0.5"]\nno_lower = {f1 = 0.005}\nno_higher = {"test.loss" = 0}')
    with pytest.raises(GateRefused) as caught:
        hub.promote("x@2", "prod", gate)
    assert "f1 0.8 >= 0.805 (x@1 has 0.81)" in str(caught.value)
    assert "test.loss 1.1 <= 1 (x@1 has 1)" in str(caught.value)
    with pytest.raises(GateRefused, match="f1 is not recorded"):
        hub.promote("x@4", "prod", gate)
    assert hub.resolve("x:prod").number == 1
    done = hub.promote("x@3", "prod", gate)
    assert (done.version.number, done.before and done.before.number, len(done.passed)) == (3, 1, 3)
    assert hub.resolve("x:prod").number == 3
    assert (hub.events()[-1].note or "").startswith("promote: f1 0.85 > 0.5")
    assert hub.promote("x@2", "new", gate).before is None


@pytest.mark.parametrize(
    ("had", "have", "gate", "passes"),
    [
        (0.8, 0.7, "no_lower = {f1 = 0.1}", True),  # 0.8 - 0.1 is 0.7000000000000001
        (0.8, 0.6999999999999, "no_lower = {f1 = 0.1}", False),
        (0.1, 0.3, "no_higher = {f1 = 0.2}", True),
        (0.2, 0.3, "no_higher = {f1 = 0.1}", True),
        (0.2, 0.30000000000000004, "no_higher = {f1 = 0.1}", False),
    ],
)
def test_a_fall_of_exactly_the_slack_passes(
    local_hub: Hub, tmp_path: Path, had: float, have: float, gate: str, passes: bool
) -> None:
    local_hub.push(adapter(tmp_path, 1, f1=had), "x:prod")
    local_hub.push(adapter(tmp_path, 2, f1=have), "x")
    if passes:
        local_hub.promote("x@2", "prod", Gate.parse(gate.encode()))
        return
    with pytest.raises(GateRefused, match=f"f1 {have!r} [<>]= 0.[37] "):
        local_hub.promote("x@2", "prod", Gate.parse(gate.encode()))


def test_a_promotion_that_compared_with_an_outdated_alias_is_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2, 3):
        hub.push(adapter(tmp_path, seed, f1=seed / 10), "x")
    hub.tag("x@1", "prod")
    gate = Gate.parse(b'{"no_lower": {"f1": 0}}')
    check = Gate.check

    def meanwhile(*arguments: Any) -> Any:
        hub.tag("x@3", "prod")
        return check(*arguments)

    monkeypatch.setattr(Gate, "check", meanwhile)
    with pytest.raises(AliasMoved):
        hub.promote("x@2", "prod", gate)
    assert hub.resolve("x:prod").number == 3


@pytest.mark.parametrize(
    "text",
    ["", "x", "require = 3", "require = ['f1']", "require = ['f1 > nan']", "require = [3]", "other = 1",
     "no_lower = {f1 = -1}", "no_lower = {f1 = 'x'}", "no_lower = {f1 = true}", "no_lower = 3", '{"require": []}',
     '{"require": ["f1 > 1"], "require": []}', "no_lower = {f1 = inf}", "#" * 70_000],
)  # fmt: skip
def test_a_gate_that_asks_for_nothing_or_nonsense_is_refused(text: str) -> None:
    with pytest.raises(GateMalformed):
        Gate.parse(text.encode())


def test_a_gate_is_toml_or_json(tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_text("require = ['f1 >= 0.8']")
    (tmp_path / "gate.json").write_text(json.dumps({"require": ["f1>=0.8"]}))
    assert Gate.read(tmp_path / "gate.toml") == Gate.read(tmp_path / "gate.json")
    with pytest.raises(GateMalformed):
        Gate.read(tmp_path / "missing")


def test_names_are_parsed_before_anything_is_read(hub: Hub) -> None:
    for call in (
        lambda: hub.rollback("../x", "prod"),
        lambda: hub.rollback("x", "../prod"),
        lambda: hub.split([("../x", 1)], "prod"),
        lambda: hub.split([(AdapterRef(None, "x"), 1)], "../prod"),
        lambda: hub.remove("../x"),
        lambda: hub.restore("../x"),
        lambda: hub.lease("../x", "me"),
        lambda: hub.lease("x", "a\nb"),
        lambda: hub.release("x", ""),
    ):
        with pytest.raises(RefInvalid):
            call()
