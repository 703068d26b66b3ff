"""A full fine-tune turned into an adapter, for `hub train --extract-rank` and `hub extract`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hub.base_identity import BaseIdentity
from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json
from server.cli import bound_openmp

if TYPE_CHECKING:
    from training.extract import Extraction

_WORST = 5  # layers shown


@click.command(
    epilog=examples(
        """
hub extract out/full --rank 16 --out out/full-r16
hub extract team/support@2 --base smollm2-135m --rank 64 --out out/support-r64
"""
    )
)
@click.argument("model", metavar="DIR|REF")
@click.option("--base", default="smollm2-135m", show_default=True, metavar="NAME|DIR|REF|ORG/NAME[@REV]")
@click.option("--rank", type=click.IntRange(min=1, max=4096), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write; must not exist.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads.  [default: all cores]")
@hub_option
@json_option
def extract(model: str, base: str, rank: int, out: Path, threads: int, hub_url: str | None, as_json: bool) -> None:
    """Turn what MODEL, a full fine-tune of --base, changed into a LoRA, by SVD; OUT becomes a PEFT directory.

    MODEL is a directory or a whole model in the hub. Printed is the part of the change that the rank leaves out, by
    layer and over all, embedding and norms included: these get no LoRA.
    """
    bound_openmp(threads)
    from hub.base import base_identity, locate_base
    from hub.model_base import find_base

    found = find_base(base, hub_url)
    identity, _ = base_identity(found)
    made = write_extracted(
        locate_base(found).directory, locate_base(find_base(model, hub_url)).directory, identity, rank, out
    )
    if as_json:
        print_json({"out": str(out), **made.as_dict()})
    else:
        show(made, out)


def write_extracted(base: Path, full: Path, identity: BaseIdentity, rank: int, out: Path) -> Extraction:
    """Make the adapter `out` of what the model in `full` changed of the one in `base`, which is `identity`.

    Its facts are those of the full run with the extraction added. Raises `ExtractionImpossible`, `OutputExists`.
    """
    from safetensors.torch import save_file

    from hub.cli_output import progress_bar
    from hub.facts import FACTS_FILE, Facts
    from training import output
    from training.extract import adapter_files, extract

    output.check_free(out)
    with progress_bar() as progress:
        made = extract(base, full, rank, lambda done, total: progress("extracting", done, total))
    config, tensors = adapter_files(made, identity.name or "")
    told = Facts.parse((full / FACTS_FILE).read_bytes()) if (full / FACTS_FILE).is_file() else Facts()
    facts = Facts(
        recipe={**told.recipe, "extracted": made.as_dict()},
        datasets=told.datasets,
        # The full model's scores are not this adapter's.
        metrics={"extraction_error": made.error, "extraction_error_of_linears": made.linear_error},
        seeds=told.seeds,
        base=BaseIdentity(identity.name, identity.revision, identity.fingerprint, "none"),
    )

    def save(directory: Path) -> None:
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        facts.write(directory)

    output.write_directory(out, save)
    return made


def show(made: Extraction, out: Path) -> None:
    """The errors, for people, on stderr."""
    worst = sorted(made.layers, key=lambda layer: -layer.error)[:_WORST]
    click.secho(
        f"rank {made.rank}: {100 * made.error:.1f} % of what training changed is lost "
        f"({100 * made.linear_error:.1f} % of the linear layers) → {out}",
        bold=True,
        err=True,
    )
    for layer in worst:
        click.echo(
            f"  {layer.module}: {100 * layer.error:.1f} % (the change is {layer.delta_norm / layer.weight_norm:.2%} "
            "of the weight)",
            err=True,
        )
