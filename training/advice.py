"""The articles' decision framework, applied to one case: reasons first, each with who says it, then what follows.

Where the articles contradict each other both voices are quoted; a rule that does not apply says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.planner import Data, Option

GOALS = ("format", "style", "classification", "knowledge", "reasoning", "latency", "cost")


@dataclass(frozen=True)
class Reason:
    """One consideration."""

    text: str
    source: str  # "article 003", "this case"
    speaks_for: str  # "prompts", "qlora", "lora", "full" or "" for a caution


@dataclass(frozen=True)
class Verdict:
    """What to do, and why."""

    choice: Option | None  # None: nothing fits
    first: str  # the sentence a person reads first
    reasons: tuple[Reason, ...]


def advise(data: Data, options: Sequence[Option], goal: str | None, critical: bool) -> Verdict:
    """Weigh the options for `goal` (one of `GOALS` or unknown); `critical`: a wrong answer costs much."""
    reasons = [*_about_data(data), *_about_goal(goal, critical), *_about_memory(options)]
    for method in _order(goal, critical):
        for option in options:  # without checkpointing first
            if option.method == method and option.fits:
                return Verdict(option, _sentence(option, data), tuple(reasons))
    return Verdict(
        None, "Nothing fits: take a smaller base, shorter rows, a smaller batch or more memory.", tuple(reasons)
    )


def _order(goal: str | None, critical: bool) -> tuple[str, ...]:
    """The methods, the one to take first if it fits."""
    if critical or goal in ("knowledge", "reasoning"):
        return "full", "lora", "qlora"
    return ("qlora", "lora") if goal in ("latency", "cost") else ("lora", "qlora")


def _about_data(data: Data) -> list[Reason]:
    found = []
    if data.examples < 1000:
        found.append(
            Reason(
                f"{data.examples} examples: below 1,000, try prompts (and retrieval) first",
                "articles 000, 003",
                "prompts",
            )
        )
        found.append(
            Reason(
                "1,000 curated examples can beat 50,000 noisy ones, so few need not be too few", "article 002", "lora"
            )
        )
    elif data.examples > 100_000:
        found.append(Reason("more than 100,000 examples are what full fine-tuning is for", "article 003", "full"))
    else:
        found.append(
            Reason(
                f"{data.examples:,} examples: LoRA of rank 32 to 64 reaches 95 to 98 % of full", "article 000", "lora"
            )
        )
    return found


def _about_goal(goal: str | None, critical: bool) -> list[Reason]:
    found = []
    if goal in ("format", "style", "classification"):
        found.append(Reason(f"{goal} is what LoRA suits", "article 002", "lora"))
    if goal == "knowledge":
        found.append(Reason("new knowledge asks for full fine-tuning", "article 001", "full"))
    if goal == "reasoning":
        found.append(Reason("LoRA lags on mathematical reasoning", "article 002", "full"))
        found.append(Reason("full gained 2 to 3 % on reasoning with 70B, at ten times the cost", "article 001", "full"))
    if goal in ("latency", "cost"):
        text = f"for {goal}: QLoRA of a base of 7 to 13 billion parameters, in place of a larger one that is prompted"
        found.append(Reason(text, "article 003", "qlora"))
    if critical:
        found.append(Reason("full for critical tasks; LoRA keeps 95 to 98 % of its quality", "article 000", "full"))
    return found


def _about_memory(options: Sequence[Option]) -> list[Reason]:
    fits = {option.method for option in options if option.fits}
    plainly = {option.method for option in options if option.fits and not option.checkpointing}
    found = []
    for method in ("full", "lora", "qlora"):
        if method not in fits:
            found.append(Reason(f"{method} does not fit in the memory given", "this case", ""))
        elif method not in plainly:
            found.append(Reason(f"{method} fits only with gradient checkpointing", "this case", ""))
    if "qlora" in fits and "lora" in fits:
        text = "QLoRA to experiment, LoRA of rank 32 to 64 for production"
        found.append(Reason(text, "article 000", "lora"))
    if "lora" in fits:
        found.append(
            Reason(
                "QLoRA takes a third less memory and 39 % more time: where LoRA fits it buys nothing",
                "article 002",
                "lora",
            )
        )
        found.append(
            Reason("against that: start with QLoRA, LoRA only where quantization is unstable", "article 001", "qlora")
        )
    return found


def _sentence(option: Option, data: Data) -> str:
    checkpointed = " with gradient checkpointing" if option.checkpointing else ""
    first = "Try prompts first; then " if data.examples < 1000 else ""
    return f"{first}{option.method}{checkpointed}: {option.memory / 1e9:.1f} GB at the peak."
