"""One hub, killed over and over: SIGKILL at random steps of push, tag, rm and gc. 1,000 times with
LORAPLEX_FAULTS=full; by default a slice of that."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hub.hub import Hub
from tests.faults.full import FULL, times
from tests.hub.making import lora_tensors, write_adapter

KILLS = times(1000, 20)
LIVES = times(20, 12)  # between two looks at the hub


@pytest.mark.timeout(3000 if FULL else 120)
def test_a_hub_killed_a_thousand_times_lost_nothing_it_acknowledged(tmp_path: Path) -> None:
    sources = [str(write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed))) for seed in range(8)]
    program = Path(__file__).with_name("dying_hub.py")
    seed = random.SystemRandom().randrange(2**32)
    dice = random.Random(seed)
    root = tmp_path / "hub"
    kills = lives = 0
    died_at: dict[str, int] = {}
    known: dict[str, int] = {}  # source → version, acknowledged and never removed since
    with Hub.open(str(root)) as hub:
        known[sources[0]] = hub.push(sources[0], "team/x").version.number
    while kills < KILLS:
        plan = [[dice.randrange(80), *writes(dice, sources)] for _ in range(LIVES)]
        done = subprocess.run(
            [sys.executable, str(program), "--same", str(root), json.dumps(plan)],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        lives += LIVES
        for line in done.stdout.splitlines():
            outcome = json.loads(line)
            if outcome["killed"]:
                kills += 1
                last = outcome["steps"][-1] if outcome["steps"] else "begin"
                died_at[last] = died_at.get(last, 0) + 1
            for pushed in outcome["pushed"]:
                known[pushed["directory"]] = pushed["number"]
            for number in outcome["may be gone"]:
                known = {source: held for source, held in known.items() if held != number}
        look(root, known, sources, seed)
    print(f"\nseed {seed}: {kills} kills in {lives} lives, after " + ", ".join(f"{s} {n}" for s, n in died_at.items()))
    assert {"blob:write", "blob:link", "catalog:event", "catalog:committed", "journal:write"} <= set(
        died_at
    ) or not FULL


def writes(dice: random.Random, sources: list[str]) -> list[list[str]]:
    """A life's work, whatever the hub holds by then."""
    verbs = [
        lambda: ["push", dice.choice(sources), *dice.choice([[], ["prod"]])],
        lambda: ["push", dice.choice(sources)],
        lambda: ["tag", "team/x:latest", dice.choice(["prod", "canary"])],
        lambda: ["rm", "oldest"],
        lambda: ["gc"],
    ]
    return [dice.choice(verbs)() for _ in range(4)]


def look(root: Path, known: dict[str, int], sources: list[str], seed: int) -> None:
    """Everything acknowledged is there and right; whatever died is swept; the hub goes on."""
    with Hub.open(str(root)) as hub:
        assert {problem.reason for problem in hub.fsck()} <= {"JOURNAL_BEHIND"}, seed
        there = {version.number: version for version in hub.versions()}
        for source, number in known.items():
            weights = (Path(source) / "adapter_model.safetensors").read_bytes()
            assert hub.read_file(there[number], "adapter_model.safetensors") == weights, (seed, source, number)
        events = hub.events(0, 10**6)
        assert [event.seq for event in events] == list(range(1, len(events) + 1)), seed
        hub.push(sources[0], "team/x")
        hub.sweep(retention_seconds=10**6, grace_seconds=0)
        assert hub.verify() == hub.fsck() == [], seed
        assert list((root / "blobs" / "staging").iterdir()) == [], seed
        known[sources[0]] = hub.push(sources[0], "team/x").version.number
