"""A run told: matrix, metrics, costs and pictures, as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.continual import answer_nats
from training.continual.ending import read_intruders, read_routed
from training.continual.errors import BoundMismatch
from training.continual.intruders import SiteIntruders
from training.continual.metrics import drift
from training.continual.plots import draw_all
from training.continual.record import RunRecord


def summary(
    record: RunRecord,
    intruders: Mapping[str, Sequence[SiteIntruders]],
    bounds: Mapping[str, Sequence[float]],
    routed: Mapping[str, Any] | None = None,
    nats: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Every number of the report; `bounds` are other runs' scores by name, [tasks], `nats` those of `answer_nats`."""
    matrix = record.matrix
    worst = matrix.worst
    text_nats = record.stages[-1].text_nats
    return {
        "plan": dict(record.plan),
        "tasks": list(matrix.tasks),
        "base": list(matrix.base),
        "matrix": [list(row) for row in matrix.rows],
        "acc": matrix.accuracy,
        "bwt": matrix.backward_transfer,
        "fwt": matrix.forward_transfer,
        "forgetting": matrix.forgetting,
        "worst": {"task": worst.task, "change": worst.change} if worst is not None else None,
        "below": {name: matrix.below(bound) for name, bound in bounds.items()},
        "routed": dict(routed) if routed is not None else None,
        "base_text_nats": record.base_text_nats,
        "text_drift_nats": drift(record.base_text_nats, text_nats)
        if text_nats is not None and record.base_text_nats is not None
        else None,
        "answer_nats": {name: list(values) for name, values in nats.items()} if nats is not None else None,
        "stages": [
            {
                "task": stage.task,
                "version": stage.version,
                "parent": stage.parent,
                "promoted": stage.promoted,
                "refusals": list(stage.refusals),
                "metrics": dict(stage.metrics),
                "text_nats": stage.text_nats,
                "seconds": stage.seconds,
                "adapter_bytes": stage.adapter_bytes,
                "kept_bytes": stage.kept_bytes,
                "memory_bytes": stage.memory_bytes,
                "memory_digest": stage.memory_digest,
                "notes": dict(stage.notes),
                "intruders": intruder_totals(intruders.get(stage.task, ())),
            }
            for stage in record.stages
        ],
    }


