"""Writes the pages that are made from the code; with --check, fails where a committed page is not what it would write.

docs/cli.md from the verbs' own help, docs/metrics.md from the server's registry, docs/files.md and the folder table in
CONTRIBUTING.md from the docstrings in the tree.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MADE = "<!-- made by docs/generate.py: `make docs` -->"
PACKAGES = ("hub", "server", "training", "protos", "benchmarks", "deploy", "docs")
BEGIN, END = "<!-- folders: begin, made by docs/generate.py -->", "<!-- folders: end -->"


def pages() -> dict[Path, str]:
    """Every page and what it should hold."""
    contributing = ROOT / "CONTRIBUTING.md"
    return {
        ROOT / "docs" / "cli.md": cli_page(),
        ROOT / "docs" / "metrics.md": metrics_page(),
        ROOT / "docs" / "files.md": files_page(),
        contributing: with_folders(contributing.read_text(encoding="utf-8")),
    }


def cli_page() -> str:
    """The help of every verb, as `hub VERB --help` prints it at 100 columns."""
    import click

    from hub.cli import group

    def helps(command: click.Command, parent: click.Context | None, name: str) -> Iterator[str]:
        context = click.Context(command, parent, info_name=name, terminal_width=100, max_content_width=100)
        yield f"## {context.command_path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
        if isinstance(command, click.Group):
            for child in command.list_commands(context):
                found = command.get_command(context, child)
                assert found is not None, f"{context.command_path} lists {child} but cannot load it"
                yield from helps(found, context, child)

    intro = "# The `hub` command\n\nExit codes: 0 done, 1 refused, 2 wrong usage. `--json` where a verb prints data.\n"
    return "\n".join([MADE, intro, *helps(group, None, "hub")])


def metrics_page() -> str:
    """Every series of a server that has served something and of a shared hub: its type, labels and meaning."""
    parts = [
        MADE,
        "# Metrics",
        "",
        "## A server's",
        "",
        "On `http://HOST:9400/metrics` (`hub serve --metrics-port`). The label `adapter` holds the most used adapters' "
        'names without versions, "base" for none and "other" for the rest, so its values are bounded. Histograms have '
        "the usual `_bucket`, `_sum` and `_count`. Alerts: [deploy/rules/loraplex.yml](../deploy/rules/loraplex.yml).",
        "",
        *_metrics_table(_used_metrics()),
        "",
        "## A shared hub's",
        "",
        "On `http://HOST:9401/metrics` with `hub registry --metrics-port 9401`.",
        "",
        *_metrics_table(_used_registry_metrics()),
    ]
    return "\n".join(parts) + "\n"


def _metrics_table(registry) -> Iterator[str]:  # type: ignore[no-untyped-def]
    yield "| metric | type | labels | meaning |"
    yield "|---|---|---|---|"
    for family in sorted(registry.collect(), key=lambda family: family.name):
        if not family.samples:
            raise SystemExit(f"{family.name} would have no labels in docs/metrics.md: use it where it is collected")
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        name = family.name + ("_total" if family.type == "counter" else "")
        shown = ", ".join(f"`{label}`" for label in labels)
        yield f"| `{name}` | {family.type} | {shown} | {family.documentation} |"


def _used_registry_metrics():  # type: ignore[no-untyped-def]
    """The shared hub's registry after one call."""
    from hub.registry.metrics import RegistryMetrics

    metrics = RegistryMetrics()
    metrics.done("Resolve", "OK", 0.1)
    metrics.moved("in", 1)
    return metrics.registry


def _used_metrics():  # type: ignore[no-untyped-def]
    """The registry after one request, so that every labelled series is there."""
    from server.engine.observer import EngineSnapshot
    from server.engine.request import AdapterUse, Finish, FinishReason, Request, Stopping, Timing, Usage
    from server.metrics import Metrics

    metrics = Metrics()
    metrics.attach(EngineSnapshot, lambda: {"host": 0, "device": 0})
    metrics.serving("smollm2-135m", "nf4", "0")
    adapter = AdapterUse("sha256:0", "team/sentiment@3")
    request = Request(id="r", prompt=(1,), stopping=Stopping(max_new_tokens=1), adapters=(adapter,))
    metrics.step(seconds=0.1, sequences=1, adapters=1, tokens=1)
    metrics.admitted(request, 0.1)
    metrics.first_token(request, 0.1)
    metrics.tokens(request, 1, 0.1)
    metrics.finished(request, Finish(FinishReason.LENGTH, Usage(1, 1), Timing(0.1, 0.1, 0.1)), None)
    metrics.adapter_loaded("host", 0.1)
    metrics.error("QUEUE_FULL")
    metrics.feedback("good")
    metrics.routed("tasks", "team/sentiment")
    return metrics.registry


def files_page() -> str:
    """Every source file with the first sentence of its docstring, by folder."""
    parts = [MADE, "# Every file", "", "Tests mirror the packages under tests/.", ""]
    for package in PACKAGES:
        for folder in _folders(ROOT / package):
            rows = [(file.name, sentence(file)) for file in _sources(folder) if file.name != "__init__.py"]
            if rows:
                parts += [f"## {folder.relative_to(ROOT)}/", "", "| file | what it is |", "|---|---|"]
                parts += [f"| `{name}` | {_cell(meaning)} |" for name, meaning in rows]
                parts.append("")
    return "\n".join(parts)


def with_folders(text: str) -> str:
    """CONTRIBUTING.md with its folder table made anew."""
    rows = ["| folder | what it holds |", "|---|---|"]
    for package in PACKAGES:
        for folder in _folders(ROOT / package):
            init = folder / "__init__.py"
            meaning = sentence(init) if init.exists() else ""
            if meaning:
                rows.append(f"| `{folder.relative_to(ROOT)}/` | {_cell(meaning)} |")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *rows, END + after])


def sentence(file: Path) -> str:
    """The first sentence of a Python file's docstring; empty when it has none."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.partition("\n\n")[0].split())
    return first.partition(". ")[0].rstrip(".")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _folders(package: Path) -> list[Path]:
    return [
        package,
        *sorted(path for path in package.rglob("*") if path.is_dir() and _sources(path) and path.name != "__pycache__"),
    ]


def _sources(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.py") if not file.stem.endswith(("_pb2", "_pb2_grpc")))


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check compare them; the exit code."""
    stale = {
        path: text for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if arguments == ["--check"]:
        if stale:
            print(f"stale: {names}: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
    print(f"written: {names}" if stale else "nothing to write")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
