"""`hub merge`: one dedicated model out of a base and adapters, with the proof that it answers as they do."""

from __future__ import annotations

import json
import tempfile
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from server.prompt_file import read_prompts

if TYPE_CHECKING:
    from hub.base import LocatedBase
    from hub.versions import Version
    from server.gguf_export.export import Parity
    from server.gguf_export.files import GgufType
    from server.merged_model import MergedModel, MergePlan, Progress


@click.command(
    epilog="""\b
Examples:
  hub merge team/sentiment:prod --out sentiment-model
  hub merge team/sentiment team/tone@2 --weight 1 --weight 0.5 --out mixed
  hub serve --base ./sentiment-model
  hub merge team/sentiment:prod --gguf sentiment.gguf                # for llama.cpp
"""
)
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The new directory: a transformers model with tokenizer and merge-report.json.",
)
@click.option("--gguf", type=click.Path(path_type=Path), help="The new file: the same model for llama.cpp.")
@click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16"]),
    default="f16",
    show_default=True,
    help="Of the matrices in the GGUF file.",
)
@click.option("--weight", "weights", multiple=True, type=float, help="Factor on each REF's delta, in order; default 1.")
@click.option("--base", help="Built-in name, directory or Hugging Face id; default: the base the adapter records.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the saved weights. The sum is always made and proven in float32.",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Held-out prompts for the proof, one a line; default: twelve of ours.",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads; default: all cores.")
@click.option("--hub", "hub_url", help="Where the adapters are; default: LORAPLEX_HUB or your own hub.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def merge(
    refs: tuple[str, ...],
    out: Path | None,
    gguf: Path | None,
    gguf_type: GgufType,
    weights: tuple[float, ...],
    base: str | None,
    dtype: str,
    prompts_file: Path | None,
    threads: int,
    hub_url: str | None,
    as_json: bool,
) -> None:
    """Merge adapters into a full-precision copy of their base and prove that it answers as they do.

    The proof: PEFT applies the adapters unmerged and answers held-out prompts; the merged model must give the same
    logits, within rounding. Where it does not, the command fails and OUT is not made. A GGUF file is read back and
    computed in plain torch, and must agree in the same way.
    """
    if out is None and gguf is None:
        raise click.UsageError("name what to write: --out DIRECTORY, --gguf FILE or both")
    if weights and len(weights) != len(refs):
        raise click.UsageError(f"{len(refs)} adapters and {len(weights)} weights: give one --weight for each, or none")
    prompts = read_prompts(prompts_file) if prompts_file else None

    from hub.opening import open_existing
    from server.cli import bound_openmp

    bound_openmp(threads)
    from server.gguf_export.files import refuse_taken_file
    from server.merged_model import refuse_taken

    if out is not None:
        refuse_taken(out)
    if gguf is not None:
        refuse_taken_file(gguf)
    with open_existing(hub_url) as hub, tempfile.TemporaryDirectory(prefix="loraplex-merge-") as scratch:
        versions = [hub.resolve(ref) for ref in refs]
        located = located_base(versions, base)
        directories = [Path(scratch) / str(index) for index in range(len(versions))]
        for version, directory in zip(versions, directories, strict=True):
            hub.pull(version.text, directory)

        quieten_libraries()
        from server.equivalence import PROMPTS
        from server.merge import MergePart
        from server.merged_model import MergePlan, write_merged
        from server.model.base import bound_threads

        bound_threads(threads)
        plan = MergePlan(
            base=located.directory,
            base_name=located.name,
            base_fingerprint=fingerprint_of(located, versions),
            parts=tuple(
                MergePart(version.text, directory, weight, str(version.digest))
                for version, directory, weight in zip(versions, directories, weights or [1.0] * len(refs), strict=True)
            ),
            out=out or Path(scratch) / "merged",
            dtype=dtype,
            prompts=prompts or PROMPTS,
        )
        with _Bars() as progress:
            merged = write_merged(plan, progress)
        report = json.loads((plan.out / "merge-report.json").read_text(encoding="utf-8"))
        parity = None
        if gguf is not None:
            from server.gguf_export.export import export_model

            title = " + ".join([plan.base_name, *(part.name for part in plan.parts)])
            parity = export_model(plan.out, gguf, gguf_type, title, plan.prompts)
    if as_json:
        if parity is not None:
            report["gguf"] = {"file": str(gguf), "type": gguf_type, **asdict(parity)}
        shown = {"directory": str(out.resolve())} if out is not None else {}
        click.echo(json.dumps({**shown, **report}, indent=2))
        return
    _show(plan, merged, out)
    if parity is not None:
        click.echo(f"{gguf}: {gguf_type}, {parity_text(parity)}")


