"""Watching a run: the loss on held-out examples as it goes, when to stop, when to warn, and the curves of both.

All of it is a function of the step alone and goes into every checkpoint, so a resumed run stops where, and warns of
what, the uninterrupted one would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

if TYPE_CHECKING:
    from training.trainer import LabelTrainer

LOW_TRAINING_LOSS: Final = 0.2  # of itself it means nothing: with answers of one word it is reached at once
_RECENT_STEPS: Final = 10
Curve = Sequence[tuple[int, float]]
Listener = Callable[[str, int, float], object]  # what ("train/loss"), after which step, its value


@dataclass(frozen=True)
class Curves:
    """Mean loss over (optimizer step, nats a token)."""

    training: Curve  # of each step
    validation: Curve  # before the first step, and wherever it was measured

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {"training": [list(point) for point in self.training], "validation": [list(p) for p in self.validation]}


class Watch(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is untyped here
    """Measures the validation loss after every `every` steps and the last one.

    With `patience` > 0 the run stops after so many measurements in a row without a new lowest loss, and `best` holds
    the trained weights of the lowest. `measure` returns None where nothing is held out; then nothing is watched.
    """

    def __init__(
        self, console: Console, measure: Callable[[], float | None], every: int, patience: int, best: Path
    ) -> None:
        self._console = console
        self._measure = measure
        self._every = every
        self._patience = patience
        self._best = best
        self._trainer: LabelTrainer | None = None
        self._forwards = 0  # of the trainer's losses, how many are in the curve
        self._training: list[tuple[int, float]] = []
        self._validation: list[tuple[int, float]] = []
        self.listeners: list[Listener] = []
        self.stopped = False
        self.warned_at: int | None = None  # step

    def watch(self, trainer: LabelTrainer) -> None:
        """Say whose losses and weights to look at."""
        self._trainer = trainer

    @property
    def curves(self) -> Curves:
        """What was measured so far, before a resume too."""
        return Curves(tuple(self._training), tuple(self._validation))

    @property
    def best_step(self) -> int | None:
        """Where the validation loss was lowest, the first of equals."""
        return min(self._validation, key=lambda point: point[1])[0] if self._validation else None

    def begin(self) -> float | None:
        """Measure before the first step."""
        loss = self._measure()
        if loss is not None:
            self._note_validation(0, loss)
        return loss

    def restore(self, checkpoint: Path) -> None:
        """Be as when this checkpoint was written."""
        told = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["stateful_callbacks"]["Watch"]
        self._training = [(int(step), float(loss)) for step, loss in told["training"]]
        self._validation = [(int(step), float(loss)) for step, loss in told["validation"]]
        self.stopped, self.warned_at = bool(told["stopped"]), told["warned_at"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {**self.curves.as_dict(), "stopped": self.stopped, "warned_at": self.warned_at}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say where patience can never run out before the run does."""
        if self._patience and self._patience * self._every >= state.max_steps:
            self._say(
                f"early stop {self._patience}: with a validation loss every {self._every} of {state.max_steps} steps "
                "the run only keeps its best weights; to end early it needs more of them (--validation-steps)"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the step's loss; measure where it is time to."""
        assert self._trainer is not None
        losses = self._trainer.losses[self._forwards :]
        self._forwards += len(losses)
        loss = sum(losses) / len(losses)
        self._training.append((state.global_step, loss))
        self._tell("train/loss", state.global_step, loss)
        if state.global_step % self._every and state.global_step != state.max_steps:
            return
        measured = self._measure()
        if measured is None:
            return
        self._note_validation(state.global_step, measured)
        self._warn(state.global_step)
        if self._patience and self._since_best() >= self._patience and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            # The state that says so must be in a checkpoint, or a resumed run would go on.
            control.should_save = True
            self._say(f"stopped at step {state.global_step}: no lower validation loss since step {self.best_step}")

    def load_best(self) -> None:
        """Put the weights of the lowest validation loss into the model; only with patience."""
        assert self._trainer is not None
        if not self._patience or not self._validation or self.best_step == self._validation[-1][0]:
            return
        kept = load_file(self._best)
        for name, parameter in _trained(self._trainer.model):
            parameter.data.copy_(kept[name])

    def _note_validation(self, step: int, loss: float) -> None:
        self._validation.append((step, loss))
        self._tell("validation/loss", step, loss)
        if self._patience and self.best_step == step:
            self._keep_best()

    def _keep_best(self) -> None:
        if self._trainer is None or not self._trainer.processes.first:
            return
        aside = self._best.with_suffix(".partial")
        save_file({name: parameter.data.contiguous() for name, parameter in _trained(self._trainer.model)}, aside)
        aside.replace(self._best)

    def _since_best(self) -> int:
        """Measurements after the lowest one."""
        steps = [step for step, _ in self._validation]
        return len(steps) - 1 - steps.index(self.best_step)  # type: ignore[arg-type]

    def _warn(self, step: int) -> None:
        recent = [loss for _, loss in self._training[-_RECENT_STEPS:]]
        mean = sum(recent) / len(recent)
        lowest = min(loss for _, loss in self._validation)
        last = self._validation[-1][1]
        if self.warned_at is None and mean < LOW_TRAINING_LOSS and last > lowest:
            self.warned_at = step
            self._say(
                f"warning: the training loss is {mean:.3f} while the validation loss rises "
                f"({lowest:.3f} → {last:.3f}): the run begins to learn by heart; fewer epochs, a lower rate, "
                "--early-stop or more data"
            )

    def _tell(self, what: str, step: int, value: float) -> None:
        for listener in self.listeners:
            listener(what, step, value)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
