"""How the hub's verbs write: JSON for programs, text and tables for people, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, Literal

import click

from hub.base_identity import BaseIdentity
from hub.progress import Progress
from hub.versions import AliasState, Held, Lease, Version

_NO_END: Final = 1_000_000  # columns


def print_json(value: Any) -> None:
    """`value` as indented JSON on stdout, in ASCII: what strangers wrote cannot steer a terminal."""
    click.echo(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: a row a line where that is no terminal, else cells folded, never cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.file.isatty():
        console = Console(highlight=False, width=_NO_END)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Name and value, one pair a line, aligned; pairs without a value are left out."""
    shown = {name: value for name, value in pairs.items() if value}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        click.echo(printable(f"  {name.ljust(width)}  {value}"))


@contextmanager
def progress_bar(unit: Literal["bytes", "items"] = "bytes") -> Iterator[Progress]:
    """A callback that draws one bar a task on stderr while inside; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def version_json(version: Version, aliases: Sequence[str] = ()) -> dict[str, Any]:
    """One version for `--json`."""
    return {
        "version": version.text,
        "name": version.full_name,
        "number": version.number,
        "digest": version.digest,
        "created": version.created,
        "aliases": list(aliases),
        "manifest": version.manifest.to_json(),
    }


def lora_text(version: Version) -> str:
    """What the weights are, in one line: "rank 8, alpha 16, 12 modules (q_proj, v_proj), 460,800 parameters"."""
    if (model := version.manifest.model) is not None:
        return f"whole model, {model.architecture}, {model.parameters:,} parameters, {', '.join(model.dtypes)}"
    lora = version.manifest.lora
    features = f", {', '.join(lora.features)}" if lora.features else ""
    targets = ", ".join(lora.targets[:8]) + (", …" if len(lora.targets) > 8 else "")
    modules = f"{lora.modules} module{'' if lora.modules == 1 else 's'}"
    return (
        f"rank {rank_text(version)}, alpha {lora.alpha:g}, {modules} ({targets}), "
        f"{lora.parameters:,} parameters{features}"
    )


def rank_text(version: Version) -> str:
    """The rank, or the span of ranks: "8", "4-64"."""
    if version.manifest.kind == "model":
        return "model"
    ranks = sorted(map(int, version.manifest.lora.ranks))
    if not ranks:
        return "-"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def base_text(base: BaseIdentity) -> str:
    """The base and how well it is known: "smollm2-135m (sha256:1234567890ab, trained in nf4)"."""
    name = f"{base.name or 'unknown'}{f'@{base.revision}' if base.revision else ''}"
    known = base.fingerprint[:19] if base.fingerprint else "unverified"
    return f"{name} ({known}{f', trained in {base.quantization}' if base.quantization else ''})"


def held_text(held: Held) -> str:
    """What an alias holds: "@3", or of several "@3 90 %, @4 10 %"."""
    total = sum(weight for _, weight in held)
    if len(held) == 1:
        return f"@{held[0][0]}"
    return ", ".join(f"@{number} {100 * weight / total:.3g} %" for number, weight in held)


def share_text(state: AliasState, number: int) -> str:
    """A version's share of an alias: "" where it is all of it, else " (10 %)"."""
    total = sum(target.weight for target in state.targets)
    share = sum(target.weight for target in state.targets if target.version == number) / total
    return "" if share == 1 else f" ({100 * share:.3g} %)"


def holder_text(lease: Lease) -> str:
    """Who keeps a version from being removed: "anna", or for a time "anna until 2026-12-01 09:00:00"."""
    return lease.holder if lease.expires is None else f"{lease.holder} until {time_text(utc(lease.expires))}"


def utc(seconds: float) -> str:
    """Unix time in RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def time_text(time: str) -> str:
    """A time in RFC 3339, UTC, for people: "2026-12-01 09:00:00"."""
    return time.replace("T", " ").removesuffix("Z")


def size_text(count: int) -> str:
    """A number of bytes for people: "1.9 MB"."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def printable(text: str) -> str:
    """`text` with control and direction characters escaped: facts are written by strangers."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def parameter_count(version: Version) -> int:
    """How many numbers the weights hold."""
    model = version.manifest.model
    return version.manifest.lora.parameters if model is None else model.parameters
