"""The verbs this package adds to the `hub` command."""

from __future__ import annotations

from hub.commands import Command

COMMANDS: tuple[Command, ...] = (
    Command("data", "training.cli_data:data", "Build a task's data sets from installed packages.", "Training"),
    Command("train", "training.cli_train:train", "Train an adapter (or a whole model) on chat JSONL.", "Training"),
    Command(
        "extract", "training.cli_extract:extract", "Turn a full fine-tune into a LoRA, with its error.", "Training"
    ),
    Command(
        "sweep", "training.cli_sweep:sweep", "Run a grid of recipes, tasks and seeds; tables and plots.", "Training"
    ),
    Command("recipes", "training.cli_recipes:recipes", "The named recipes of training, side by side.", "Training"),
    Command("advise", "training.cli_advise:advise", "Memory, time and cost of each method, with reasons.", "Training"),
    Command("eval", "training.cli_eval:evaluate", "Score the base and adapters on a task, side by side.", "Training"),
    Command(
        "continual", "training.cli_continual:continual", "Task after task on one base, forgetting measured.", "Training"
    ),
    Command("demo", "training.demo.cli:demo", "See it all once: data, adapters, hub, server, merge.", "Training"),
)

# What runs the evaluation that a promotion's gate names, see `hub.gate_evaluation`.
EVALUATOR = "training.gate_evaluator:measure"
