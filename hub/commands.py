"""The verbs this package adds to the `hub` command.

Imports nothing but this light dataclass, so that `hub --help` stays quick: a verb's module is imported when it is run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One verb of the `hub` command.

    Packages list theirs as a tuple `COMMANDS` and name it in the entry point group "hub.commands".
    """

    name: str  # "push"
    target: str  # "package.module:attribute" of the click.Command
    summary: str  # one line for `hub --help`
    section: str  # heading in `hub --help`: "Versions", "Training", "Serving"


COMMANDS: tuple[Command, ...] = (
    Command("push", "hub.cli_push:push", "Store a LoRA directory as the next version of an adapter.", "Versions"),
    Command("pull", "hub.cli_pull:pull", "Write a version into a directory that PEFT loads.", "Versions"),
    Command("list", "hub.cli_show:list_versions", "List adapters and their newest versions.", "Versions"),
    Command("show", "hub.cli_show:show", "Everything about one version.", "Versions"),
    Command("tag", "hub.cli_tags:tag", "Point an alias at a version.", "Versions"),
    Command("untag", "hub.cli_tags:untag", "Remove an alias.", "Versions"),
    Command("log", "hub.cli_tags:log", "What happened to an adapter, or to the whole hub.", "Versions"),
    Command("verify", "hub.cli_verify:verify", "Read and check stored bytes.", "Versions"),
)
