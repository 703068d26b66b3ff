"""A run's loss curves as a picture (PNG, SVG) or as numbers (JSON), and as TensorBoard events while it lasts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from training.errors import LogUnavailable
from training.output import check_makeable
from training.watch import Curves, Listener

SUFFIXES: Final = (".png", ".svg", ".json")
_INSTALL: Final = "pip install 'loraplex[plots]'"


def check_curves(paths: Sequence[Path]) -> None:
    """Raise now rather than after hours of training, where one of `paths` could not be drawn or written.

    `LogUnavailable` for what cannot be drawn, `OutputUnwritable` for what cannot be written.
    """
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise LogUnavailable(f"{path.name}: curves are written as {', '.join(SUFFIXES)}")
        if path.suffix != ".json":
            new_figure()
        check_makeable(path)


def write_curves(curves: Curves, title: str, path: Path) -> None:
    """Write the curves to `path`, in the form its suffix says (one of SUFFIXES). Raises `LogUnavailable`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps({"title": title, **curves.as_dict()}) + "\n", "utf-8")
        return
    figure = new_figure()
    axes = figure.subplots()
    axes.plot(*_columns(curves.training), color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
    axes.plot(*_columns(_smoothed(curves.training)), color="tab:blue", label="training, mean of 10 steps")
    if curves.validation:
        axes.plot(*_columns(curves.validation), color="tab:orange", marker="o", markersize=4, label="held out")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss, nats a trained token")
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, path)


def new_figure(width: float = 7.0, height: float = 4.0) -> Any:
    """An empty matplotlib figure, in inches; no window system is needed. Raises `LogUnavailable`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LogUnavailable(f"plots need matplotlib: {_INSTALL}") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """As PNG or SVG; the same figure gives the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "loraplex", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def event_log(directory: Path, resumed_at: int | None) -> tuple[Listener, Any]:
    """(what `Watch.listeners` takes, the writer to close): TensorBoard events in `directory`.

    After a resume events of later steps than `resumed_at` are marked as gone. Raises `LogUnavailable`.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise LogUnavailable(f"--tensorboard needs the package tensorboard: {_INSTALL}") from error
    writer: Any = SummaryWriter(str(directory), purge_step=None if resumed_at is None else resumed_at + 1)
    return lambda what, step, value: writer.add_scalar(what, value, step), writer


def _columns(points: Any) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def _smoothed(points: Any, over: int = 10) -> list[tuple[int, float]]:
    losses = [loss for _, loss in points]
    windows = [losses[max(0, at + 1 - over) : at + 1] for at in range(len(losses))]
    return [(step, sum(window) / len(window)) for (step, _), window in zip(points, windows, strict=True)]
