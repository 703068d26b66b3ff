"""The held-out examples of a run, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from training.encode import Encoded, EncodedSet
from training.loss import summed_loss

if TYPE_CHECKING:
    from training.trainer import LabelTrainer


class Validation:
    """The loss on the held-out examples, of which each process takes its share; None where there are none."""

    def __init__(self, held: EncodedSet | None) -> None:
        self._held = held
        self._trainer: LabelTrainer | None = None
        self._made: list[dict[str, Tensor]] = []

    def watch(self, trainer: LabelTrainer) -> None:
        """Say whose model to measure."""
        self._trainer = trainer
        if self._held is not None:
            self._made = _batches(trainer, self._held.examples)[trainer.processes.number :: trainer.processes.count]

    def __call__(self) -> float | None:
        """Nats a trained token, with the weights as they are now."""
        if self._trainer is None or self._held is None or not self._held.examples:
            return None
        model = self._trainer.model
        with self._trainer.accelerator.autocast():
            causal = model.get_base_model() if hasattr(model, "get_base_model") else model
            total, tokens = self._trainer.processes.added(summed_loss(causal, self._made))
        return total / tokens


def _batches(trainer: LabelTrainer, examples: tuple[Encoded, ...]) -> list[dict[str, Tensor]]:
    rows = [example.as_row() for example in sorted(examples, key=lambda example: len(example.input_ids))]
    size = trainer.args.per_device_train_batch_size
    batches = [trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [{name: tensor.to(trainer.args.device) for name, tensor in batch.items()} for batch in batches]
