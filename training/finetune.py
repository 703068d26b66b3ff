"""One training run: chat JSONL and a base in, an adapter directory (or a whole model) out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from hub.base import BaseIdentity
from hub.facts import Facts
from training import output, skills
from training.checkpoints import Checkpoints
from training.curves import check_curves, event_log, write_curves
from training.data import Dataset, Example, read_jsonl
from training.encode import Encoded, EncodedSet, encode_all
from training.errors import DataTooSmall, MethodUnsupported, RecipeInvalid
from training.hold_out import hold_out
from training.processes import Processes
from training.progress import ProgressLine
from training.qera import give_back
from training.quiet import quiet_libraries
from training.recipe import Recipe
from training.record import Spent, announce, facts_of, shown
from training.skills import SkillData
from training.template import check_rendering, training_template
from training.trainable import Method, Trainable, float32_adapters, make_trainable
from training.validation import Validation
from training.watch import Curves, Watch

if TYPE_CHECKING:
    from training.trainer import LabelTrainer

_RENDERING_SAMPLES = 64  # examples on which the two templates are compared


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
    validation_steps: int | None = None  # optimizer steps between validation losses; None: one pass
    early_stop: int = 0  # stop after so many validations without a lower loss, and keep the best weights; 0: never
    skills: SkillData | None = None  # mixed into the training examples
    tensorboard: Path | None = None  # directory for event files
    curves: tuple[Path, ...] = ()  # files to draw the losses into, see `training.curves`


@dataclass(frozen=True)
class Outcome:
    """What a run did; `facts` is what was written beside the weights."""

    out: Path
    facts: Facts
    written: bool  # whether by this process; of several it is the first that writes
    losses: tuple[float, ...] = field(repr=False)  # mean of every forward, in order; after a resume those since
    curves: Curves = field(repr=False)  # of the whole run, before a resume too


def train(plan: Plan, console: Console | None = None) -> Outcome:
    """Run `plan` and write its result; progress goes to `console` (stderr by default).

    Where a launcher started several processes, all of them call this with the same plan and files, and each computes a
    part of every step; the recipe's batch is each one's. Raises subclasses of `TrainingError`; an interrupted run
    leaves checkpoints beside `plan.out` for `resume`.
    """
    _check(plan)
    examples = _Examples.of(plan)
    processes = Processes.here()
    console = Console(quiet=True) if not processes.first else console or Console(stderr=True)
    checkpoints = Checkpoints.beside(plan.out, _identity(plan, examples, processes))
    with checkpoints.alone() if processes.first else nullcontext():
        if processes.first:
            output.check_free(plan.out)  # which another process may have written meanwhile
            checkpoints.check(resume=plan.resume)
        return _train(plan, examples, processes, checkpoints, console)


def _train(
    plan: Plan, examples: _Examples, processes: Processes, checkpoints: Checkpoints, console: Console
) -> Outcome:
    if plan.threads:
        torch.set_num_threads(plan.threads)
    quiet_libraries()
    started = time.monotonic()

    from transformers import AutoTokenizer, logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(plan.base_directory))
    encoded, held = _encode(plan, examples, tokenizer)
    torch.manual_seed(plan.recipe.seed)
    trainable = make_trainable(plan.base_directory, plan.base.name or "", plan.method, plan.recipe, processes.device)
    if processes.first and not plan.resume:
        checkpoints.begin()
    processes.wait()
    line = ProgressLine(console, f"train {plan.out.name}")
    measured = Validation(held)
    a_step = plan.recipe.batch * processes.count * plan.recipe.accumulation  # examples
    one_pass = math.ceil(len(encoded.examples) / a_step)
    best = checkpoints.directory / "best.safetensors"
    watch = Watch(console, measured, plan.validation_steps or one_pass, plan.early_stop, best)
    watch.listeners.append(line.hear)
    # The watch first, so that the line of a step has what was measured after it.
    trainer = _trainer(plan, trainable, tokenizer, encoded, checkpoints, [watch, line], processes)
    for looks in (line, watch, measured):
        looks.watch(trainer)
    announce(console, plan, trainable, encoded, held, processes)
    resumed = checkpoints.latest() if plan.resume else None
    if plan.recipe.init == "qera" and resumed is None:
        _begin_with_qera(plan, trainable, encoded.examples, console)
    events = _open_events(plan, watch, resumed) if processes.first else None
    try:
        spent = _optimize(trainer, watch, resumed)
    except KeyboardInterrupt:
        if checkpoints.latest() is not None:
            line.stop()
            console.print(f"stopped at step {trainer.state.global_step}; --resume goes on from the last checkpoint")
        raise
    finally:
        line.stop()
        if events is not None:
            events.close()
    processes.wait()  # for the best weights, which the first one wrote
    watch.load_best()
    after = measured()
    facts = facts_of(
        plan, examples.dataset, encoded, held, trainable, trainer, watch, spent, after, examples.skill_facts
    )
    if processes.first:
        _write(plan, trainable, tokenizer, facts)
        checkpoints.discard()
        for path in plan.curves:
            write_curves(watch.curves, f"{plan.out.name}: {plan.method}, recipe {plan.recipe.name}", path)
        told, count = facts.metrics, len(held.examples) if held else 0
        console.print(
            f"done in {time.monotonic() - started:.0f} s: loss on {count} held-out examples "
            f"{shown(told['validation_loss_before'])} → {shown(after)}, {told['tokens_per_second']} tokens/s, "
            f"{100 * trainer.padding_share:.1f} % padding → {plan.out}",
            highlight=False,
            soft_wrap=True,
        )
    return Outcome(plan.out, facts, processes.first, tuple(trainer.losses), watch.curves)


def _check(plan: Plan) -> None:
    """Refuse what cannot end well before anything is read or loaded."""
    output.check_free(plan.out)
    output.check_outside(plan.out, (*plan.curves, *([plan.tensorboard] if plan.tensorboard else [])))
    check_curves(plan.curves)
    if plan.early_stop and not plan.recipe.hold_out:
        raise RecipeInvalid("early stop looks at the loss on held-out examples: hold out must be above 0")
    if plan.recipe.init == "qera" and (plan.method != "qlora" or plan.recipe.variant == "dora"):
        raise MethodUnsupported("init qera is for plain and rslora adapters on an NF4 base: use method qlora")


@dataclass(frozen=True)
class _Examples:
    """What is trained on and what is held out."""

    dataset: Dataset
    training: Sequence[Example]
    held: Sequence[Example]
    skills: Dataset | None  # the file that some of `training` come from
    skill_facts: dict[str, Any] | None

    @classmethod
    def of(cls, plan: Plan) -> _Examples:
        """Read the plan's files and hold out, first of all, before anything looks at the examples."""
        dataset = read_jsonl(plan.data)
        training, held = hold_out(dataset.examples, plan.recipe.hold_out, plan.recipe.seed)
        if plan.skills is None:
            return cls(dataset, training, held, None, None)
        mixed_in, own = read_jsonl(plan.skills.file), len(training)
        training = skills.mix_in(training, mixed_in.examples, plan.skills.share, plan.recipe.seed, held)
        told = {
            "file": plan.skills.file.name,
            "digest": mixed_in.digest,
            "share": plan.skills.share,
            "examples": len(training) - own,
        }
        return cls(dataset, training, held, mixed_in, told)


