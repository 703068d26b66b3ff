"""What every engine is asked to do: prompts and random adapters, the same for all, made anew from a seed.

The adapters are ordinary PEFT directories: rank 16, alpha 32, all seven linears of a Llama layer, `lora_A` as PEFT
initialises it and `lora_B` from N(0, 0.02^2), so that each one changes the answer and none is a no-op.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

RANK = 16
ALPHA = 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """One line of the table: how many prompts at once, and whether each names an adapter of its own."""

    name: str
    prompts: int
    adapters: bool


CASES = (
    Case("solo base", prompts=1, adapters=False),
    Case("solo adapter", prompts=1, adapters=True),
    Case("base16", prompts=16, adapters=False),
    Case("mix16", prompts=16, adapters=True),
)


def prompt(number: int) -> str:
    """The text continued by request `number`."""
    return f"Tell me a story about the number {number} and its friends in the wood."


def write_adapters(base: Path, directory: Path, count: int, rank: int = RANK) -> list[Path]:
    """`count` random adapters for the model in `base`, as PEFT directories under `directory`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS
    }
    return [_write_adapter(shapes, directory / f"adapter-{number:02d}", number, rank) for number in range(count)]


def _write_adapter(shapes: dict[str, tuple[int, int]], directory: Path, seed: int, rank: int) -> Path:
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (outputs, inputs) in shapes.items():
        bound = 1 / math.sqrt(inputs)
        a = torch.empty(rank, inputs).uniform_(-bound, bound, generator=random)
        b = torch.empty(outputs, rank).normal_(0, 0.02, generator=random)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(torch.bfloat16)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(torch.bfloat16)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "smollm2-135m",
        "r": rank,
        "lora_alpha": ALPHA * rank // RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
