"""Logits only where there are labels give the loss, and the gradients, of the plain forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from training.encode import IGNORED
from training.loss import label_loss, plain_head, summed_loss


@pytest.fixture
def model(tiny_base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows of 9, 6 and 4 tokens, right-padded, with labels in two places of the first row."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 6, 4])
    ids = torch.randint(0, 256, (3, 9), generator=generator)
    mask = (torch.arange(9) < lengths[:, None]).long()
    labels = torch.full_like(ids, IGNORED)
    for row, places in enumerate(([2, 3, 8], [5], [0, 3])):
        labels[row, places] = ids[row, places]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return functional.cross_entropy(flat, batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORED, reduction="sum")


def test_the_loss_and_its_gradients_are_those_of_the_plain_forward(model: Any, batch: dict[str, torch.Tensor]) -> None:
    ours = label_loss(model, **batch)
    ours.total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    plain = plain_loss(model, batch)
    plain.backward()
    assert ours.tokens == 5  # a label on the first token of a row has no prediction
    torch.testing.assert_close(ours.total, plain, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_an_adapter_in_place_counts(model: Any, batch: dict[str, torch.Tensor]) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    before = label_loss(adapted.get_base_model(), **batch).total
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    after = label_loss(adapted.get_base_model(), **batch).total
    assert (after - before).abs() > 0.01
    torch.testing.assert_close(after, plain_loss(adapted, batch), rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(model: Any, batch: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        together = float(label_loss(model, **batch).total)
        alone = 0.0
        for row in range(3):
            length = int(batch["attention_mask"][row].sum())
            alone += float(
                label_loss(model, **{name: tensor[row : row + 1, :length] for name, tensor in batch.items()}).total
            )
    assert together == pytest.approx(alone, rel=1e-5)


def test_the_validation_loss_weighs_tokens_not_batches(model: Any, batch: dict[str, torch.Tensor]) -> None:
    rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(3)]
    model.train()
    assert summed_loss(model, rows) == (pytest.approx(float(plain_loss(model, batch).detach()), rel=1e-5), 5)
    assert model.training


def test_a_factor_on_the_logits_is_applied_and_a_soft_cap_is_not_known(
    model: Any, batch: dict[str, torch.Tensor]
) -> None:
    assert plain_head(model)
    before = label_loss(model, **batch).total
    model.config.logits_scaling = 2.0  # as Granite has it
    hidden = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    wanted = functional.cross_entropy(
        (model.lm_head(hidden[:, :-1]) / 2).reshape(-1, 300), batch["labels"][:, 1:].reshape(-1), reduction="sum"
    )
    scaled = label_loss(model, **batch).total
    torch.testing.assert_close(scaled, wanted, rtol=1e-5, atol=1e-5)
    assert (scaled - before).abs() > 0.01
    model.config.final_logit_softcapping = 30.0
    assert not plain_head(model)