def _encode(plan: Plan, examples: _Examples, tokenizer: Any) -> tuple[EncodedSet, EncodedSet | None]:
    """The examples to train on, and those held out, if any."""
    template = training_template(tokenizer)
    if template is not None:
        check_rendering(tokenizer, template, examples.dataset.examples[:_RENDERING_SAMPLES])
    stops = stop_ids(plan.base_directory, tokenizer)
    encoded = encode_all(tokenizer, template, examples.training, stops, plan.recipe.max_length)
    held = _encode_held(tokenizer, template, examples.held, stops, plan.recipe) if examples.held else None
    return encoded, held


def _optimize(trainer: LabelTrainer, watch: Watch, resumed: Path | None) -> Spent:
    """The optimizer's loop, from where `resumed` left it."""
    if resumed is None:
        watch.begin()
    else:
        watch.restore(resumed)
    started, cpu = time.monotonic(), time.process_time()
    if not watch.stopped:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    return Spent(time.monotonic() - started, time.process_time() - cpu)


def _write(plan: Plan, trainable: Trainable, tokenizer: Any, facts: Facts) -> None:
    if plan.method == "full":
        save = output.save_model(trainable.model, tokenizer, plan.base.name or "", facts)
    else:
        save = output.save_adapter(trainable.model, plan.base.name or "", facts)
    output.write_directory(plan.out, save)


