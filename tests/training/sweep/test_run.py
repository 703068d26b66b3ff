"""Sweeps on a tiny base: what runs, what is not run again, what is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.bootstrap import resampled
from training.data import Example, read_jsonl, write_jsonl
from training.errors import CellFailed, CellTaken
from training.sweep import child, report
from training.sweep import run as running
from training.sweep.plan import Cell, SweepPlan
from training.sweep.records import Records, TaskData
from training.sweep.report import Summary, summaries, write_page
from training.sweep.run import Setting, run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
PLAN: dict[str, Any] = {
    "title": "Tiny",
    "recipe": "demo",
    "set": {"epochs": 1.0, "batch": 4, "max_length": 100, "hold_out": 0.2},
    "tasks": {"sentiment": {}},
    "variants": {
        "full": {"method": "full", "learning_rate": 1e-3},
        "r2": {"rank": 2, "alpha": 4},
        "r4": {"rank": 4, "alpha": 8},
        "q4": {"rank": 4, "alpha": 8, "method": "qlora"},
    },
    "reference": "full",
    "sizes": {"small": {"seeds": [0, 1], "data": {"sentiment": {"train": 16, "eval": 6}}}},
}


class Heard:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.cells: list[str] = []
        self.work: list[str] = []
        self.lines: list[str] = []
        self.taken: list[str] = []
        self.begun: tuple[int, int] | None = None

    def begin(self, cells: int, finished: int) -> None:
        self.begun = (cells, finished)

    def working(self, what: str) -> None:
        self.work.append(what)

    def said(self, line: str) -> None:
        self.lines.append(line)

    def left_out(self, cell: Cell) -> None:
        self.taken.append(cell.text)

    def finished(self, cell: Cell, record: Mapping[str, Any]) -> None:
        self.cells.append(cell.text)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, TaskData]:
    labels = ["positive", "negative", "neutral", "mixed"]
    files = {}
    for name, count in (("train", 16), ("eval", 6)):
        path = tmp_path / f"{name}.jsonl"
        examples = [
            Example.of(user=f"{name} {n}", answer=labels[n % 4], gold={"label": labels[n % 4]}) for n in range(count)
        ]
        files[name] = (path, write_jsonl(path, examples))
    return {"sentiment": TaskData(files["train"][0], files["eval"][0], files["train"][1], files["eval"][1])}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Children's work done here, for a new process takes seconds to import torch; what was asked of them."""
    asked: list[dict[str, Any]] = []

    def work(spec: dict[str, Any], file: Path, what: str, said: Callable[[str], object]) -> None:
        asked.append(spec)
        file.parent.mkdir(parents=True, exist_ok=True)
        done = (child.train_cell if spec["kind"] == "train" else child.score_group)(spec)
        Path(spec["result"]).write_text(json.dumps(done))

    monkeypatch.setattr(running, "_in_process", work)
    return asked


