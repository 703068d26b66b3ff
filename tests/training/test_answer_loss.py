"""The loss of a task's own answers, against transformers' loss with labels, one question at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.answer_loss import LONGEST, answer_losses
from training.data import Example

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
EXAMPLES = [Example.of(user="x" * n, answer="ab" * (12 - n)) for n in range(1, 12)]


@pytest.fixture
def adapters(tiny_base: Path, tmp_path: Path) -> dict[str, Path]:
    places = {}
    for seed, name in enumerate(("a1", "b2")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + seed, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config)
        adapted.save_pretrained(tmp_path / name)
        places[name] = tmp_path / name
    return places


def test_every_models_loss_is_that_of_transformers(tiny_base: Path, adapters: dict[str, Path]) -> None:
    found = answer_losses(tiny_base, adapters, EXAMPLES, quantized=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    assert list(found) == [None, "a1", "b2"]
    for name, measured in found.items():
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        if name is not None:
            model = PeftModel.from_pretrained(model, adapters[name])
        model.eval()
        for example, (nats, tokens) in zip(EXAMPLES, measured.counts, strict=True):
            messages = [message.as_dict() for message in example.messages]
            # What a server sends, and then the answer with the token that ends it.
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            answer = tokenizer.apply_chat_template(messages, tokenize=False)[len(prompt) :].rstrip("\n")
            ids = torch.tensor([tokenizer(prompt + answer, add_special_tokens=False).input_ids])
            labels = ids.clone()
            labels[:, : len(tokenizer(prompt, add_special_tokens=False).input_ids)] = -100
            with torch.no_grad():
                mean = model(input_ids=ids, labels=labels).loss.item()
            assert tokens == int((labels != -100).sum()) > 1
            assert nats == pytest.approx(mean * tokens, rel=1e-4)
    values = [measured.value for measured in found.values()]
    assert len({round(value, 3) for value in values}) == 3
    alone = answer_losses(tiny_base, adapters, EXAMPLES, quantized=False, with_base=False)
    assert list(alone) == ["a1", "b2"]
    for name, measured in alone.items():
        assert np.allclose(measured.counts, found[name].counts)


def test_a_quantized_base_is_measured_as_it_is_trained_on(tiny_base: Path, adapters: dict[str, Path]) -> None:
    """As NF4 rounds the weights: near the exact base's losses, and not equal to them."""
    exact, rounded = (answer_losses(tiny_base, adapters, EXAMPLES, quantized=on) for on in (False, True))
    for name in exact:
        assert rounded[name].value == pytest.approx(exact[name].value, rel=0.1)
        assert rounded[name].value != pytest.approx(exact[name].value, rel=1e-4)


def test_an_example_too_long_to_read_counts_nothing(tiny_base: Path, adapters: dict[str, Path]) -> None:
    long = Example.of(user="too long " * LONGEST, answer="yes")
    found = answer_losses(tiny_base, adapters, [EXAMPLES[0], long, *EXAMPLES[1:]], quantized=False)
    whole = answer_losses(tiny_base, adapters, EXAMPLES, quantized=False)
    for name, measured in whole.items():
        assert found[name].counts[1].tolist() == [0, 0]
        assert np.array_equal(np.delete(found[name].counts, 1, axis=0), measured.counts)
        assert found[name].value == measured.value
