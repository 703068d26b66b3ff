"""A comparison's pictures: every arm's mean of what it has learned so far, and the matrices of a few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.continual.compare.figures import Arm, learned_means
from training.continual.errors import PlotsUnavailable
from training.continual.metrics import Matrix
from training.continual.plots import curves, heat_map


def draw(arms: Sequence[Arm], matrices: Mapping[str, Matrix], out: Path) -> dict[str, Any]:
    """Write them to `out`: {"learned": path, arm: {"matrix": path, "curves": path}}. Raises `PlotsUnavailable`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsUnavailable("plots need matplotlib: pip install 'loraplex[plots]'") from error
    drawn: dict[str, Any] = {"learned": _kept(_learned(Figure, arms), out / "learned.png")}
    for name, matrix in matrices.items():
        drawn[name] = {
            "matrix": _kept(heat_map(Figure, matrix), out / f"{name}-matrix.png"),
            "curves": _kept(curves(Figure, matrix), out / f"{name}-curves.png"),
        }
    return drawn


def _kept(figure: Any, path: Path) -> Path:
    figure.savefig(
        path, dpi=120, bbox_inches="tight", metadata={"Software": None}
    )  # the same bytes for the same figure
    return path


def _learned(figure_of: Any, arms: Sequence[Arm]) -> Any:
    figure = figure_of(figsize=(9, 5))
    axes = figure.subplots()
    for number, arm in enumerate(arms):
        means = learned_means(arm)
        stages = range(1, len(means) + 1)
        if arm.evolving:
            style = "-" if number < 10 else "--"  # matplotlib has ten colours
            axes.plot(stages, means, style, marker="o", markersize=3, label=arm.name)
        elif (acc := arm.mean("acc")) is not None:
            axes.axhline(
                acc, linestyle=":", color="black" if len(means) == 1 else "grey", label=f"{arm.name}, at the end"
            )
    axes.set_xlabel("stages done")
    axes.set_ylabel("mean score of the tasks learned so far")
    axes.set_ylim(0, 1)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
