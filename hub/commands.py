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
    section: str  # heading in `hub --help`: "Versions", "Sharing", "Training", "Serving"


COMMANDS: tuple[Command, ...] = (
    Command("push", "hub.cli_push:push", "Store a LoRA directory as the next version of an adapter.", "Versions"),
    Command("pull", "hub.cli_pull:pull", "Write a version into a directory that PEFT loads.", "Versions"),
    Command("list", "hub.cli_list:list_versions", "List adapters and their newest versions.", "Versions"),
    Command("search", "hub.cli_list:search", "Find versions by base, alias and metrics.", "Versions"),
    Command("show", "hub.cli_show:show", "Everything about one version.", "Versions"),
    Command("diff", "hub.cli_diff:diff", "How two versions differ, down to the tensors.", "Versions"),
    Command("tag", "hub.cli_tags:tag", "Point an alias at a version, or split it over several.", "Versions"),
    Command("untag", "hub.cli_tags:untag", "Remove an alias.", "Versions"),
    Command("promote", "hub.cli_promote:promote", "Point an alias at a version that passes a gate.", "Versions"),
    Command("rollback", "hub.cli_tags:rollback", "Give an alias back what it held before.", "Versions"),
    Command("log", "hub.cli_log:log", "Who did what, to an adapter or the whole hub.", "Versions"),
    Command("watch", "hub.cli_log:watch", "Print events as they happen.", "Versions"),
    Command("rm", "hub.cli_remove:rm", "Remove a version; it can be restored for a while.", "Versions"),
    Command("restore", "hub.cli_remove:restore", "Bring a removed version back.", "Versions"),
    Command("pin", "hub.cli_remove:pin", "Keep a version from being removed.", "Versions"),
    Command("unpin", "hub.cli_remove:unpin", "Take a pin back.", "Versions"),
    Command("gc", "hub.cli_remove:gc", "Give back the space of what nothing needs.", "Versions"),
    Command("sign", "hub.cli_keys:sign", "Sign a version.", "Versions"),
    Command("signatures", "hub.cli_keys:signatures", "Who signed a version.", "Versions"),
    Command("key", "hub.cli_keys:key", "Make and show keys that sign versions.", "Versions"),
    Command("verify", "hub.cli_verify:verify", "Read and check stored bytes.", "Versions"),
    Command("fsck", "hub.cli_verify:fsck", "Check, or rebuild, the catalog.", "Versions"),
    Command("import", "hub.cli_import:import_", "Take in versions from a file or from Hugging Face.", "Sharing"),
    Command("registry", "hub.cli_registry:registry", "Run a shared server over a hub.", "Sharing"),
    Command("login", "hub.cli_login:login", "Keep a token for a shared hub.", "Sharing"),
    Command("whoami", "hub.cli_login:whoami", "Who you are to a shared hub.", "Sharing"),
    Command("token", "hub.cli_login:token", "Make, list and revoke tokens.", "Sharing"),
)
