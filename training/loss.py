"""The loss, with logits only where there are labels.

With answers of a few tokens nearly all of a full logits tensor [batch, length, vocabulary] would be thrown away, and on
a small model the output head is a fifth of all work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.encode import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LabelLoss:
    """The loss of one batch."""

    total: Tensor  # sum over labelled tokens of -log p(token | what precedes it), scalar float32
    tokens: int  # labelled tokens


def label_loss(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> LabelLoss:
    """-sum log p(labels[b, t+1] | input_ids[b, :t+1]) over the labels that count.

    `input_ids`, `attention_mask` (1 = token, 0 = padding on the right) and `labels` are [batch, length]; `model` is a
    causal model whose head is one linear layer, LoRA layers put in place allowed.
    """
    logits, wanted, _ = _at_labels(model, input_ids, attention_mask, labels)
    return LabelLoss(functional.cross_entropy(logits, wanted, reduction="sum"), wanted.numel())


def label_losses(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """As `label_loss`, of every row by itself: (nats [batch] float32, labelled tokens [batch] int64)."""
    logits, wanted, rows = _at_labels(model, input_ids, attention_mask, labels)
    each = functional.cross_entropy(logits, wanted, reduction="none")
    nats = torch.zeros(len(labels), device=each.device).index_add_(0, rows, each)
    return nats, torch.bincount(rows, minlength=len(labels))


def _at_labels(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [tokens, vocabulary] float32, the labels there [tokens], their rows [tokens])."""
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    wanted = labels[:, 1:]
    counts = wanted != IGNORED
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    logits = head(hidden[:, :-1][counts]).float() * _logit_scale(model)
    return logits, wanted[counts], counts.nonzero()[:, 0]


def plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are head(hidden), at most times a factor that `label_loss` knows.

    False for models that bend their logits in another way (a soft cap), which need the full forward.
    """
    config = model.config.get_text_config()
    return isinstance(model.get_output_embeddings(), nn.Linear) and not getattr(config, "final_logit_softcapping", None)


def _logit_scale(model: PreTrainedModel) -> float:
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    return 1.0 if scaling is None else 1.0 / float(scaling)


def summed_loss(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> tuple[float, int]:
    """(sum in nats, labelled tokens) of `batches`; the model is left as it was."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        with torch.inference_mode():
            for batch in batches:
                loss = label_loss(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
                total += float(loss.total)
                tokens += loss.tokens
    finally:
        model.train(training)
    return total, tokens
