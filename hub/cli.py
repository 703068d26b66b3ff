"""The `hub` command: a group of verbs that several packages declare and that are imported only when run."""

from __future__ import annotations

import errno
import os
import re
import sys
from functools import cache, cached_property
from importlib import import_module

import click

from hub.commands import Command
from hub.entry_points import entry_points, load
from hub.unwinding import unwinding

_SECTIONS = ("Versions", "Sharing", "Training", "Serving")
# What a machine says no with, whoever asks; any other OSError is a fault of ours.
_REFUSALS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE,
     errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP}
)  # fmt: skip
_OS_ERROR = re.compile(r"\(os error ([0-9]{1,6})\)")


class VerbGroup(click.Group):
    """Lists verbs by section from their one-line tables; loads a verb's module when the verb is used."""

    @cached_property
    def _table(self) -> dict[str, Command]:
        return {command.name: command for table in _tables().values() for command in table}

    def _warn_of_missing(self) -> None:
        """One package that cannot be imported must not take the others' verbs away, but is not passed over."""
        for name, table in _tables().items():
            if not table:
                click.echo(f"warning: the verbs of the package {name!r} cannot be loaded here", err=True)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all verbs."""
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb of this name, imported now."""
        command = self._table.get(cmd_name)
        if command is None:
            return None
        module, _, attribute = command.target.partition(":")
        loaded = getattr(import_module(module), attribute)
        assert isinstance(loaded, click.Command)
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs, one section after the other."""
        self._warn_of_missing()
        by_section: dict[str, list[tuple[str, str]]] = {section: [] for section in _SECTIONS}
        for command in self._table.values():
            by_section.setdefault(command.section, []).append((command.name, command.summary))
        width = max((len(name) for name in self._table), default=0)
        for section, rows in by_section.items():
            if rows:
                with formatter.section(section):
                    formatter.write_dl([(name.ljust(width), summary) for name, summary in rows])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; an unknown one is answered with the nearest names."""
        name = args[0] if args else ""
        if name and name not in self._table and not name.startswith("-"):
            from difflib import get_close_matches

            self._warn_of_missing()
            near = get_close_matches(name, self._table, n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else " `hub --help` lists the verbs."
            ctx.fail(f"There is no verb {name!r}.{hint}")
        return super().resolve_command(ctx, args)


@cache
def _tables() -> dict[str, tuple[Command, ...]]:
    """Every package's verbs, the hub's own first; empty for a package that cannot be imported."""
    tables: dict[str, tuple[Command, ...]] = {}
    for name, target in sorted(entry_points("hub.commands").items(), key=lambda entry: entry[0] != "hub"):
        try:
            tables[name] = load(target)
        except (ImportError, AttributeError):
            tables[name] = ()
    return tables


@click.group(
    cls=VerbGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="A reference is [namespace/]name, then @3 (a version), @sha256:… (a digest) or :alias; bare means :latest. "
    "The hub is LORAPLEX_HUB or, by default, a directory of yours; every verb takes --hub. `hub VERB --help` has "
    "examples.",
)
@click.version_option(package_name="loraplex", message="loraplex %(version)s")
def group() -> None:
    """Train LoRA adapters, keep them as versions, serve them over one base model."""


def main() -> None:
    """Run the command line; exits 0 when done, 1 when refused, 2 on wrong usage, 128+n on the signal n."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core would add lines of C++ to what we say of a connection
    with unwinding():
        _run()


def _run() -> None:
    try:
        status = group.main(standalone_mode=False)
        print(end="", flush=True)  # what stdout refuses is said here, not at exit
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        _discard_output()  # its reader (`| head`) left
        sys.exit(0)
    except Exception as error:
        code = _errno(error)
        if code in _REFUSALS:
            _discard_output()
            from hub.cli_output import printable

            file = error.filename if isinstance(error, OSError) else None
            named = f" {printable(os.fsdecode(file))}" if isinstance(file, str | bytes | os.PathLike) else ""
            click.echo(f"error: this machine refused{named}: {os.strerror(code)} (SYSTEM_REFUSED)", err=True)
            sys.exit(1)
        reason = None if isinstance(error, OSError) else getattr(error, "reason", None)
        if not isinstance(reason, str) or not reason.isupper():
            raise  # a fault of ours: the trace is what helps
        click.echo(f"error: {error} ({reason})", err=True)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


def _errno(error: Exception) -> int:
    """The system's number of an error, 0 for none; safetensors has it in its message alone."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = _OS_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(told[1]) if told else 0


def _discard_output() -> None:
    """What stdout does not take must not raise again at exit."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
