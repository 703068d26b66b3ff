"""The fast LoRA layers compute what PEFT's compute, and leave alone what they do not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training.fast_lora import speed_up
from training.loss import label_loss


def adapted(tiny_base: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype, attn_implementation="eager")
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 256, (3, 11), generator=torch.Generator().manual_seed(1))
    loss = label_loss(model.get_base_model(), ids, torch.ones_like(ids), ids).total
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_loss_and_every_gradient_are_pefts(tiny_base: Path) -> None:
    loss, gradients = loss_and_gradients(adapted(tiny_base))
    fast = adapted(tiny_base)
    assert speed_up(fast) == 14
    fast_loss, fast_gradients = loss_and_gradients(fast)
    assert len(gradients) == 28
    torch.testing.assert_close(fast_loss, loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(fast_gradients[name], gradient, rtol=1e-3, atol=1e-4)


def test_in_bfloat16_they_are_as_near_the_truth_as_pefts_under_autocast(tiny_base: Path) -> None:
    _, truth = loss_and_gradients(adapted(tiny_base))
    slow = adapted(tiny_base, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, of_peft = loss_and_gradients(slow)
    fast = adapted(tiny_base, torch.bfloat16)
    speed_up(fast)
    _, ours = loss_and_gradients(fast)

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return float(
            sum((gradients[n].float() - t).square().sum() for n, t in truth.items())
            / sum(t.square().sum() for t in truth.values())
        )

    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert error(ours) < 1.5 * error(of_peft) < 0.1


@pytest.mark.parametrize("config", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_other_layers_keep_pefts_forward(tiny_base: Path, config: dict[str, Any]) -> None:
    assert speed_up(adapted(tiny_base, **config)) == 0
