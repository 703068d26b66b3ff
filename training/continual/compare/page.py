"""A comparison as a page: OUT.md, with its pictures and the runs' own JSON in OUT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.continual.compare.figures import Arm, Record, Spread, Wanted, arms_of, mean_matrix, wanted
from training.continual.compare.pictures import draw
from training.continual.compare.plan import Case, Comparison
from training.continual.metrics import Matrix
from training.continual.plan import ContinualPlan
from training.continual.tasks import TaskData

_POINTS = ("acc", "below_joint", "below_single", "bwt", "fwt", "forgetting", "worst")
_SCORES = ("", "runs", "ACC", "− joint", "− single", "BWT", "FWT", "forgetting", "worst task", "text drift, nats")
_NATS = ("", "runs", "answer nats", "− joint", "− single", "lost")
_COSTS = ("", "intruders (random)", "‖ΔW‖/‖W‖", "replay MB", "kept MB", "adapter MB", "rank", "training CPU s")


def write_page(
    comparison: Comparison,
    records: Mapping[Case, Record],
    data: Sequence[TaskData],
    out: Path,
    machine: str,
    command: str,
) -> Path:
    """Write the page from the finished runs; `data` are the tasks' files of the first seed. The page's path."""
    out.mkdir(parents=True, exist_ok=True)
    arms = arms_of(comparison, records)
    lines = [f"# {comparison.title}", ""]
    lines += [comparison.question, ""] if comparison.question else []
    lines += _how(comparison, records, machine, command, out.name)
    lines += ["", *_data(data)]
    if arms:
        lines += ["", *_arms(comparison, arms), "", *_table(arms), "", *_figures(wanted(arms))]
        lines += _answers(arms)
        lines += _router(arms)
        shown = comparison.shown if comparison.shown is not None else _chosen(arms)
        matrices = {arm.name: found for arm in arms if arm.name in shown and (found := mean_matrix(arm)) is not None}
        pictures = draw(arms, {name: matrix for name, (_, matrix) in matrices.items()}, out)
        lines += ["", "## After every stage", ""]
        lines += [f"![mean of the tasks learned so far]({out.name}/{pictures['learned'].name})"]
        for name, (order, matrix) in matrices.items():
            lines += ["", *_matrix(name, order, matrix)]
            lines += ["", *(f"![{name}, {what}]({out.name}/{path.name})" for what, path in pictures[name].items())]
    page = out.with_name(f"{out.name}.md")
    page.write_text("\n".join([*lines, ""]), "utf-8")
    return page


def _how(comparison: Comparison, records: Mapping[Case, Record], machine: str, command: str, folder: str) -> list[str]:
    told = list(records.values())
    days = sorted({record["finished"][:10] for record in told})
    when = f" Run {days[0]}{f' to {days[-1]}' if len(days) > 1 else ''}." if days else ""
    trained = sorted({record["precision"]["training"] for record in told})
    answered = sorted({record["precision"]["answers"] for record in told})
    libraries = {
        f"{name} {version}" for record in told for name, version in record["libraries"].items()
        if name in ("torch", "transformers", "peft")
    }  # fmt: skip
    recipe = comparison.cases[0].plan.recipe
    lines = [
        f"`{command}`, size `{comparison.size}`: {len(told)} of {len(comparison.cases)} runs finished.{when} {machine}"
        + (f" Trained in {' or '.join(trained)}, answered in {' or '.join(answered)}." if told else "")
        + (f" Libraries: {', '.join(sorted(libraries))}." if libraries else ""),
        "",
        f"Base {comparison.base}, recipe `{recipe.name}`: rank {recipe.rank}, rate {recipe.learning_rate:g}, "
        f"{recipe.epochs:g} passes, batches of {recipe.step_batch}. A run is one arm in one order with one seed, which "
        "also draws the data; `joint` and `isolated` run once a seed, for the order makes no difference to them. Every "
        f"run with all its numbers: [{folder}/cells]({folder}/cells).",
        "",
        "| order | |",
        "|---|---|",
    ]
    return [*lines, *(f"| {name} | {', '.join(labels)} |" for name, labels in comparison.orders.items())]


def _data(data: Sequence[TaskData]) -> list[str]:
    lines = ["| task | training | questions | digests, first seed |", "|---|---|---|---|"]
    return lines + [
        f"| {task.label} | {len(task.train)} | {len(task.evaluation)} | `{task.train.digest[:19]}` "
        f"`{task.evaluation.digest[:19]}` |"
        for task in data
    ]


def _arms(comparison: Comparison, arms: Sequence[Arm]) -> list[str]:
    """What each arm is: its strategy's options, and where its recipe is not the comparison's."""
    lines = ["| arm | strategy | options | kept examples |", "|---|---|---|---|"]
    usual = comparison.cases[0].plan.recipe.as_dict()
    for arm in arms:
        plan = comparison.plan_of(arm.name)
        told = [f"{name} {value}" for name, value in plan.options.items()]
        told += ["with the text to keep"] if plan.keep_text is not None else []
        told += [f"{plan.reduce_intruders:g} of each intruder out"] if plan.reduce_intruders is not None else []
        told += [f"{name} {value}" for name, value in plan.recipe.as_dict().items() if value != usual.get(name)]
        lines.append(_row((arm.name, plan.strategy, ", ".join(told), _kept(arm, plan))))
    return lines


def _kept(arm: Arm, plan: ContinualPlan) -> str:
    """What an arm does with examples of earlier tasks."""
    if plan.strategy == "joint":
        return "all"
    said = [f"{100 * arm.replay:g} % of a stage, trained on"] if arm.replay else []
    if arm.reads:
        said.append(f"{arm.reads} {'in all' if arm.replay else 'a task'}, read and not trained on")
    return "; ".join(said)


def _table(arms: Sequence[Arm]) -> list[str]:
    lines = [
        "## Every arm",
        "",
        "Scores are points of 100, means over the runs; in brackets the lowest and the highest run where there are",
        "several. ACC is the mean of all tasks after the last stage; differences are to the bounds of the same seed.",
        "Worst task: the largest fall of any since its own stage. Text drift is of the adapter after the last stage,",
        "of `isolated` the largest of all adapters'. A dash stands for what was not measured or has no meaning.",
        "",
        *_head(_SCORES),
    ]
    for arm in arms:
        points = [_points(arm.measures.get(name)) for name in _POINTS]
        lines.append(_row([arm.name, str(len(arm.runs)), *points, _nats(arm.measures.get("drift"))]))
        if "routed_acc" in arm.measures:
            routed = [_points(arm.measures.get(f"routed_{name}")) for name in ("acc", "below_joint", "below_single")]
            lines.append(_row([f"{arm.name}, routed", str(len(arm.runs)), *routed, *["–"] * 5]))
    lines += [
        "",
        "Intruders are of the adapter after the last stage, over all matrices, 10 directions each; in brackets those",
        "of a random ΔW of equal rank and norm. Adapter: what is served, of `isolated` all together. Training counts",
        "the processor's time, also where an adapter was taken over from another run." + _resumed(arms),
        "",
        *_head(_COSTS),
    ]
    for arm in arms:
        found, random = arm.mean("intruders"), arm.mean("random")
        cells = [
            f"{found:.0f} ({random:.0f})" if found is not None and random is not None else "–",
            _plain(arm.mean("relative_norm"), ".3f"),
            *(_plain(_mega(arm.mean(f"{name}_bytes")), ".2f") for name in ("replay", "kept", "adapter")),
            _plain(arm.mean("rank"), ".0f"),
            _plain(arm.mean("seconds"), ".0f"),
        ]
        lines.append(_row([arm.name, *cells]))
    return lines


def _resumed(arms: Sequence[Arm]) -> str:
    count = sum(bool(record["resumed"]) for arm in arms for _, record in arm.runs)
    return f" Of {count} interrupted runs a stage may count only what came after." if count else ""


def _figures(found: Sequence[Wanted]) -> list[str]:
    lines = [
        "## What was wanted",
        "",
        "Of one evolving adapter whose stages train on at most 5 % kept examples, but for the router. What is kept to",
        "be read and not trained on is not counted; it stands beside each arm above. By means over the finished runs.",
        "",
        *_head(("wanted", "reached", "by", "best")),
    ]
    for one in found:
        said = "not measured" if one.best is None else "yes" if one.reached else "no"
        by = ", ".join(arm.name for arm in one.reached) or "–"
        best = "–"
        if one.best is not None:
            values = (f"{_CALLED[name]} {_said(name, one.best.mean(name))}" for name in one.measures)
            best = f"{one.best.name}: {', '.join(values)}"
        lines.append(_row([one.text, said, by, best]))
    return lines


def _answers(arms: Sequence[Arm]) -> list[str]:
    known = [arm for arm in arms if "answer_nats" in arm.measures]
    if not known:
        return []
    lines = [
        "",
        "## By the questions' own answers",
        "",
        "Cross-entropy of the reference answers after the last stage, nats a token, the mean over tasks of the mean",
        "over questions: lower is better, and finer than scores, which one question changes by a point or two. Lost:",
        "what it rose since a task's own stage, the mean over all tasks but the last. Not measured of every run.",
        "",
        *_head(_NATS),
    ]
    for arm in known:
        told = [arm.measures.get(f"answer_nats{what}") for what in ("", "_below_joint", "_below_single", "_lost")]
        first, *others = told
        runs = str(len(first.values) if first is not None else 0)
        lines.append(_row([arm.name, runs, _nats(first).removeprefix("+"), *map(_nats, others)]))
    return lines


def _router(arms: Sequence[Arm]) -> list[str]:
    lines: list[str] = []
    for arm in arms:
        told = [record["summary"] for _, record in arm.runs if record["summary"]["routed"]]
        if not told:
            continue
        lines += ["", f"## The router of {arm.name}", "", "With the router choosing for every question, against the"]
        lines += ["task's own adapter (oracle). Points of 100.", ""]
        lines += _head(("task", "routed", "oracle", "right choices", "to the base"))
        for task in told[0]["tasks"]:
            columns = [
                _points(Spread(tuple(one["routed"][key][one["tasks"].index(task)] for one in told)))
                for key in ("scores", "oracle", "right", "to_base")
            ]
            lines.append(_row([task, *columns]))
    return lines


def _matrix(name: str, order: str, matrix: Matrix) -> list[str]:
    lines = [f"### {name}, order {order}", "", *_head(("after", *matrix.tasks))]
    for index, row in enumerate([matrix.base, *matrix.rows]):
        after = matrix.tasks[index - 1] if index else "nothing (base)"
        cells = [f"**{100 * score:.1f}**" if at == index - 1 else f"{100 * score:.1f}" for at, score in enumerate(row)]
        lines.append(_row([after, *cells]))
    return lines


def _chosen(arms: Sequence[Arm]) -> set[str]:
    evolving = [arm for arm in arms if arm.evolving]
    best = max(evolving, key=lambda arm: arm.mean("acc") or 0.0, default=None)
    return {"sequential", *([best.name] if best is not None else [])}


_CALLED: Mapping[str, str] = {
    "bwt": "BWT", "acc": "ACC", "below_joint": "ACC − joint", "routed_minus_oracle": "difference",
    "routed_acc": "ACC routed", "drift": "drift",
}  # fmt: skip


def _said(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "drift":
        return f"{value:+.3f} nats"
    return f"{100 * value:.1f}" if name.endswith("acc") else f"{100 * value:+.1f}"


def _points(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    text = f"{100 * spread.mean:.1f}"
    return text if len(spread.values) == 1 else f"{text} [{100 * spread.low:.1f}, {100 * spread.high:.1f}]"


def _nats(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    text = f"{spread.mean:+.3f}"
    return text if len(spread.values) == 1 else f"{text} [{spread.low:+.3f}, {spread.high:+.3f}]"


def _mega(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def _plain(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _head(names: Sequence[str]) -> list[str]:
    return [_row(names), "|---" * len(names) + "|"]


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
