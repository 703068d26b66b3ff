"""Comparisons: what runs, what is kept and not run again, what the page makes of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from hub.cli import group
from hub.hub import Hub
from tests.training.continual.scripted import THREE, ScriptedScorer, ScriptedTrainer
from tests.training.continual.test_run import embedded
from training.cells import Cells
from training.cli_compare import Expected
from training.continual.compare.figures import _kept_examples, arms_of, wanted
from training.continual.compare.page import write_page
from training.continual.compare.plan import Case, Comparison
from training.continual.compare.run import Kept, alone, run_cases
from training.continual.errors import ContinualPlanInvalid, WorkTaken
from training.continual.registry import strategy_named
from training.continual.run import Run
from training.errors import DataInvalid, PlanInvalid

BACK = tuple(reversed(THREE))
ARMS: dict[str, Any] = {
    "joint": {"strategy": "joint"},
    "isolated": {"strategy": "isolated"},
    "plain": {"strategy": "sequential"},
    "replay": {"strategy": {"name": "replay", "share": 0.05}},
    "much": {"strategy": {"name": "replay", "share": 0.1}},
}
# What each arm's adapters score: a row a stage, a column a task, in the order of the run.
ROWS: dict[tuple[str, str], Sequence[Sequence[float]]] = {
    ("joint", "any"): ((0, 0, 0), (0, 0, 0), (0.8, 0.9, 0.7)),
    ("isolated", "any"): ((0.9, 0, 0), (0, 0.8, 0), (0, 0, 0.7)),
    ("plain", "told"): ((0.8, 0.2, 0.1), (0.6, 0.7, 0.3), (0.4, 0.5, 0.9)),
    ("plain", "back"): ((0.7, 0.2, 0.1), (0.6, 0.9, 0.3), (0.5, 0.8, 0.8)),
    ("replay", "told"): ((0.8, 0.2, 0.1), (0.8, 0.7, 0.3), (0.796, 0.7, 0.9)),
    ("replay", "back"): ((0.7, 0.2, 0.1), (0.7, 0.9, 0.3), (0.7, 0.896, 0.8)),
    ("much", "told"): ((0.8, 0.2, 0.1), (0.8, 0.7, 0.3), (0.9, 0.9, 0.9)),
    ("much", "back"): ((0.8, 0.2, 0.1), (0.8, 0.7, 0.3), (0.9, 0.9, 0.9)),
}
NATS = {"isolated": (1.91, 1.97, 1.905), "plain": (1.9, 1.9, 1.94)}


class Scorer(ScriptedScorer):
    """Knows the adapter of `joint` as that of the last stage; counts what it is asked, and can be stopped."""

    asked = 0
    stop_at = -1

    def stage_of(self, adapter: Path) -> int:
        return 2 if adapter.parent.name == "joint" else super().stage_of(adapter)

    def scores(self, cells: Any) -> list[dict[str, float]]:
        Scorer.asked += 1
        if Scorer.asked == Scorer.stop_at:
            raise KeyboardInterrupt
        return super().scores(cells)


class Heard:
    def __init__(self) -> None:
        self.begun = (0, 0)
        self.worked: list[str] = []
        self.done: list[str] = []

    def begin(self, cases: int, finished: int) -> None:
        self.begun = (cases, finished)

    def working(self, case: Case) -> None:
        self.worked.append(case.text)

    def finished(self, case: Case, record: Any) -> None:
        self.done.append(case.text)


@pytest.fixture(autouse=True)
def counted() -> None:
    Scorer.asked, Scorer.stop_at = 0, -1


@pytest.fixture
def write(write_plan: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """write(labels, arms, changes of the plan, **changes of the comparison) → its file, the plan beside it."""

    def made(
        labels: tuple[str, ...] = THREE, arms: Any = None, plan: dict[str, Any] | None = None, **changes: Any
    ) -> Path:
        (tmp_path / "held.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
        write_plan(labels, **{"intruders": False, "text": "held.txt", "text_windows": 1, **(plan or {})})
        told = {
            "title": "Three tasks", "question": "Which?", "plan": "plan.yaml", "arms": arms or ARMS,
            "orders": {"told": list(labels), "back": list(reversed(labels))},
            "sizes": {"small": {"seeds": [0, 1]}, "tiny": {"seeds": [0]}}, **changes,
        }  # fmt: skip
        file = tmp_path / "comparison.yaml"
        file.write_text(yaml.safe_dump(told, sort_keys=False), "utf-8")
        return file

    return made


@pytest.fixture
def compare(write: Callable[..., Path], tiny_base: Path, tmp_path: Path) -> Callable[..., Any]:
    """compare(size, **changes) → (the comparison, its files, what was heard), every run scripted."""

    def run(size: str = "small", **changes: Any) -> tuple[Comparison, Kept, Heard]:
        read, heard = Comparison.read(write(**changes), size), Heard()
        kept = Kept(Cells(tmp_path / "out" / "cells"), tmp_path / "work", "sha256:base")

        @contextmanager
        def make(case: Case, directory: Path, data: Any) -> Iterator[Run]:
            trainer: Any = ScriptedTrainer(tiny_base)
            # The second seed's adapters do a tenth better where they have learned anything.
            rows = [[min(1.0, x + 0.1 * case.seed) if x else x for x in row] for row in ROWS[case.arm, case.order]]
            scorer = Scorer(rows, NATS.get(case.arm, (1.9, 1.9, 1.91)))
            with Hub.open(str(directory / "hub")) as hub:
                embed = embedded if case.plan.strategy == "isolated" else None
                console = Console(file=io.StringIO())
                yield Run(case.plan, directory, data, trainer, scorer, hub, console, embed)

        run_cases(read.cases, kept, 1, Console(file=io.StringIO()), heard, make=make)
        return read, kept, heard

    return run


def records_of(read: Comparison, kept: Kept) -> dict[Case, Any]:
    return {case: record for case in read.cases if (record := kept.record(case)) is not None}


def test_bounds_run_once_a_seed_and_all_else_in_every_order(write: Callable[..., Path]) -> None:
    read = Comparison.read(write(), "small")
    told = [(case.arm, case.order, case.seed) for case in read.cases]
    assert told[:8] == [
        ("joint", "any", 0), ("isolated", "any", 0), ("plain", "told", 0), ("replay", "told", 0), ("much", "told", 0),
        ("plain", "back", 0), ("replay", "back", 0), ("much", "back", 0),
    ]  # fmt: skip
    assert len(told) == 16 and told[8] == ("joint", "any", 1)
    assert [case.plan.labels for case in read.cases[:6]] == [THREE] * 5 + [BACK]
    assert (read.bound("joint"), read.bound("isolated"), read.bound("osf")) == ("joint", "isolated", None)


def test_an_arm_has_settings_over_the_plans(write: Callable[..., Path]) -> None:
    arms = {"joint": {"strategy": "joint"}, "longer": {"strategy": "joint", "set": {"epochs": 2.0}}}
    read = Comparison.read(write(arms=arms, plan={"set": {"epochs": 0.5, "rank": 2, "alpha": 4}}), "tiny")
    assert [(case.plan.recipe.epochs, case.plan.recipe.rank) for case in read.cases] == [(0.5, 2), (2.0, 2)]
    assert read.bound("joint") == "joint"


def test_finished_runs_are_kept_and_the_page_says_what_they_say(compare: Callable[..., Any], tmp_path: Path) -> None:
    read, kept, heard = compare()
    assert heard.begun == (16, 0) and len(heard.done) == 16
    assert not list((tmp_path / "work" / "runs").iterdir())
    asked = Scorer.asked
    read, kept, again = compare()
    assert again.begun == (16, 16) and not again.worked and Scorer.asked == asked

    records = records_of(read, kept)
    arms = {arm.name: arm for arm in arms_of(read, records)}
    plain = arms["plain"].measures
    # told: ACC (0.4 + 0.5 + 0.9) / 3 = 0.6; back: (0.5 + 0.8 + 0.8) / 3 = 0.7; the second seed 0.1 more.
    assert plain["acc"].values == pytest.approx((0.6, 0.7, 0.7, 0.8))
    # told: ((0.4 - 0.8) + (0.5 - 0.7)) / 2 = -0.3; back: ((0.5 - 0.7) + (0.8 - 0.9)) / 2 = -0.15
    assert plain["bwt"].values == pytest.approx((-0.3, -0.15, -0.3, -0.15))
    assert plain["below_joint"].values == pytest.approx((-0.2, -0.1, -0.2, -0.1))  # joint 0.8, then 0.9
    assert plain["below_single"].values == pytest.approx((-0.2, -0.1, -0.2, -0.1))  # isolated: the same by chance
    assert plain["worst"].values == pytest.approx((-0.4, -0.2, -0.4, -0.2))
    assert plain["fwt"].mean == pytest.approx((2 * (0.1 + 0.2) / 2 + 2 * (0.2 + 0.3) / 2) / 4)
    assert plain["drift"].mean == pytest.approx(0.04)
    assert arms["isolated"].measures["drift"].mean == pytest.approx(0.07)  # the worst of its adapters
    assert arms["isolated"].seeds == (0, 1) and len(arms["isolated"].runs) == 2
    assert plain["rank"].mean == 4 and arms["replay"].measures["replay_bytes"].mean > 0

    bwt, below, both, routed, drift = wanted(list(arms.values()))
    assert [arm.name for arm in bwt.reached] == ["replay"]  # -0.002 a run; "much" replays too much to count
    assert [arm.name for arm in below.reached] == ["replay"] and [arm.name for arm in both.reached] == ["replay"]
    # The scripted router is right on all questions but one of the third task's four; the oracle has 0.8, then 0.9.
    assert [arm.name for arm in routed.reached] == ["isolated"]
    assert routed.reached[0].measures["routed_minus_oracle"].values == pytest.approx((11 / 12 - 0.8, 11 / 12 - 0.9))
    assert [arm.name for arm in drift.reached] == ["replay"]

    page = write_page(read, records, kept.data(read.cases[0]), tmp_path / "out", "Machine: this.", "hub compare x")
    text = page.read_text()
    assert page == tmp_path / "out.md" and "16 of 16 runs finished" in text and "Machine: this." in text
    assert "| plain | 4 | 70.0 [60.0, 80.0] | -15.0 [-20.0, -10.0] |" in text
    assert "| BWT ≥ −0.5 points | yes | replay |" in text and "| both by the same arm | yes | replay |" in text
    assert "| replay | replay | share 0.05 |" in text and "| joint | joint |  |" in text
    assert "### much, order told" in text and "![much, matrix](out/much-matrix.png)" in text
    # Scripted: the second of two adapters that are asked, the last one, loses a nat; the last task's own is the last.
    assert arms["plain"].measures["answer_nats"].values == pytest.approx([5 / 3] * 4)
    assert arms["plain"].measures["answer_nats_lost"].values == pytest.approx([1.0] * 4)
    assert "answer_nats_lost" not in arms["joint"].measures
    assert "| plain | 4 | 1.667 [+1.667, +1.667] | +0.667 [+0.667, +0.667] |" in text
    assert "## The router of isolated" in text and "| isolated, routed | 2 |" in text
    for name in ("learned.png", "much-matrix.png", "much-curves.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    record = records[read.cases[2]]
    assert record["data"].keys() == {f"{label}/{part}" for label in THREE for part in ("train", "eval")}
    assert record["precision"]["answers"] == "bfloat16" and record["processor"]


@pytest.mark.parametrize("stop", [1, 2, 4, 6])
def test_a_killed_comparison_goes_on_to_the_same_end(compare: Callable[..., Any], stop: int) -> None:
    """Stopped in `joint`, in `isolated`, between, and in the middle of `plain`."""
    arms = {name: ARMS[name] for name in ("joint", "isolated", "plain")}
    Scorer.stop_at = stop
    with pytest.raises(KeyboardInterrupt):
        compare("tiny", arms=arms)
    Scorer.stop_at = -1
    asked = Scorer.asked
    read, kept, heard = compare("tiny", arms=arms)
    assert Scorer.asked - asked == 10 - (stop - 1)  # what was scored before is not asked again
    assert heard.begun[1] == {1: 0, 2: 1, 4: 1, 6: 2}[stop]
    for case, record in records_of(read, kept).items():
        rows = [list(row) for row in ROWS[case.arm, case.order]]
        assert record["summary"]["matrix"][-1] == ([0.9, 0.8, 0.7] if case.arm == "isolated" else rows[-1])
    assert len(records_of(read, kept)) == 4


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, 0),
        ({"title": "Another"}, 0),
        ({"plan": {"name": "team/other", "checkpoint_steps": 7}}, 0),
        ({"arms": {**ARMS, "plain": {"strategy": {"name": "replay", "share": 0.01}}}}, 2),
        ({"plan": {"set": {"rank": 2, "alpha": 4}}}, 8),
        ({"orders": {"told": list(THREE)}}, 0),
        ({"arms": {**ARMS, "joint": {"strategy": "joint", "set": {"epochs": 2.0}}}}, 1),
    ],
)
def test_what_is_changed_is_run_and_nothing_else(
    compare: Callable[..., Any], changes: dict[str, Any], runs: int
) -> None:
    compare("tiny")
    _, _, heard = compare("tiny", **changes)
    assert len(heard.done) == runs


def test_changed_data_or_text_is_another_run(compare: Callable[..., Any], tmp_path: Path) -> None:
    read, first, _ = compare("tiny")

    def keys(base: str = "sha256:base") -> set[str]:
        kept = Kept(first.cells, first.work, base)
        return {kept.key(case, kept.data(case)) for case in read.cases}

    before = keys()
    assert before == {path.stem for path in first.cells.directory.iterdir()}
    (tmp_path / "held.txt").write_text("Other text.")
    text = keys()
    file = tmp_path / "second-eval.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    data = keys()
    assert not before & text and not text & data and not data & keys("sha256:other")


def test_a_text_that_is_not_there_is_said(write: Callable[..., Path], tmp_path: Path) -> None:
    file = write()
    (tmp_path / "held.txt").unlink()
    result = CliRunner().invoke(group, ["continual", "compare", str(file), "--out", str(tmp_path / "out"), "--dry-run"])
    assert isinstance(result.exception, DataInvalid)
    assert "text: cannot read held.txt" in str(result.exception)


def test_what_an_arm_reads_stands_beside_what_it_trains_on() -> None:
    told = {
        "sequential": (0.0, 0), "replay": (0.05, 0), "on-policy-replay": (0.05, 0), "paced-replay": (0.05, 32),
        "aimed": (0.0, 24),
    }  # fmt: skip
    assert {name: _kept_examples(strategy_named(name, {})) for name in told} == told


def test_what_is_left_is_told_by_what_an_arm_took(write: Callable[..., Path]) -> None:
    cases = list(Comparison.read(write(), "tiny").cases)
    took = lambda seconds, resumed=False: {"seconds": seconds, "resumed": resumed}  # noqa: E731
    assert Expected(cases, {}).left() is None
    known = Expected(cases, {cases[0]: took(10), cases[2]: took(40)})
    assert (known.of(cases[5]), known.of(cases[1])) == (40, 25)  # plain as plain took, isolated as the mean
    assert known.left() == 25 + 25 + 25 + 40 + 25 + 25
    known.finished(cases[1], took(1, resumed=True))
    assert known.left() == 25 + 25 + 40 + 25 + 25


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"arms": {"x": {"strategy": "best"}}}, "arms: x: there is no strategy 'best'"),
        ({"arms": {"x": {"strategy": "joint", "rate": 1}}}, "arms: x has the unknown key 'rate'"),
        ({"arms": {"x": {"strategy": "joint", "set": 1}}}, "arms: x: set is no mapping"),
        ({"arms": {"x": {"strategy": "joint", "set": {"rate": 1}}}}, "arms: x: .*rate"),
        ({"orders": {"short": ["first"]}}, "orders: short has each of the plan's tasks once"),
        ({"shown": ["y"]}, "shown is a list of arms"),
        ({"sizes": {"big": {"seeds": [0]}}}, "no size 'small'"),
        ({"sizes": {"small": {"seeds": [0, 0]}}}, "a number twice"),
    ],
)
def test_comparisons_say_what_is_wrong_with_them(
    write: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((PlanInvalid, ContinualPlanInvalid), match=said):
        Comparison.read(write(**changes), "small")


def test_the_shipped_comparison_is_one() -> None:
    file = Path(__file__).parents[3] / "training" / "experiments" / "continual.yaml"
    for size in ("tiny", "small", "large"):
        read = Comparison.read(file, size)
        assert [case.arm for case in read.cases[:4]] == ["joint", "isolated", "sequential", "replay-5"]
        keys = {case.key("b", _digests(case), "t", case.plan.keep_text) for case in read.cases}
        assert len(keys) == len(read.cases)
        kept = next(case for case in read.cases if case.plan.keep_text is not None)
        assert kept.key("b", _digests(kept), "t", "one text") != kept.key("b", _digests(kept), "t", "another")


def _digests(case: Case) -> dict[str, str]:
    return {f"{label}/{part}": f"{label} {case.seed}" for label in case.plan.labels for part in ("train", "eval")}


@pytest.mark.timeout(120)
def test_the_verb_trains_once_what_several_runs_share(write: Callable[..., Path], tmp_path: Path) -> None:
    """Real trainer, engine, router, hub and page on the tiny base."""
    arms = {"joint": {"strategy": "joint"}, "isolated": {"strategy": "isolated"}, "merged": {"strategy": "merge"}}
    file = write(("first", "second"), arms, {"max_steps": 2, "intruders": "last"}, orders={"told": ["first", "second"]})
    out = tmp_path / "out"

    def compare(*more: str) -> Any:
        command = ["continual", "compare", str(file), "--out", str(out), "--size", "tiny", "--threads", "1", *more]
        result = CliRunner().invoke(group, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    assert "nothing is known of the time" in compare("--dry-run").output
    with alone(out / "work"), pytest.raises(WorkTaken, match="another comparison is at work"):
        compare()
    said = compare("--only", "joint", "--only", "isolated", "--keep").stderr
    assert "[2/2] isolated · order any · seed 0: ACC" in said and "trained already" not in said
    assert (out / "work" / "runs").is_dir()
    said = compare("--note", "On a quiet evening.").stderr
    assert said.count("trained already, in another run") == 2 and "3 runs, 2 of them finished before" in said
    cells = [json.loads(path.read_text()) for path in (out / "cells").glob("*.json")]
    told = {cell["summary"]["plan"]["strategy"]["name"]: cell for cell in cells}
    assert told.keys() == {"joint", "isolated", "merge"}
    assert told["merge"]["served_rank"] == 8 and told["isolated"]["served_rank"] == 4
    assert told["merge"]["summary"]["base"] == told["isolated"]["summary"]["base"] == told["joint"]["summary"]["base"]
    assert told["merge"]["summary"]["matrix"][0][0] == told["isolated"]["summary"]["matrix"][0][0]
    assert told["joint"]["summary"]["stages"][0]["intruders"]["relative_norm"] > 0
    assert [stage["intruders"] is None for stage in told["isolated"]["summary"]["stages"]] == [True, False]
    assert told["joint"]["precision"]["training"] in ("float32", "bfloat16") and told["joint"]["libraries"]["torch"]
    page = (tmp_path / "out.md").read_text()
    assert "3 of 3 runs finished" in page and "On a quiet evening." in page
    assert "3 finished" in compare("--dry-run").output
    compare("--report-only", "--threads", "2")
    assert "1 thread a run" in (tmp_path / "out.md").read_text()  # as they ran
    result = CliRunner().invoke(group, ["continual", "compare", str(file), "--out", str(out), "--only", "x*"])
    assert result.exit_code != 0 and "no arm like this" in result.output