def write_report(directory: Path, out: Path, single: Path | None = None, joint: Path | None = None) -> dict[str, Any]:
    """Write report.md, report.json and the pictures of the run in `directory` to `out`; returns the numbers.

    `single` and `joint` are directories of runs over the same tasks whose strategies are `isolated` and `joint`: the
    bounds. Raises `RunMissing`, and `BoundMismatch` where one of them cannot be that.
    """
    record, intruders = RunRecord.read(directory), read_intruders(directory)
    places = (("each task alone", "isolated", single), ("all tasks at once", "joint", joint))
    bounds = {
        name: _bound(record, RunRecord.read(place), strategy) for name, strategy, place in places if place is not None
    }
    nats = answer_nats.read(directory, len(record.stages))
    told = summary(record, intruders, bounds, read_routed(directory), nats)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(record.matrix, intruders, out)
    (out / "report.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    (out / "report.md").write_text(as_markdown(told, [picture.name for picture in pictures]), "utf-8")
    return told


def _bound(record: RunRecord, other: RunRecord, strategy: str) -> list[float]:
    """The scores of `other` on what the run has learned; raises `BoundMismatch` where they are no bound of it."""
    found = other.plan["strategy"]["name"]
    if found != strategy:
        raise BoundMismatch(f"this bound is a run with the strategy {strategy}, and the one given has {found}")
    bases = [(one.data["base"] if "base" in record.data and "base" in other.data else one.plan["base"])
             for one in (record, other)]  # fmt: skip
    if bases[0] != bases[1]:
        raise BoundMismatch(f"the bound {strategy} has another base: {other.plan['base']}, not {record.plan['base']}")
    scores = dict(zip(other.labels, other.matrix.last, strict=False))
    learned = record.labels[: len(record.stages)]
    if missing := [label for label in learned if label not in scores]:
        raise BoundMismatch(f"the bound {strategy} has not learned {', '.join(missing)}")
    kinds = [{task["label"]: task["task"] for task in one.plan["tasks"]} for one in (record, other)]
    differ = [
        label
        for label in learned
        if kinds[0][label] != kinds[1][label]
        or any(record.data[f"{label}/{part}"] != other.data[f"{label}/{part}"] for part in ("train", "eval"))
    ]
    if differ:
        raise BoundMismatch(f"the bound {strategy} has other data for {', '.join(differ)}")
    return [scores[label] for label in learned]


def as_markdown(told: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The report as people read it."""
    plan, tasks = told["plan"], told["tasks"]
    strategy = plan["strategy"]["name"] + (" + intruder reduction" if plan["reduce_intruders"] is not None else "")
    lines = [f"# {plan['name']}: {strategy} on {plan['base']}", "", "Score of every task (columns) after every stage."]
    lines += ["", f"| after | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for index, row in enumerate([told["base"], *told["matrix"]]):
        name = tasks[index - 1] if index else "nothing (base)"
        cells = [f"**{score:.3f}**" if column == index - 1 else f"{score:.3f}" for column, score in enumerate(row)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    worst = told["worst"]
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| ACC | {told['acc']:.3f} |"]
    lines += [f"| {name} | {_change(told[key])} |" for name, key in _METRICS]
    lines += [f"| ACC minus {name} | {value:+.3f} |" for name, value in told["below"].items()]
    if worst is not None:
        lines.append(f"| worst task | {worst['task']} {worst['change']:+.3f} |")
    sizes_of = ("adapter", "kept", "memory")
    columns = ["stage", "version", "promoted", "training s", *(f"{one} MB" for one in sizes_of)]
    lines += ["", f"| {' | '.join(columns)} | intruders | random | ‖ΔW‖/‖W‖ |"]
    lines.append("|---" * 10 + "|")
    for stage in told["stages"]:
        found = stage["intruders"]
        counted = [found["intruders"], found["random"], f"{found['relative_norm']:.3f}"] if found else ["–"] * 3
        sizes = [f"{stage[key] / 1e6:.2f}" for key in (f"{one}_bytes" for one in sizes_of)]
        said = "yes" if stage["promoted"] else "no: " + "; ".join(stage["refusals"])
        cells = [stage["task"], stage["version"], said, f"{stage['seconds']:.0f}", *sizes, *counted]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if told.get("answer_nats") is not None:
        lines += ["", "Nats a token of the tasks' own answers, by each stage's adapter and by the last:", ""]
        lines += ["| task | own | last | forgotten |", "|---" * 4 + "|"]
        for task, own, last in zip(tasks, *(told["answer_nats"][key] for key in ("own", "last")), strict=False):
            lines.append(f"| {task} | {own:.3f} | {last:.3f} | {last - own:+.3f} |")
    if told["routed"] is not None:
        routed = told["routed"]
        lines += ["", "With the router choosing for every question, against the task's own adapter (oracle):", ""]
        lines += ["| task | routed | oracle | right choices | to the base |", "|---" * 5 + "|"]
        columns = [routed[key] for key in ("scores", "oracle", "right", "to_base")]
        for task, *values in zip(tasks, *columns, strict=False):
            lines.append(f"| {task} | {' | '.join(f'{value:.3f}' for value in values)} |")
    lines += [
        "",
        "Intruders: of the 10 strongest left singular vectors of W + ΔW, those like none of W's (|cos| < 0.5),",
    ]
    lines += ["over all matrices; random: a random ΔW of equal rank and norm in the place of each."]
    lines += [line for name in pictures for line in ("", f"![{name}]({name})")]
    return "\n".join([*lines, ""])


_METRICS = (
    ("BWT", "bwt"),
    ("FWT", "fwt"),
    ("forgetting", "forgetting"),
    ("text drift, nats a token", "text_drift_nats"),
)


def intruder_totals(sites: Sequence[SiteIntruders]) -> dict[str, float] | None:
    """Over all matrices of one adapter; None where nothing was counted."""
    if not sites:
        return None
    return {
        "intruders": sum(site.intruders for site in sites),
        "random": sum(site.random for site in sites),
        "relative_norm": sum(site.relative_norm for site in sites) / len(sites),
    }


def _change(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"
