"""What a run says of itself: to a person when it starts, and in loraplex.json for good."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from hub.base_identity import BaseIdentity
from hub.facts import Facts
from training.build import card_beside
from training.data import Dataset
from training.encode import EncodedSet
from training.processes import Processes
from training.trainable import Trainable
from training.watch import Watch

if TYPE_CHECKING:
    from training.finetune import Plan
    from training.trainer import LabelTrainer

_LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


@dataclass(frozen=True)
class Spent:
    """What the optimizer loop took, validations included; after a resume since then."""

    seconds: float
    cpu_seconds: float  # of all threads: what a busy machine cannot inflate


def announce(
    console: Console,
    plan: Plan,
    trainable: Trainable,
    encoded: EncodedSet,
    held: EncodedSet | None,
    processes: Processes,
) -> None:
    """One line: what is trained on what."""
    left_out = f", {encoded.too_long} over {plan.recipe.max_length} tokens left out" if encoded.too_long else ""
    several = f"{processes.count} processes, " if processes.count > 1 else ""
    console.print(
        f"{plan.method} on {plan.base.name}: {len(encoded.examples)} examples ({encoded.tokens} tokens, "
        f"{encoded.label_tokens} of them trained{left_out}), {len(held.examples) if held else 0} held out; "
        f"recipe {plan.recipe.name}; {trainable.trained:,} of {trainable.parameters:,} parameters; "
        f"{several}{processes.device}, {trainable.precision}",
        highlight=False,
        soft_wrap=True,
    )


def facts_of(
    plan: Plan,
    dataset: Dataset,
    encoded: EncodedSet,
    held: EncodedSet | None,
    trainable: Trainable,
    trainer: LabelTrainer,
    watch: Watch,
    spent: Spent,
    after: float | None,
    skills: Mapping[str, Any] | None,
) -> Facts:
    """The facts of a run that came to its end; `after` is the validation loss of the weights that are kept."""
    curves = watch.curves
    recent = [loss for _, loss in curves.training[-10:]]
    quantization = "nf4" if plan.method == "qlora" else "none"
    return Facts(
        recipe={
            **plan.recipe.as_dict(),
            "method": plan.method,
            "libraries": {name: version(name) for name in _LIBRARIES},
        },
        datasets={
            "file": plan.data.name,
            "digest": dataset.digest,
            "train_examples": len(encoded.examples),
            "validation_examples": len(held.examples) if held else 0,
            "left_out_too_long": encoded.too_long + (held.too_long if held else 0),
            "tokens": encoded.tokens,
            "label_tokens": encoded.label_tokens,
            **_task_facts(plan.data, dataset.digest),
            **({"skills": dict(skills)} if skills is not None else {}),
        },
        metrics={
            "validation_loss_before": curves.validation[0][1] if curves.validation else None,
            "validation_loss": after,
            "validation_best_step": watch.best_step,
            "train_loss_last": sum(recent) / max(1, len(recent)),
            "steps": curves.training[-1][0] if curves.training else 0,
            "stopped_early": watch.stopped,
            "memorizing_from_step": watch.warned_at,
            "seconds": round(spent.seconds, 1),
            "cpu_seconds": round(spent.cpu_seconds, 1),
            "tokens_per_second": round(trainer.tokens / max(spent.seconds, 1e-9)),
            "padding_share": round(trainer.padding_share, 4),
            "trained_parameters": trainable.trained,
            "all_parameters": trainable.parameters,
            "precision": trainable.precision,
            "optimizer": str(trainer.args.optim.value),
            "processes": trainer.processes.count,
            "device": f"{trainer.processes.device} ({platform.machine()}, {torch.get_num_threads()} threads)",
        },
        seeds={"training": plan.recipe.seed, "hold_out": plan.recipe.seed},
        base=BaseIdentity(plan.base.name, plan.base.revision, plan.base.fingerprint, quantization),
    )


def _task_facts(data: Path, digest: str) -> dict[str, Any]:
    """What `hub data build` wrote beside the file, if it is that file still."""
    told = card_beside(data)
    if not told or told["files"][data.name].get("digest") != digest:
        return {}
    return {key: told.get(key) for key in ("task", "provenance", "licence")}


def shown(loss: float | None) -> str:
    """A loss for people."""
    return "–" if loss is None else f"{loss:.3f}"
