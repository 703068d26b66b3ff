"""TRL's SFTTrainer with our batches and our loss.

The data arrives tokenized and masked (see `training.encode`), so of the trainer's own preparation nothing is used;
what is used is its optimizer loop, checkpoints and resuming.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer

from training.batches import LengthGroupedOrder
from training.errors import TrainingDiverged
from training.loss import label_loss
from training.processes import Processes, as_forward


class LabelTrainer(SFTTrainer):  # type: ignore[misc]  # TRL is untyped
    """Trains on `input_ids` and `labels` columns with logits only at labels and rows grouped by length.

    `losses` holds the mean loss of every forward since the trainer was made; `tokens` and `padding` count what went
    through the model. All of them are those of all processes together.
    """

    def __init__(self, *args: Any, processes: Processes | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.processes = processes or Processes()
        self.losses: list[float] = []
        self.tokens = 0  # real ones
        self.padding = 0
        self.add_callback(_TellEpoch(self))

    @property
    def padding_share(self) -> float:
        """Fraction of all positions that held padding."""
        return self.padding / max(1, self.tokens + self.padding)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The mean over the labelled tokens of the optimizer step (`num_items_in_batch`), else of this batch.

        Raises `TrainingDiverged` when it is not finite.
        """
        assert not return_outputs  # only asked for by metrics on logits, which we never configure
        mask = inputs["attention_mask"]
        # The forward that accelerate wraps in autocast is not the one called here.
        with self.accelerator.autocast():
            inner = _causal_model(self.accelerator.unwrap_model(model))
            loss = as_forward(model, lambda: label_loss(inner, inputs["input_ids"], mask, inputs["labels"]))
        here = (float(loss.total.detach()), loss.tokens, int(mask.sum()), mask.numel())
        total, tokens, real, positions = self.processes.added(here)
        seen = total / max(1, tokens)
        if seen != seen or seen in (float("inf"), float("-inf")):
            raise TrainingDiverged(f"the loss became {seen} at step {self.state.global_step}; lower the learning rate")
        self.losses.append(seen)
        self.tokens += int(real)
        self.padding += int(positions - real)
        if num_items_in_batch is None:
            return loss.total / max(1, loss.tokens)
        # The items are those of all processes, over which gradients are averaged, not added.
        return loss.total * self.processes.count / torch.as_tensor(num_items_in_batch).clamp(min=1)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        self.order = LengthGroupedOrder(lengths, self.args.train_batch_size, self.args.seed)
        return self.order

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Nothing: checkpoints are ours to resume from, not to publish."""


class _TellEpoch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Tells the order which epoch begins.

    accelerate does too, but not through what it puts around the order to skip the first batches of one process of
    several: a run resumed within an epoch would go on with the first epoch's batches.
    """

    def __init__(self, trainer: LabelTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.trainer.order.set_epoch(int(state.epoch or 0))


def _causal_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