def located_base(versions: list[Version], named: str | None) -> LocatedBase:
    """The base named, or the one the first version records; raises BaseNotFound or click.UsageError."""
    from hub.base import locate_base
    from hub.errors import BaseNotFound

    if named is not None:
        return locate_base(named)
    recorded = versions[0].manifest.base
    if recorded.name is None:
        raise click.UsageError(f"{versions[0].text} does not say which base it belongs to: name it with --base")
    full = f"{recorded.name}@{recorded.revision}" if recorded.revision else recorded.name
    try:
        return locate_base(full)
    except BaseNotFound as error:
        raise BaseNotFound(
            f"{versions[0].text} was made for the base {full!r}: say where it lies with --base"
        ) from error


def fingerprint_of(located: LocatedBase, versions: list[Version]) -> str:
    """The base's fingerprint; raises BaseMismatch where an adapter records another one, or needs the base in NF4."""
    from hub.base import fingerprint_directory
    from hub.facts import corrects_nf4
    from server.errors import BaseMismatch

    found = fingerprint_directory(located.directory).fingerprint
    for version in versions:
        recorded = version.manifest.base
        if corrects_nf4(version.manifest.recipe):
            raise BaseMismatch(
                f"{version.text} was trained with init qera: part of it undoes what NF4 did to the base, and would be "
                "wrong on the base in full precision; hub serve --quantize nf4 serves it"
            )
        if recorded.fingerprint is not None and recorded.fingerprint != found:
            raise BaseMismatch(
                f"{version.text} was made for {recorded.name} ({recorded.fingerprint[:19]}…), "
                f"{located.name} is another model ({found[:19]}…)"
            )
    return found


def quieten_libraries() -> None:
    """Keep transformers' and PEFT's bars and advice to trainers off the screen."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class _Bars(AbstractContextManager["Progress"]):
    """A bar for each stage, on stderr."""

    def __enter__(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=Console(stderr=True))
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(tasks[stage], completed=done)

        self._bars.start()
        return show

    def __exit__(self, *raised: object) -> None:
        self._bars.stop()


def parity_text(parity: Parity) -> str:
    """How far an exported file, read back, is from what it was made of."""
    return (
        f"read back: max |Δlogit| {parity.max_logit_delta:.2g}, mean KL {parity.mean_kl:.1g} nats, "
        f"{parity.agreement:.1%} equal choices over {parity.positions} positions"
    )


def _show(plan: MergePlan, merged: MergedModel, out: Path | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from server.equivalence import EXACT, SAVED

    terms = [part.name if part.weight == 1 else f"{part.weight:g} × {part.name}" for part in plan.parts]
    limits = SAVED[plan.dtype]
    exact, saved = merged.exact, merged.saved
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for heading in ("sum (float32)", "may be", f"saved ({plan.dtype})", "may be"):
        table.add_column(heading, justify="right")
    table.add_row(
        "max |Δlogit|",
        f"{exact.max_logit_delta:.2g}",
        f"≤ {EXACT.max_logit_delta:g}",
        f"{saved.max_logit_delta:.2g}",
        f"≤ {limits.max_logit_delta:g}",
    )
    table.add_row(
        "mean KL, nats", f"{exact.mean_kl:.1g}", f"≤ {EXACT.mean_kl:g}", f"{saved.mean_kl:.1g}", f"≤ {limits.mean_kl:g}"
    )
    table.add_row(
        "equal greedy tokens",
        f"{exact.greedy_agreement:.1%}",
        f"≥ {EXACT.greedy_agreement:.0%}",
        f"{saved.greedy_agreement:.1%}",
        f"≥ {limits.greedy_agreement:.0%}",
    )
    table.add_row(
        "equal answers",
        f"{exact.equal_prompts} of {exact.prompts}",
        "",
        f"{saved.equal_prompts} of {saved.prompts}",
        "",
    )
    console = Console(highlight=False)
    console.print(
        f"{plan.base_name} + {' + '.join(terms)}: {merged.modules} modules changed, compared with PEFT unmerged",
        soft_wrap=True,
    )
    console.print(table)
    console.print(
        f"{exact.prompts} prompts, logits at {exact.positions} positions, {exact.generated_tokens} greedy choices"
    )
    served = "" if out is None else f"; serve it with: hub serve --base {out}"
    console.print(f"[green]equivalent[/]{served}", soft_wrap=True)