@pytest.mark.timeout(180)
def test_a_sweep_trains_scores_together_and_goes_on_where_it_was(
    tiny_base: Path, tmp_path: Path, data: dict[str, TaskData], in_this_process: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan, records, heard = SweepPlan.parse(PLAN, "tiny", "small"), Records(tmp_path / "out"), Heard()
    setting = Setting(str(tiny_base), "sha256:base", threads=1)

    # The plug is pulled while the second seed's third cell trains.
    real = child.train_cell

    def until(spec: dict[str, Any]) -> dict[str, Any]:
        if spec["recipe"]["seed"] == 1 and spec["recipe"]["rank"] == 4:
            raise KeyboardInterrupt
        return real(spec)

    with monkeypatch.context() as patched:
        patched.setattr(child, "train_cell", until)
        with pytest.raises(KeyboardInterrupt):
            run(plan, data, setting, records, heard)
    assert heard.begun == (8, 0) and len(heard.cells) == 4
    kinds = [(spec["kind"], sorted(spec["adapters"]) if spec["kind"] == "score" else "") for spec in in_this_process]
    keys = {cell.variant: records.key(cell, "sha256:base", data["sentiment"]) for cell in plan.cells[:4]}
    # Both LoRAs in one batch with the base, QLoRA on the base it was trained on, the full model alone.
    assert kinds[:7] == [
        ("train", ""), ("train", ""), ("train", ""), ("train", ""),
        ("score", sorted([keys["r2"], keys["r4"]])), ("score", [keys["q4"]]), ("score", []),
    ]  # fmt: skip
    assert [spec["quantization"] for spec in in_this_process[4:7]] == ["none", "nf4", "none"]
    assert [spec["with_base"] for spec in in_this_process[4:7]] == [True, True, True]
    assert not any(records.weights(key).exists() for key in keys.values())  # scored: gone

    in_this_process.clear()
    again = Heard()
    run(plan, data, setting, records, again)
    assert again.begun == (8, 4) and len(again.cells) == 4
    trained = [spec["recipe"] for spec in in_this_process if spec["kind"] == "train"]
    assert [(recipe["seed"], recipe["rank"], recipe["method"]) for recipe in trained] == [
        (1, 4, "lora"), (1, 4, "qlora"),
    ]  # fmt: skip  # full and r2 of this seed were trained before
    assert [spec["with_base"] for spec in in_this_process if spec["kind"] == "score"] == [False, False, True]

    in_this_process.clear()
    last = Heard()
    run(plan, data, setting, records, last)
    assert last.begun == (8, 8) and not last.cells and not in_this_process

    # What is recorded is what a run and an evaluation say.
    record = records.finished(keys["r2"])
    assert record is not None and record["metrics"]["steps"] == 4 and record["evaluation"]["in_one_batch_with"] == 2
    assert record["peak_bytes"] > record["process_bytes"] > 50_000_000
    assert len(record["curves"]["training"]) == 4 and len(record["scores"]["accuracy"]["resampled"]) == 400

    [each] = summaries(plan, data, "sha256:base", records).values()
    assert [summary.variant for summary in each] == ["full", "r2", "r4", "q4"]
    assert all(summary.seeds == (0, 1) for summary in each)
    page = write_page(plan, data, "sha256:base", records, "Machine: this.", "hub sweep tiny.yaml")
    text = page.read_text()
    assert page.name == "tiny.md" and "8 of 8 cells" in text
    assert "accuracy minus full | answer nats minus full" in text and text.count("(seeds ") == 2 * 4
    answers = [record["scores"]["answer_nats"] for summary in each for record in summary.records]
    assert len({answer["value"] for answer in answers}) == 8  # every cell's own weights
    assert all(abs(np.mean(answer["resampled"]) / answer["value"] - 1) < 0.2 for answer in answers)
    assert "base, untrained" in text and "base in NF4" in text
    for name in ("tiny-sentiment-quality.png", "tiny-sentiment-losses.png"):
        assert name in text and (records.out / name).read_bytes().startswith(b"\x89PNG")


def test_a_cell_that_another_process_is_at_is_left_out(
    tmp_path: Path, data: dict[str, TaskData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four variants of one seed: one is held elsewhere, one is finished elsewhere when this process comes to it."""
    plan, records, heard = SweepPlan.parse(PLAN, "tiny", "small"), Records(tmp_path / "out"), Heard()
    plan = replace(plan, cells=plan.cells[:4])
    keys = [records.key(cell, "b", data["sentiment"]) for cell in plan.cells]
    asked = []

    def work(spec: dict[str, Any], file: Path, what: str, said: Callable[[str], object]) -> None:
        asked.append(spec["kind"])
        if spec["kind"] == "score":
            score = {"accuracy": {"value": 0.5, "resampled": [0.5]}}
            told: dict[str, Any] = {"seconds": 1, "scores": {"base": score, **dict.fromkeys(spec["adapters"], score)}}
        else:
            Path(spec["out"]).mkdir()
            told = {"metrics": {}}
            with pytest.raises(CellTaken), records.alone(Path(spec["out"]).name):
                pass
        Path(spec["result"]).write_text(json.dumps(told))

    monkeypatch.setattr(running, "_in_process", work)
    alone = Records.alone

    def last_moment(self: Records, key: str) -> AbstractContextManager[None]:
        if key == keys[2]:
            records.finish(key, {})
        return alone(self, key)

    monkeypatch.setattr(Records, "alone", last_moment)
    elsewhere = records.weights(keys[1])
    elsewhere.mkdir(parents=True)  # as a process leaves it between its weights and its measurements
    with alone(records, keys[1]):
        run(plan, data, Setting("base", "b", 1), records, heard)
    assert heard.taken == [plan.cells[1].text] and elsewhere.is_dir()
    assert heard.cells == [plan.cells[3].text, plan.cells[0].text]
    assert asked == ["train", "train", "score", "score"]
    run(plan, data, Setting("base", "b", 1), records, heard)
    assert heard.cells[2:] == [plan.cells[1].text] and len(heard.taken) == 1


@pytest.mark.timeout(180)
def test_finished_cells_are_scored_again_where_their_weights_are_kept(
    tiny_base: Path, tmp_path: Path, data: dict[str, TaskData], in_this_process: list[dict[str, Any]]
) -> None:
    variants = {name: PLAN["variants"][name] for name in ("r2", "r4")}
    plan = SweepPlan.parse({**PLAN, "variants": variants, "reference": "r2"}, "tiny", "small")
    plan, records = replace(plan, cells=plan.cells[:2]), Records(tmp_path / "out")
    run(plan, data, Setting(str(tiny_base), "sha256:base", 1, keep=True), records, Heard())
    keys = [records.key(cell, "sha256:base", data["sentiment"]) for cell in plan.cells]
    whole = records.finished(keys[0])
    assert whole is not None
    shutil.rmtree(records.weights(keys[1]))
    for key in keys:  # as an earlier release left them
        record = dict(records.finished(key) or {})
        records.finish(key, {**record, "scores": {"accuracy": record["scores"]["accuracy"]}})
    in_this_process.clear()
    run(plan, data, Setting(str(tiny_base), "sha256:base", 1, keep=True, rescore=True), records, Heard())
    assert [(spec["kind"], list(spec.get("adapters", ()))) for spec in in_this_process] == [("score", [keys[0]])]
    again = records.finished(keys[0])
    assert again is not None and again["scores"] == whole["scores"]
    text = write_page(plan, data, "sha256:base", records, "Machine: this.", "hub sweep").read_text()
    assert "answer nats minus" not in text  # not of every cell


def finish(records: Records, cell: Cell, data: dict[str, TaskData], *, resumed: bool = False, **metrics: Any) -> None:
    """Keep a cell that was never trained."""
    known = {
        "precision": "float32", "validation_loss_before": None, "validation_loss": None, "seconds": 1.0,
        "cpu_seconds": 1.0, "tokens_per_second": 1, "trained_parameters": 1,
    }  # fmt: skip
    record = {
        "scores": {"accuracy": {"value": 0.5, "resampled": [0.5] * 400}}, "recipe": cell.recipe.as_dict(),
        "metrics": {**known, **metrics}, "peak_bytes": 1, "finished": "2026-01-01", "variant": cell.variant,
        "curves": {"training": [[1, 1.0]], "validation": []}, "resumed": resumed,
    }  # fmt: skip
    records.finish(records.key(cell, "sha256:base", data[cell.task]), record)


@pytest.mark.parametrize("apart", [False, True])
def test_a_page_says_where_precisions_are_mixed(tmp_path: Path, data: dict[str, TaskData], apart: bool) -> None:
    """Finished on two machines, of which one computes in bfloat16."""
    plan, records = SweepPlan.parse(PLAN, "tiny", "small"), Records(tmp_path / "out")
    for number, cell in enumerate(plan.cells):
        finish(records, cell, data, precision="bfloat16" if apart and number % 4 else "float32")
    text = write_page(plan, data, "sha256:base", records, "Machine: two.", "hub sweep tiny.yaml").read_text()
    assert ("bfloat16 or float32" in text) == apart
    assert (" bfloat16 | " in text) == apart and " float32 | " in text


def timed(seed: int, cpu: float, *, seconds: float = 1.0, speed: float = 1.0, resumed: bool = False) -> dict[str, Any]:
    metrics = {"cpu_seconds": cpu, "seconds": seconds, "tokens_per_second": speed}
    return {"metrics": metrics, "peak_bytes": cpu * 1e6, "recipe": {"seed": seed}, "resumed": resumed}


def test_interrupted_cells_are_left_out_of_memory_and_time() -> None:
    """They measured both only since they went on."""
    mixed = Summary("a", "a", None, (timed(0, 100.0), timed(1, 10.0, resumed=True)))
    assert (mixed.cpu_seconds, mixed.peak_bytes, mixed.resumed) == (100.0, 100e6, 1)
    none_whole = Summary("b", "b", None, (timed(0, 20.0, resumed=True), timed(1, 10.0, resumed=True)))
    assert (none_whole.cpu_seconds, none_whole.peak_bytes, none_whole.resumed) == (15.0, 15e6, 2)


@pytest.mark.parametrize("resumed", [0, 1, 2])
def test_a_page_says_where_training_was_interrupted(tmp_path: Path, data: dict[str, TaskData], resumed: int) -> None:
    plan, records = SweepPlan.parse(PLAN, "tiny", "small"), Records(tmp_path / "out")
    for cell in plan.cells:
        cut = cell.variant == "r2" and cell.recipe.seed < resumed
        finish(records, cell, data, cpu_seconds=7.0 if cut else 1000.0, resumed=cut)
    text = write_page(plan, data, "sha256:base", records, "Machine: this.", "hub sweep tiny.yaml").read_text()
    [row] = [line for line in text.splitlines() if line.startswith("| r2 ") and "M |" in line]
    assert ("| ≥ 7 |" in row, "| 1,000 |" in row) == (resumed == 2, resumed < 2)
    assert (f"(r2: {resumed} of 2)" in text) == bool(resumed) and text.count("≥") == (0, 1, 3)[resumed]


@pytest.mark.parametrize(
    ("field", "points", "scale"),
    [
        ("learning_rate", [3e-5, 1e-3], "log"),
        ("learning_rate", [1e-4, 3e-4, 1e-3], "log"),
        ("rank", [4, 128], "log"),
        ("epochs", [1.0, 5.0], "linear"),
        ("weight_decay", [0.0, 0.01, 0.1], "linear"),  # of a logarithmic axis 0 falls off
    ],
)
def test_no_point_falls_off_the_plot(
    field: str, points: list[float], scale: str, tmp_path: Path, data: dict[str, TaskData],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    variants = {"a": {"method": "lora"}, "b": {"method": "qlora"}}
    plan = SweepPlan.parse(
        {**PLAN, "variants": variants, "reference": None, "grid": {field: points}, "plot": {"x": field}}, "p", "small"
    )
    records, drawn = Records(tmp_path / "out"), {}
    for cell in plan.cells:
        finish(records, cell, data)
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    write_page(plan, data, "sha256:base", records, "Machine: this.", "hub sweep p.yaml")
    [axes] = drawn["p-sentiment-quality.png"].axes
    assert axes.get_xscale() == scale
    assert [list(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "o"] == [points, points]


def test_tokens_are_counted_cell_by_cell() -> None:
    """A slow long run and a fast short one, of 10 tokens each: no mean of seconds times a mean of rates."""
    both = Summary("a", "a", None, (timed(0, 1.0, seconds=10, speed=1), timed(1, 1.0, seconds=1, speed=10)))
    assert both.tokens_per_cpu_second == 10


def test_means_and_intervals_over_seeds_are_those_of_the_answers() -> None:
    from training.metrics import accuracy

    random = np.random.default_rng(5)
    wanted = random.integers(0, 3, 200).tolist()
    runs = [[w if random.random() < p else -1 for w in wanted] for p in (0.6, 0.8)]

    def record(seed: int, given: list[int]) -> dict[str, Any]:
        measured = accuracy(wanted, given)
        scores = {"accuracy": {"value": measured.value, "resampled": resampled(measured, 0, 400).tolist()}}
        return {"scores": scores, "recipe": {"seed": seed}}

    both = Summary("x", "x", None, tuple(record(seed, given) for seed, given in enumerate(runs)))
    each = [sum(a == b for a, b in zip(wanted, given, strict=True)) / 200 for given in runs]
    assert both.score("accuracy") == pytest.approx(sum(each) / 2) and both.span("accuracy") == tuple(sorted(each))
    # The mean of two accuracies on one draw of questions is the mean over questions of the mean rightness.
    rightness = np.mean([[a == b for a, b in zip(wanted, given, strict=True)] for given in runs], axis=0)
    counts = np.random.default_rng(0)
    draws = [rightness @ counts.multinomial(200, np.full(200, 1 / 200), size=100).T / 200 for _ in range(4)]
    low, high = np.quantile(np.concatenate(draws), [0.025, 0.975])
    assert (both.interval("accuracy").low, both.interval("accuracy").high) == pytest.approx((low, high), abs=1e-3)
    value, interval = both.against(both, "accuracy")
    assert value == 0 and interval.low == interval.high == 0


@pytest.mark.timeout(120)
def test_a_cell_runs_in_a_process_of_its_own(tiny_base: Path, tmp_path: Path, data: dict[str, TaskData]) -> None:
    one = {**PLAN, "variants": {"r2": {"rank": 2, "alpha": 4}}, "reference": "r2"}
    plan = SweepPlan.parse({**one, "sizes": {"small": {**PLAN["sizes"]["small"], "seeds": [0]}}}, "one", "small")
    key = Records(tmp_path).key(plan.cells[0], "b", data["sentiment"])
    heard = Heard()
    running._train(
        plan.cells[0], key, data["sentiment"], Setting(str(tiny_base), "b", 1), Records(tmp_path), heard.said
    )
    told = Records(tmp_path).trained(key)
    assert told is not None and told["metrics"]["steps"] == 4 and told["peak_bytes"] > 100_000_000
    assert any("step 4/4" in line for line in heard.lines)


def test_a_process_that_fails_says_why(tmp_path: Path, data: dict[str, TaskData]) -> None:
    plan = SweepPlan.parse(PLAN, "tiny", "small")
    with pytest.raises(CellFailed, match=r"r2.*no-such-base"):
        running._train(
            plan.cells[1], "key", data["sentiment"], Setting(str(tmp_path / "no-such-base"), "b", 1),
            Records(tmp_path), print,
        )  # fmt: skip
    assert read_jsonl(data["sentiment"].train)


@pytest.mark.timeout(120)
def test_the_verb_lists_filters_runs_and_reports(
    tiny_base: Path, tmp_path: Path, data: dict[str, TaskData], in_this_process: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import yaml
    from click.testing import CliRunner

    from hub.cli import group
    from training.sitting import processor

    monkeypatch.setattr(running, "prepare_data", lambda plan, records: data)
    file, out = tmp_path / "tiny.yaml", tmp_path / "results"
    file.write_text(yaml.safe_dump({**PLAN, "base": str(tiny_base)}))

    def sweep(*more: str) -> str:
        command = ["sweep", str(file), "--out", str(out), "--threads", "1", *more]
        result = CliRunner().invoke(group, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    listed = json.loads(sweep("--dry-run", "--variant", "r*", "--json"))
    assert [(cell["variant"], cell["recipe"]["seed"], cell["finished"]) for cell in listed["cells"]] == [
        ("r2", 0, False), ("r4", 0, False), ("r2", 1, False), ("r4", 1, False),
    ]  # fmt: skip
    assert all(cell["seconds"] >= 0 and cell["memory_bytes"] > 10_000_000 for cell in listed["cells"])
    assert not in_this_process
    said = sweep("--variant", "r2", "--note", "On a quiet evening.")
    assert "2 cells, 0 of them finished before" in said and "[2/2]" in said
    page = (out / "tiny.md").read_text()
    assert "2 of 8 cells finished" in page and "On a quiet evening." in page and str(tmp_path / "results") not in page
    assert "finished" in sweep("--dry-run", "--variant", "r2")
    in_this_process.clear()
    (out / "tiny.md").unlink()
    sweep("--report-only", "--threads", "2")
    page = (out / "tiny.md").read_text()
    assert "2 of 8 cells finished" in page and not in_this_process
    assert "1 thread a cell" in page and f"Processor: {processor()}." in page  # as they ran
    for wrong, words in (
        (("--variant", "x*"), "no variant like this"),
        (("--task", "poetry"), "no task poetry"),
        (("--size", "huge"), ""),
    ):
        result = CliRunner().invoke(group, ["sweep", str(file), "--out", str(out), *wrong])
        assert result.exit_code != 0 and words in result.output
