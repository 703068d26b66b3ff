"""A run's pictures: the matrix as a heat map, every task's curve, intruders by layer beside the norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.continual.errors import PlotsUnavailable
from training.continual.intruders import SiteIntruders, totals
from training.continual.metrics import Matrix


def draw_all(matrix: Matrix, intruders: Mapping[str, Sequence[SiteIntruders]], out: Path) -> list[Path]:
    """Write matrix.png, curves.png and, where anything was counted, intruders.png; raises `PlotsUnavailable`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsUnavailable("plots need matplotlib: pip install 'loraplex[plots]'") from error
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"matrix.png": heat_map(Figure, matrix), "curves.png": curves(Figure, matrix)}
    if intruders:
        pictures["intruders.png"] = _by_layer(Figure, intruders)
    for name, figure in pictures.items():
        figure.savefig(out / name, dpi=120, bbox_inches="tight")
    return [out / name for name in pictures]


def heat_map(figure_of: Any, matrix: Matrix) -> Any:
    """Every task's score after every stage; `figure_of` is matplotlib's Figure."""
    rows = [matrix.base, *matrix.rows]
    figure = figure_of(figsize=(1.2 * len(matrix.tasks) + 2, 0.6 * len(rows) + 1.4))
    axes = figure.subplots()
    image = axes.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, row in enumerate(rows):
        for x, score in enumerate(row):
            axes.text(x, y, f"{score:.2f}", ha="center", va="center", color="white" if score < 0.6 else "black")
    for stage in range(matrix.stages):  # each task's own stage
        axes.add_patch(_frame(stage))
    axes.set_xticks(range(len(matrix.tasks)), matrix.tasks, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), ["base", *(f"after {name}" for name in matrix.tasks[: matrix.stages])])
    figure.colorbar(image, ax=axes, label="score")
    return figure


def _frame(stage: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((stage - 0.5, stage + 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.5)


def curves(figure_of: Any, matrix: Matrix) -> Any:
    """Every task's score over the stages, its own marked."""
    figure = figure_of(figsize=(7, 4))
    axes = figure.subplots()
    for index, name in enumerate(matrix.tasks):
        line = axes.plot(
            range(matrix.stages + 1), [matrix.base[index], *(row[index] for row in matrix.rows)], label=name
        )
        if index < matrix.stages:
            axes.plot(index + 1, matrix.rows[index][index], "o", color=line[0].get_color())
    axes.set_xticks(range(matrix.stages + 1), ["base", *matrix.tasks[: matrix.stages]], rotation=30, ha="right")
    axes.set_xlabel("after the stage of")
    axes.set_ylabel("score")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize="small")
    return figure


def _by_layer(figure_of: Any, intruders: Mapping[str, Sequence[SiteIntruders]]) -> Any:
    figure = figure_of(figsize=(8, 5))
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name, sites in intruders.items():
        rows = list(totals(sites))
        layers = range(len(rows))
        line = upper.plot(layers, [row[1] for row in rows], label=f"after {name}")
        upper.plot(layers, [row[2] for row in rows], linestyle=":", color=line[0].get_color())
        lower.plot(layers, [row[3] for row in rows])
        lower.set_xticks(layers, [row[0] for row in rows], fontsize="x-small")
    upper.set_ylabel("intruders (dotted: random)")
    upper.legend(fontsize="small")
    lower.set_ylabel("‖ΔW‖ / ‖W‖")
    lower.set_xlabel("layer")
    return figure
