"""One training run: chat JSONL and a base in, an adapter directory (or a whole model) out."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from hub.base import BaseIdentity
from hub.facts import Facts
from training import output
from training.build import CARD
from training.checkpoints import Checkpoints
from training.data import Dataset, hold_out, read_jsonl
from training.encode import Encoded, EncodedSet, encode_all
from training.loss import mean_loss
from training.progress import ProgressLine
from training.quiet import quiet_libraries
from training.recipe import Recipe
from training.template import check_rendering, training_template
from training.trainable import Method, Trainable, float32_adapters, make_trainable

if TYPE_CHECKING:
    from training.trainer import LabelTrainer

_RENDERING_SAMPLES = 64  # examples on which the two templates are compared
_LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


@dataclass(frozen=True)
class Plan:
    """Everything a run is told."""

    data: Path  # chat JSONL
    base: BaseIdentity  # as recorded; its name is what the adapter's config will say
    base_directory: Path
    recipe: Recipe
    out: Path
    method: Method = "lora"
    max_steps: int | None = None  # optimizer steps; None = as many as the epochs make
    resume: bool = False
    threads: int = 0  # CPU threads; 0 leaves torch's setting
    checkpoint_steps: int = 50  # optimizer steps between checkpoints


@dataclass(frozen=True)
class Outcome:
    """What a run did; `facts` is what was written beside the weights."""

    out: Path
    facts: Facts
    losses: tuple[float, ...] = field(repr=False)  # mean of every forward, in order; after a resume those since


def train(plan: Plan, console: Console | None = None) -> Outcome:
    """Run `plan` and write its result; progress goes to `console` (stderr by default).

    Raises subclasses of `TrainingError`; an interrupted run leaves checkpoints beside `plan.out` for `resume`.
    """
    console = console or Console(stderr=True)
    output.check_free(plan.out)
    dataset = read_jsonl(plan.data)
    # First of all, before anything looks at the examples.
    training, validation = hold_out(dataset.examples, plan.recipe.hold_out, plan.recipe.seed)
    checkpoints = Checkpoints.beside(plan.out, _identity(plan, dataset))
    checkpoints.open(resume=plan.resume)
    if plan.threads:
        torch.set_num_threads(plan.threads)
    quiet_libraries()
    started = time.monotonic()

    from transformers import AutoTokenizer, logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(plan.base_directory))
    template = training_template(tokenizer)
    if template is not None:
        check_rendering(tokenizer, template, dataset.examples[:_RENDERING_SAMPLES])
    stops = stop_ids(plan.base_directory, tokenizer)
    encoded = encode_all(tokenizer, template, training, stops, plan.recipe.max_length)
    held = encode_all(tokenizer, template, validation, stops, plan.recipe.max_length) if validation else None

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(plan.recipe.seed)
    trainable = make_trainable(plan.base_directory, plan.base.name or "", plan.method, plan.recipe, device)
    line = ProgressLine(console, f"train {plan.out.name}")
    trainer = _trainer(plan, trainable, tokenizer, encoded, checkpoints, line, device)
    line.watch(trainer)
    _announce(console, plan, trainable, encoded, held, device)

    before = _validation_loss(trainer, held)
    resumed = checkpoints.latest() if plan.resume else None
    loop_started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except KeyboardInterrupt:
        if checkpoints.latest() is not None:
            line.stop()
            console.print(f"stopped at step {trainer.state.global_step}; --resume goes on from the last checkpoint")
        raise
    finally:
        line.stop()
    seconds = time.monotonic() - loop_started
    after = _validation_loss(trainer, held)
    facts = _facts(plan, dataset, encoded, held, trainable, trainer, device, seconds, before, after)
    if plan.method == "full":
        save = output.save_model(trainable.model, tokenizer, plan.base.name or "", facts)
    else:
        save = output.save_adapter(trainable.model, plan.base.name or "", facts)
    output.write_directory(plan.out, save)
    checkpoints.discard()
    console.print(
        f"done in {time.monotonic() - started:.0f} s: loss on {len(held.examples) if held else 0} held-out examples "
        f"{_shown(before)} → {_shown(after)}, {trainer.tokens / max(seconds, 1e-9):.0f} tokens/s, "
        f"{100 * trainer.padding_share:.1f} % padding → {plan.out}",
        highlight=False,
        soft_wrap=True,
    )
    return Outcome(plan.out, facts, tuple(trainer.losses))


def _identity(plan: Plan, dataset: Dataset) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's."""
    return {
        "data": dataset.digest,
        "base": plan.base.fingerprint or plan.base.name,
        "method": plan.method,
        "recipe": plan.recipe.as_dict(),
        "max_steps": plan.max_steps,
    }


