"""What a run leaves behind: a standard PEFT directory with a model card and the facts, or a whole model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hub import staging
from hub.facts import Facts
from training.errors import OutputExists, OutputUnwritable


def check_free(out: Path) -> None:
    """Raise `OutputExists` when `out` holds something that a run would overwrite."""
    if out.exists() and (not out.is_dir() or staging.held(out.resolve())):
        raise OutputExists(f"{out} is there already; choose another --out or remove it")


def check_outside(out: Path, others: Iterable[Path]) -> None:
    """Raise `OutputExists` when one of `others` would be written into `out`, which appears when the run is done."""
    whole = out.resolve()
    for other in others:
        if whole in (other.resolve(), *other.resolve().parents):
            raise OutputExists(f"{other} lies in {out}, which the run makes at its end: write it elsewhere")


def check_writable(path: Path) -> None:
    """Raise `OutputUnwritable` now rather than after the work, where the file cannot be written.

    A file that is not there yet is not there afterwards either.
    """
    new = not os.path.lexists(path)
    try:
        path.open("ab").close()
    except OSError as error:
        raise OutputUnwritable(f"cannot write {path}: {error.strerror}") from error
    if new:
        path.unlink(missing_ok=True)  # of several processes another may have looked too


def check_makeable(path: Path) -> None:
    """As `check_writable`, for a file whose directory is made with it where it is not there."""
    place = path.absolute().parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise OutputUnwritable(f"cannot write {path}: {place} is no directory")
    if place == path.absolute().parent:
        check_writable(path)
    elif not os.access(place, os.W_OK | os.X_OK):
        raise OutputUnwritable(f"cannot write {path}: no directory can be made in {place}")


def write_directory(out: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill the directory `out`, which is whole or absent; see `hub.staging.write_directory`.

    A link stays one: what it leads to is written.
    """

    def write(partial: Path) -> None:
        save(partial)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors makes its files private
        partial.chmod(0o755)

    staging.write_directory(out.resolve(), write)


def beside(out: Path, suffix: str) -> Path:
    """The path of `out` with `suffix` to its name; the names of `.` and `..` are those of what they are."""
    named = out.resolve() if out.name in ("", "..") else out
    return named.with_name(named.name + suffix)


def save_adapter(model: Any, base: str, facts: Facts) -> Callable[[Path], None]:
    """Fill a directory with exactly adapter_config.json, adapter_model.safetensors, README.md and loraplex.json."""

    def save(directory: Path) -> None:
        for config in model.peft_config.values():
            config.base_model_name_or_path = base
            config.inference_mode = True
        model.save_pretrained(str(directory), safe_serialization=True)
        (directory / "README.md").write_text(model_card(base, facts), "utf-8")
        facts.write(directory)

    return save


def save_model(model: Any, tokenizer: Any, base: str, facts: Facts) -> Callable[[Path], None]:
    """Fill a directory with the whole model and its tokenizer, as transformers reads them."""

    def save(directory: Path) -> None:
        model.save_pretrained(str(directory), safe_serialization=True)
        tokenizer.save_pretrained(str(directory))
        (directory / "README.md").write_text(model_card(base, facts), "utf-8")
        facts.write(directory)

    return save


def model_card(base: str, facts: Facts) -> str:
    """A short README: what was trained on what, and how well it fits data it has not seen."""
    recipe, metrics = facts.recipe, facts.metrics
    datasets = facts.datasets if isinstance(facts.datasets, dict) else {}
    method = recipe.get("method", "lora")
    lines = [
        "---",
        "library_name: " + ("transformers" if method == "full" else "peft"),
        f"base_model: {base}",
        "tags: [" + ("full" if method == "full" else "lora") + ", loraplex]",
        "---",
        "",
        f"# {'Fine-tune' if method == 'full' else 'Adapter'} of {base}",
        "",
        f"Trained with Loraplex, recipe `{recipe.get('name')}`, method {method}"
        + ("" if method == "full" else f", rank {recipe.get('rank')}, alpha {recipe.get('alpha')}")
        + f", learning rate {recipe.get('learning_rate'):g}, {metrics.get('steps')} steps.",
        "",
        "| | |",
        "|---|---|",
        f"| training examples | {datasets.get('train_examples')} |",
        f"| data | `{datasets.get('digest')}` |",
        f"| validation loss before → after | {_number(metrics.get('validation_loss_before'))} → "
        f"{_number(metrics.get('validation_loss'))} ({datasets.get('validation_examples')} held-out examples) |",
        f"| tokens a second | {metrics.get('tokens_per_second')} on {metrics.get('device')} |",
    ]
    if datasets.get("task"):
        lines += ["", f"Task: {datasets['task']}. Data: {datasets.get('provenance')} ({datasets.get('licence')})."]
    return "\n".join([*lines, ""])


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "–"
