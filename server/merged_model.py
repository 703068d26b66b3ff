"""A merged model on disk: written aside, proven equivalent, and only then given its name."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hub.errors import TargetNotEmpty
from server.equivalence import EXACT, PROMPTS, SAVED, Equivalence, Limits, compare, load_float32, unmerged_answers
from server.errors import InvalidRequest, MergeNotEquivalent
from server.merge import MergePart, merge_into

REPORT_FILE = "merge-report.json"


@dataclass(frozen=True)
class MergePlan:
    """What to merge, and where to."""

    base: Path  # transformers directory
    base_name: str
    base_fingerprint: str | None
    parts: tuple[MergePart, ...]  # at least one
    out: Path  # must not hold anything yet
    dtype: str = "float32"  # "float32" or "bfloat16": of the saved weights
    prompts: tuple[str, ...] = PROMPTS

    def __post_init__(self) -> None:
        if not self.parts or not self.prompts:
            raise InvalidRequest("a merge needs at least one adapter and one prompt to prove it by")
        for part in self.parts:
            if not math.isfinite(part.weight):
                raise InvalidRequest(f"the weight of {part.name} is {part.weight}; it must be a finite number")


@dataclass(frozen=True)
class MergedModel:
    """A proven merge."""

    directory: Path
    modules: int  # changed by the adapters
    exact: Equivalence  # of the sum in float32, before it was rounded to the wanted dtype
    saved: Equivalence  # of what lies in `directory`, read back


# Told of every stage: its name, how much of it is done, how much there is (0: unknown).
Progress = Callable[[str, int, int], None]


def write_merged(plan: MergePlan, progress: Progress = lambda stage, done, total: None) -> MergedModel:
    """Carry out `plan`; at the end `plan.out` is a transformers directory with its tokenizer and `merge-report.json`.

    Nothing is written under `plan.out` until the equivalence holds, of the sum and of what was saved. Raises
    `TargetNotEmpty`, what `merge_into` raises, and `MergeNotEquivalent`: then the model and its report lie beside, in
    `<out>.rejected`.
    """
    refuse_taken(plan.out)

    def stage(name: str) -> Callable[[int], None]:
        progress(name, 0, len(plan.prompts))
        return lambda done: progress(name, done, len(plan.prompts))

    expected = unmerged_answers(plan.base, plan.parts, plan.prompts, stage("ask PEFT, unmerged"))
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{plan.out.name}.", dir=plan.out.parent))
    try:
        model = load_float32(plan.base)
        modules = merge_into(model, plan.parts)
        exact = compare(model, expected, stage("ask the merged model"))
        _save(model, plan, partial)
        del model
        saved = compare(load_float32(partial), expected, stage("ask the saved model"))
        failures = exact.failures(EXACT) + [f"as saved, {failure}" for failure in saved.failures(SAVED[plan.dtype])]
        merged = MergedModel(plan.out, modules, exact, saved)
        report = json.dumps(_report(plan, merged, failures), indent=2)
        (partial / REPORT_FILE).write_text(report + "\n", encoding="utf-8")
        _make_durable(partial)
        if failures:
            rejected = plan.out.with_name(plan.out.name + ".rejected")
            shutil.rmtree(rejected, ignore_errors=True)
            partial.rename(rejected)
            raise MergeNotEquivalent(f"{'; '.join(failures)}. The rejected model and its report are in {rejected}")
        refuse_taken(plan.out)
        partial.rename(plan.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return merged


def refuse_taken(out: Path) -> None:
    """Raise `TargetNotEmpty` unless `out` is free: nothing there, or an empty directory."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise TargetNotEmpty(f"{out} already exists; name a new directory")


def _save(model: Any, plan: MergePlan, directory: Path) -> None:
    from transformers import AutoTokenizer

    model.to(getattr(torch, plan.dtype))
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(plan.base).save_pretrained(directory)


def _report(plan: MergePlan, merged: MergedModel, failures: list[str]) -> dict[str, Any]:
    return {
        "equivalent": not failures,
        "failures": failures,
        "base": {"name": plan.base_name, "fingerprint": plan.base_fingerprint},
        "adapters": [{"version": part.name, "digest": part.digest, "weight": part.weight} for part in plan.parts],
        "dtype": plan.dtype,
        "modules_changed": merged.modules,
        "exact": _figures(merged.exact, EXACT),
        "saved": _figures(merged.saved, SAVED[plan.dtype]),
        "reference": f"peft {version('peft')}, adapters unmerged, float32",
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _figures(equivalence: Equivalence, limits: Limits) -> dict[str, Any]:
    figures = {**dataclasses.asdict(equivalence), "greedy_agreement": equivalence.greedy_agreement}
    # JSON has no NaN.
    shown = {name: value if math.isfinite(value) else str(value) for name, value in figures.items()}
    return {**shown, "limits": dataclasses.asdict(limits)}


def _make_durable(directory: Path) -> None:
    """On disk and readable by all; `mkdtemp` and safetensors write for the owner only."""
    for file in directory.iterdir():
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    directory.chmod(0o755)