def stop_ids(directory: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens on which generation stops, the tokenizer's and those of the base's generation config."""
    ids = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    file = directory / "generation_config.json"
    if file.is_file():
        given = json.loads(file.read_text("utf-8")).get("eos_token_id")
        ids.update([given] if isinstance(given, int) else given or [])
    return frozenset(ids)


def _trainer(
    plan: Plan,
    trainable: Trainable,
    tokenizer: Any,
    encoded: EncodedSet,
    checkpoints: Checkpoints,
    line: ProgressLine,
    device: str,
) -> LabelTrainer:
    from datasets import Dataset as Rows
    from transformers import PrinterCallback
    from trl import SFTConfig

    from training.trainer import LabelTrainer

    recipe = plan.recipe
    config = SFTConfig(
        output_dir=str(checkpoints.directory),
        num_train_epochs=recipe.epochs,
        max_steps=plan.max_steps or -1,
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,  # below 1 it is a fraction of all steps
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        bf16=trainable.autocast,
        use_cpu=device == "cpu",
        save_strategy="steps",
        save_steps=plan.checkpoint_steps,
        save_total_limit=2,
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = Rows.from_list([example.as_row() for example in encoded.examples])
    trainer = LabelTrainer(
        model=trainable.model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[line]
    )
    trainer.remove_callback(PrinterCallback)
    float32_adapters(trainer.model)
    return trainer


def _validation_loss(trainer: LabelTrainer, held: EncodedSet | None) -> float | None:
    if held is None:
        return None
    batches = _batches(trainer, held.examples)
    model = trainer.model
    with trainer.accelerator.autocast():
        return mean_loss(model.get_base_model() if hasattr(model, "get_base_model") else model, batches)


def _batches(trainer: LabelTrainer, examples: tuple[Encoded, ...]) -> list[dict[str, Tensor]]:
    rows = [example.as_row() for example in sorted(examples, key=lambda example: len(example.input_ids))]
    size = trainer.args.per_device_train_batch_size
    batches = [trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [{name: tensor.to(trainer.args.device) for name, tensor in batch.items()} for batch in batches]


def _announce(
    console: Console, plan: Plan, trainable: Trainable, encoded: EncodedSet, held: EncodedSet | None, device: str
) -> None:
    left_out = f", {encoded.too_long} over {plan.recipe.max_length} tokens left out" if encoded.too_long else ""
    console.print(
        f"{plan.method} on {plan.base.name}: {len(encoded.examples)} examples ({encoded.tokens} tokens, "
        f"{encoded.label_tokens} of them trained{left_out}), {len(held.examples) if held else 0} held out; "
        f"recipe {plan.recipe.name}; {trainable.trained:,} of {trainable.parameters:,} parameters; "
        f"{device}, {trainable.precision}",
        highlight=False,
        soft_wrap=True,
    )


def _facts(
    plan: Plan,
    dataset: Dataset,
    encoded: EncodedSet,
    held: EncodedSet | None,
    trainable: Trainable,
    trainer: LabelTrainer,
    device: str,
    seconds: float,
    before: float | None,
    after: float | None,
) -> Facts:
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
        },
        metrics={
            "validation_loss_before": before,
            "validation_loss": after,
            "train_loss_last": sum(trainer.losses[-10:]) / max(1, len(trainer.losses[-10:])),
            "steps": trainer.state.global_step,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(trainer.tokens / max(seconds, 1e-9)),
            "padding_share": round(trainer.padding_share, 4),
            "trained_parameters": trainable.trained,
            "all_parameters": trainable.parameters,
            "precision": trainable.precision,
            "device": f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)",
        },
        seeds={"training": plan.recipe.seed, "hold_out": plan.recipe.seed},
        base=BaseIdentity(plan.base.name, plan.base.revision, plan.base.fingerprint, quantization),
    )


def _task_facts(data: Path, digest: str) -> dict[str, Any]:
    """What `hub data build` wrote beside the file, if it is that file still."""
    card = data.with_name(CARD)
    if not card.is_file():
        return {}
    told = json.loads(card.read_text("utf-8"))
    if told.get("files", {}).get(data.name, {}).get("digest") != digest:
        return {}
    return {key: told.get(key) for key in ("task", "provenance", "licence")}


def _shown(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"
