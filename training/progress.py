"""What a person sees while a run lasts: one line with losses, tokens per second and the time left."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from training.trainer import LabelTrainer

_SMOOTHED_OVER = 10  # steps
_WIDE = 100  # columns


class ProgressLine(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """A progress bar on a terminal; elsewhere (a log file, CI) a plain line about every tenth of the run."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._bar: Progress | None = None
        self._task: Any = None
        self._trainer: LabelTrainer | None = None
        self._held_out = ""  # the last loss on what is held out, in words
        self._recent: deque[tuple[float, int]] = deque(maxlen=_SMOOTHED_OVER)

    def watch(self, trainer: LabelTrainer) -> None:
        """Say whose losses and tokens to show."""
        self._trainer = trainer

    def hear(self, what: str, step: int, value: float) -> None:
        """As a listener of the watch: keep the loss on held-out examples for the next line."""
        if what == "validation/loss":
            self._held_out = f", held out {value:.3f}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the bar."""
        self._recent.append((time.monotonic(), 0))
        if self._console.is_terminal:
            # Where not all fits, steps and times would be cut: better without the speed.
            speed = ", {task.fields[speed]:.0f} tokens/s" if self._console.width >= _WIDE else ""
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.3f}{task.fields[held]}" + speed),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._title,
                total=state.max_steps,
                completed=state.global_step,
                loss=0.0,
                held=self._held_out,
                speed=0.0,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        if self._trainer is None:
            return
        now, tokens = time.monotonic(), self._trainer.tokens
        since, before = self._recent[0]
        speed = (tokens - before) / max(1e-9, now - since)
        self._recent.append((now, tokens))
        recent = self._trainer.losses[-_SMOOTHED_OVER:]
        loss = sum(recent) / len(recent)
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, loss=loss, held=self._held_out, speed=speed)
        elif state.global_step % max(1, state.max_steps // 10) == 0 or state.global_step == state.max_steps:
            self._console.print(
                f"{self._title}: step {state.global_step}/{state.max_steps}, loss {loss:.3f}{self._held_out}, "
                f"{speed:.0f} tokens/s",
                highlight=False,
                soft_wrap=True,
            )

    def stop(self) -> None:
        """Take the bar down, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
