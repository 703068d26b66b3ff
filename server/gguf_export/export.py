"""Exports that are proven before they get their name: written aside, read back, computed in plain torch, compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.equivalence import encode_prompt, load_float32
from server.errors import ExportNotEquivalent
from server.gguf_export.architecture import Architecture
from server.gguf_export.files import GgufType, base_tensors, write_checked, write_lora, write_model
from server.gguf_export.lora import lora_pairs
from server.gguf_export.plain_model import PlainModel, read_alpha, read_architecture, read_tensors

# Mean KL in nats, and the share of positions with equal choice. Only the order of additions differs in f32. A wrong
# order of the rows of one projection shows a KL above 0.1 on SmolLM2-135M, a scale 2 % off about 1e-5.
LIMITS: dict[GgufType, tuple[float, float]] = {"f32": (1e-7, 0.99), "f16": (1e-5, 0.98), "bf16": (5e-3, 0.95)}


@dataclass(frozen=True)
class Parity:
    """How far an exported file is from what it was made of."""

    prompts: int
    positions: int
    max_logit_delta: float
    mean_kl: float  # nats, KL(original || file)
    agreement: float  # share of positions with the same likeliest token

    def failures(self, kind: GgufType) -> list[str]:
        """What breaks the limits of that type, in words; a NaN breaks them too."""
        kl, agreement = LIMITS[kind]
        found = []
        if not self.mean_kl <= kl:
            found.append(f"mean KL is {self.mean_kl:.3g} nats, above {kl:g}")
        if not self.agreement >= agreement:
            found.append(f"{self.agreement:.1%} equal choices, below {agreement:.0%}")
        return found


def export_model(directory: Path, out: Path, kind: GgufType, title: str, prompts: Sequence[str]) -> Parity:
    """The transformers model in `directory` as the GGUF file `out`, proven against transformers in float32.

    Raises `ExportUnsupported`, `TargetNotEmpty`, `ExportNotEquivalent`.
    """
    found: list[Parity] = []

    def check(path: Path) -> None:
        plain = PlainModel(read_architecture(path), read_tensors(path))
        original = load_float32(directory)
        found.append(_parity(directory, prompts, lambda ids: original(input_ids=ids[None]).logits[0], plain))
        _refuse_failures(found[-1], kind)

    write_checked(out, lambda path: write_model(directory, path, kind, title), check)
    return found[0]


def export_lora(
    adapter: Path, name: str, base: Path, out: Path, kind: GgufType, prompts: Sequence[str]
) -> tuple[int, Parity]:
    """The PEFT LoRA in `adapter` as the GGUF file `out`; (modules, its parity with PEFT on `base` in float32).

    Raises `ExportUnsupported`, `TargetNotEmpty`, `ExportNotEquivalent`.
    """
    architecture = Architecture.of(base)
    pairs, alpha = lora_pairs(adapter, name, architecture)
    found: list[Parity] = []

    def check(path: Path) -> None:
        from peft import PeftModel

        plain = PlainModel(
            architecture, dict(base_tensors(base, architecture)), lora=read_tensors(path), alpha=read_alpha(path)
        )
        adapted: Any = PeftModel.from_pretrained(load_float32(base), str(adapter)).eval()
        found.append(_parity(base, prompts, lambda ids: adapted(input_ids=ids[None]).logits[0], plain))
        _refuse_failures(found[-1], kind)

    write_checked(out, lambda path: write_lora(architecture, pairs, alpha, path, kind), check)
    return len(pairs), found[0]


@torch.inference_mode()
def _parity(base: Path, prompts: Sequence[str], original: Callable[[Tensor], Tensor], plain: PlainModel) -> Parity:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    worst, kl, positions, equal = 0.0, 0.0, 0, 0
    for prompt in prompts:
        ids = torch.tensor(encode_prompt(tokenizer, prompt))
        expected, computed = original(ids).float(), plain.logits(ids)
        delta = float((expected - computed).abs().max())
        worst = delta if math.isnan(delta) or delta > worst else worst  # once NaN, always NaN
        p, q = (torch.log_softmax(each.double(), -1) for each in (expected, computed))
        kl += float((p.exp() * (p - q)).sum(-1).clamp(min=0).sum())
        positions += len(ids)
        equal += int((expected.argmax(-1) == computed.argmax(-1)).sum())
    return Parity(len(prompts), positions, worst, kl / positions, equal / positions)


def _refuse_failures(parity: Parity, kind: GgufType) -> None:
    failures = parity.failures(kind)
    if failures:
        raise ExportNotEquivalent(f"the file, read back, computes something else: {'; '.join(failures)}")
