"""A sweep's results as a page: tables in Markdown, pictures beside them, the raw cells as JSON.

Scores are means over the seeds. Their interval is the middle 95 % over draws of the evaluation's questions (the same
draws for every cell, so that differences are paired); the span between the seeds stands beside it, since the interval
does not cover it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.answer_loss import METRIC
from training.bootstrap import Interval, middle
from training.curves import new_figure, save_figure
from training.metrics import Floats
from training.sweep.plan import SweepPlan
from training.sweep.records import Records, TaskData
from training.tasks import task_named


@dataclass(frozen=True)
class Summary:
    """One variant on one task, over the seeds that are finished."""

    variant: str
    line: str
    x: float | None  # of the field that is plotted over
    records: tuple[Mapping[str, Any], ...]  # by seed

    def score(self, metric: str) -> float:
        """The mean over the seeds."""
        return float(np.mean([record["scores"][metric]["value"] for record in self.records]))

    def span(self, metric: str) -> tuple[float, float]:
        """The lowest and the highest seed."""
        values = [record["scores"][metric]["value"] for record in self.records]
        return min(values), max(values)

    def resampled(self, metric: str) -> Floats:
        """The mean over the seeds on every draw of questions."""
        each = [record["scores"][metric]["resampled"] for record in self.records]
        return np.asarray(np.mean(each, axis=0), np.float64)

    def interval(self, metric: str) -> Interval:
        """Where the mean lies on other draws of the questions."""
        return middle(self.resampled(metric))

    def against(self, other: Summary, metric: str) -> tuple[float, Interval]:
        """This mean minus another's, with its paired interval."""
        return self.score(metric) - other.score(metric), middle(self.resampled(metric) - other.resampled(metric))

    def mean_of(self, metric: str) -> float:
        """The mean of something that training measured."""
        return float(np.mean([record["metrics"][metric] for record in self.records]))

    @property
    def resumed(self) -> int:
        """How many of the records are of interrupted training, whose memory and time are those since it went on."""
        return sum(bool(record.get("resumed")) for record in self.records)

    @property
    def timed(self) -> tuple[Mapping[str, Any], ...]:
        """The records that memory and time are read from: those of uninterrupted training, all where there are none."""
        return tuple(record for record in self.records if not record.get("resumed")) or self.records

    @property
    def peak_bytes(self) -> float:
        """The mean peak of the cells' processes."""
        return float(np.mean([record["peak_bytes"] for record in self.timed]))

    @property
    def cpu_seconds(self) -> float:
        """The mean CPU time of the optimizer loops."""
        return float(np.mean([record["metrics"]["cpu_seconds"] for record in self.timed]))

    @property
    def tokens_per_cpu_second(self) -> float:
        """Tokens over CPU time, all cells together."""
        each = [record["metrics"] for record in self.timed]
        tokens = sum(metrics["seconds"] * metrics["tokens_per_second"] for metrics in each)
        return float(tokens / max(sum(metrics["cpu_seconds"] for metrics in each), 1e-9))

    @property
    def precisions(self) -> tuple[str, ...]:
        """What the products were computed in, "bfloat16" or "float32"."""
        return tuple(sorted({str(record["metrics"]["precision"]) for record in self.records}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Which seeds are in the mean."""
        return tuple(record["recipe"]["seed"] for record in self.records)


def summaries(
    plan: SweepPlan, data: Mapping[str, TaskData], fingerprint: str, records: Records
) -> dict[str, list[Summary]]:
    """What is finished, by task, in the plan's order."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    about: dict[str, Any] = {}
    for cell in plan.cells:
        record = records.finished(records.key(cell, fingerprint, data[cell.task]))
        if record is not None:
            found.setdefault(cell.task, {}).setdefault(cell.variant, []).append(record)
            x = getattr(cell.recipe, plan.x) if plan.x else None
            about[cell.variant] = (cell.line, float(x) if isinstance(x, int | float) else None)
    return {
        task: [
            Summary(variant, about[variant][0], about[variant][1], tuple(each)) for variant, each in variants.items()
        ]
        for task, variants in found.items()
    }


def write_page(
    plan: SweepPlan, data: Mapping[str, TaskData], fingerprint: str, records: Records, machine: str, command: str
) -> Path:
    """Write OUT/<plan>.md and its pictures from the finished cells; the page's path."""
    found = summaries(plan, data, fingerprint, records)
    records_of_all = [record for each in found.values() for summary in each for record in summary.records]
    finished = len(records_of_all)
    days = sorted({record["finished"][:10] for record in records_of_all})
    when = f" Run {days[0]}{f' to {days[-1]}' if len(days) > 1 else ''}." if days else ""
    lines = [
        f"# {plan.title}",
        "",
        *([plan.question, ""] if plan.question else []),
        f"`{command}`, size `{plan.size}`: {finished} of {len(plan.cells)} cells finished.{when} {machine}",
        "",
        "Scores are means over the seeds; in brackets the middle 95 % over draws of the questions (bootstrap), and",
        "the lowest and highest seed where there are several. Answer nats are the cross-entropy of the questions' own",
        "answers, nats a token: lower is better, and finer than right or wrong. Losses are nats a trained token on",
        "held-out examples, before → after. Peak memory is the whole process's (VmHWM), interpreter, libraries and",
        "loading included. CPU time is the optimizer loop's, validations included; unlike the clock it does not count",
        "what other processes on the machine took. Precision is that of the products. The raw cells, with every loss,",
        "are in [cells/](cells).",
    ]
    for task, each in found.items():
        lines += ["", *_section(plan, task, each, data[task], fingerprint, records)]
        lines += ["", *_pictures(plan, task, each, records.out)]
    page = records.out / f"{plan.name}.md"
    page.write_text("\n".join([*lines, ""]), "utf-8")
    return page


def _section(
    plan: SweepPlan, task: str, each: Sequence[Summary], data: TaskData, fingerprint: str, records: Records
) -> list[str]:
    headline = task_named(task).headline
    # A cell from before a metric was measured has none of it.
    scored = [record["scores"] for summary in each for record in summary.records]
    known = dict.fromkeys(name for one in scored for name in one if name != headline)
    metrics = [headline, *sorted(known)]
    everywhere = [name for name in metrics if all(name in one for one in scored)]
    reference = next((summary for summary in each if summary.variant == plan.reference), None)
    size = plan.data[task]
    lines = [
        f"## {task}",
        "",
        f"{size.train} examples for training (a part of them held out), {size.evaluation} questions; "
        f"data `{data.train_digest[:19]}`, `{data.evaluation_digest[:19]}`.",
        "",
        _row(["", *(name.replace("_", " ") for name in metrics)]),
        _row(["---", *("---" for _ in metrics)]),
    ]
    for quantization, called in (("none", "base, untrained"), ("nf4", "base in NF4, untrained")):
        told = records.finished(records.base_key(task, quantization, fingerprint, data))
        if told is not None:
            cells = [
                _number(name, told["scores"][name]["value"]) if name in told["scores"] else "–" for name in metrics
            ]
            low_high = middle(np.asarray(told["scores"][headline]["resampled"]))
            cells[0] += f" [{_number(headline, low_high.low)}, {_number(headline, low_high.high)}]"
            lines.append(_row([called, *cells]))
    for summary in each:
        own = [name for name in metrics if all(name in record["scores"] for record in summary.records)]
        cells = [_number(name, summary.score(name)) if name in own else "–" for name in metrics]
        interval = summary.interval(headline)
        cells[0] += f" [{_number(headline, interval.low)}, {_number(headline, interval.high)}]"
        if len(summary.records) > 1:
            for name in {headline, METRIC} & set(own):
                low, high = summary.span(name)
                cells[metrics.index(name)] += f" (seeds {_number(name, low)}–{_number(name, high)})"
        lines.append(_row([summary.variant, *cells]))
    compared = [name for name in (headline, METRIC) if name in everywhere] if reference else []
    versus = [f"{name.replace('_', ' ')} minus {reference.variant}" for name in compared if reference]
    lines += [
        "",
        _row(
            [
                "",
                *versus,
                "learning rate",
                "trained",
                "held-out loss",
                "precision",
                "peak MB",
                "CPU s",
                "tokens/s of CPU",
                "seeds",
            ]
        ),
        _row(["---"] * (9 + len(versus))),
    ]
    for summary in each:
        recipe = summary.records[0]["recipe"]
        differences = [_difference(summary, reference, name) for name in compared if reference]
        least = "≥ " if summary.resumed == len(summary.records) else ""
        before = [record["metrics"]["validation_loss_before"] for record in summary.records]
        after = [record["metrics"]["validation_loss"] for record in summary.records]
        losses = "–" if None in before else f"{np.mean(before):.3f} → {np.mean(after):.3f}"
        lines.append(
            _row(
                [
                    summary.variant,
                    *differences,
                    f"{recipe['learning_rate']:g}",
                    f"{summary.mean_of('trained_parameters') / 1e6:.2f} M",
                    losses,
                    " ".join(summary.precisions),
                    f"{least}{summary.peak_bytes / 1e6:,.0f}",
                    f"{least}{summary.cpu_seconds:,.0f}",
                    f"{summary.tokens_per_cpu_second:.0f}",
                    " ".join(map(str, summary.seeds)),
                ]
            )
        )
    lines += _interrupted(each)
    precisions = sorted({precision for summary in each for precision in summary.precisions})
    if len(precisions) > 1:
        lines += [
            "",
            f"These cells computed in {' or '.join(precisions)}, as the machines they ran on do it faster: memory and",
            "time compare only within one of them.",
        ]
    return lines


def _interrupted(each: Sequence[Summary]) -> list[str]:
    """What is to be known of memory and time where training was interrupted: they are those since it went on."""
    cut = [summary for summary in each if summary.resumed]
    if not cut:
        return []
    told = ", ".join(f"{summary.variant}: {summary.resumed} of {len(summary.records)}" for summary in cut)
    return [
        "",
        f"Cells that were interrupted and went on ({told}) measured memory and time only since then: they are",
        "left out of both, and where all of a row's cells are such, its figures are marked with ≥.",
    ]


def _difference(summary: Summary, reference: Summary, metric: str) -> str:
    if summary is reference:
        return "–"
    value, interval = summary.against(reference, metric)
    others = "" if summary.seeds == reference.seeds else " (other seeds)"
    return f"{value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]{others}"


def _pictures(plan: SweepPlan, task: str, each: Sequence[Summary], out: Path) -> list[str]:
    headline = task_named(task).headline
    quality = new_figure()
    axes = quality.subplots()
    if plan.x is not None and all(summary.x is not None for summary in each):
        for line in dict.fromkeys(summary.line for summary in each):
            own = sorted((summary for summary in each if summary.line == line), key=lambda summary: summary.x or 0)
            axes.errorbar(
                [s.x for s in own], [s.score(headline) for s in own], _bars(own, headline), marker="o", label=line
            )
        axes.set_xlabel(plan.x.replace("_", " "))
        axes.set_xscale(_scale([summary.x for summary in each if summary.x is not None]))
        axes.legend()
    else:
        axes.bar([s.variant for s in each], [s.score(headline) for s in each], yerr=_bars(each, headline), capsize=4)
        axes.tick_params(axis="x", rotation=30)
    axes.set(title=f"{task}: {headline.replace('_', ' ')}", ylim=(0, None))
    save_figure(quality, out / f"{plan.name}-{task}-quality.png")
    losses = new_figure()
    axes = losses.subplots()
    for summary in each:
        curves = summary.records[0]["curves"]
        [drawn] = axes.plot(*_smoothed(curves["training"]), alpha=0.5, linewidth=1)
        points = curves["validation"]
        label = f"{summary.variant}"
        axes.plot([s for s, _ in points], [x for _, x in points], "o--", color=drawn.get_color(), label=label)
    axes.set(
        title=f"{task}, first seed: held-out loss (dots), training loss (lines)",
        xlabel="optimizer step", ylabel="nats a trained token", ylim=(0, None),
    )  # fmt: skip
    axes.legend(fontsize="small")
    save_figure(losses, out / f"{plan.name}-{task}-losses.png")
    return [f"![{what}, {task}]({plan.name}-{task}-{what}.png)" for what in ("quality", "losses")]


def _scale(xs: Sequence[float]) -> str:
    """Logarithmic where the points lie far apart; zero has no place there."""
    return "log" if min(xs) > 0 and max(xs) >= 10 * min(xs) else "linear"


def _bars(each: Sequence[Summary], metric: str) -> Floats:
    """[2, variants]: how far the interval reaches below and above."""
    reach = [(s.score(metric) - s.interval(metric).low, s.interval(metric).high - s.score(metric)) for s in each]
    return np.asarray(np.maximum(np.array(reach).T, 0), np.float64)


def _smoothed(points: Sequence[Sequence[float]], over: int = 10) -> tuple[list[float], list[float]]:
    losses = [loss for _, loss in points]
    means = [float(np.mean(losses[max(0, at + 1 - over) : at + 1])) for at in range(len(losses))]
    return [step for step, _ in points], means


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(name: str, value: float) -> str:
    return f"{value:.1f}" if name.endswith("_count") else f"{value:.3f}"