def _begin_with_qera(plan: Plan, trainable: Trainable, examples: Sequence[Encoded], console: Console) -> None:
    error = give_back(trainable.model, plan.base_directory, examples, plan.recipe.seed)
    console.print(
        f"init qera: of what NF4 changed in the outputs of the adapted matrices, {error:.0%} is left",
        highlight=False,
        soft_wrap=True,
    )


def _encode_held(
    tokenizer: Any, template: str | None, held: Sequence[Example], stops: frozenset[int], recipe: Recipe
) -> EncodedSet:
    try:
        return encode_all(tokenizer, template, held, stops, recipe.max_length)
    except DataTooSmall as error:
        raise DataTooSmall(
            f"there would be no validation loss, for none of the {len(held)} examples held out has {recipe.max_length} "
            "tokens or fewer: raise --max-length or --hold-out, or hold out 0"
        ) from error


def _identity(plan: Plan, examples: _Examples, processes: Processes) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's."""
    mixed_in = examples.skills
    return {
        "data": examples.dataset.digest,
        "base": plan.base.fingerprint or plan.base.name,
        "method": plan.method,
        "recipe": plan.recipe.as_dict(),
        "max_steps": plan.max_steps,
        "validation_steps": plan.validation_steps,
        "early_stop": plan.early_stop,
        "processes": processes.count if processes.count > 1 else None,
        "skills": None if plan.skills is None or mixed_in is None else [mixed_in.digest, plan.skills.share],
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
    callbacks: list[Any],
    processes: Processes,
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
        optim=optimizer_of(plan.method, processes.device),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,  # below 1 it is a fraction of all steps
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        bf16=trainable.autocast,
        use_cpu=processes.device == "cpu",
        ddp_backend="gloo" if processes.count > 1 and processes.device == "cpu" else None,
        ddp_find_unused_parameters=False,
        save_strategy="steps",
        save_steps=plan.checkpoint_steps,
        save_total_limit=2,
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=processes.device != "cpu",
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    config._n_gpu = min(config.n_gpu, 1)  # several in one process would be DataParallel, whose forward is not ours
    rows = Rows.from_list([example.as_row() for example in encoded.examples])
    trainer = LabelTrainer(
        model=trainable.model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=callbacks,
        processes=processes,
    )
    trainer.remove_callback(PrinterCallback)
    float32_adapters(trainer.model)
    return trainer


def optimizer_of(method: Method, device: str) -> str:
    """transformers' name of the optimizer that trains by `method` on `device`: AdamW with float32 moments.

    QLoRA's on a GPU are paged, as its authors have it (Dettmers et al. 2023, arXiv:2305.14314, section 3): they move to
    the host's memory while a long batch needs the device's.
    """
    return "paged_adamw_32bit" if method == "qlora" and device != "cpu" else "adamw_torch_fused"


def _open_events(plan: Plan, watch: Watch, resumed: Path | None) -> Any:
    """The TensorBoard writer that listens to `watch`, where one is asked for."""
    if plan.tensorboard is None:
        return None
    listener, writer = event_log(plan.tensorboard, int(resumed.name.rpartition("-")[2]) if resumed else None)
    watch.listeners.append(listener)
    return writer
