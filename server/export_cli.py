"""`hub export`: a version in another program's format."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json
from server.merge_cli import fingerprint_of, located_base, parity_text, quieten_libraries
from server.prompt_file import read_prompts

if TYPE_CHECKING:
    from server.gguf_export.files import GgufType


@click.command(
    epilog=examples(
        """
hub export team/sentiment:prod --gguf-lora sentiment.gguf
llama-cli -m smollm2-135m.gguf --lora sentiment.gguf
"""
    )
)
@click.argument("ref")
@click.option(
    "--gguf-lora", "out", required=True, type=click.Path(path_type=Path), help="The new file, for llama.cpp's --lora."
)
@click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16"]),
    default="f32",
    show_default=True,
    help="Of the matrices.",
)
@click.option("--base", help="Built-in name, directory or Hugging Face id; default: the base the adapter records.")
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Prompts for the proof, one a line; default: twelve of ours.",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads; default: all cores.")
@hub_option
@json_option
def export(
    ref: str,
    out: Path,
    gguf_type: GgufType,
    base: str | None,
    prompts_file: Path | None,
    threads: int,
    hub_url: str | None,
    as_json: bool,
) -> None:
    """Write the version REF as a GGUF LoRA, and prove it.

    The file is read back and computed in plain torch beside the base, with llama.cpp's order of rows and its scale;
    PEFT on the same base must give the same logits. What the format cannot hold (DoRA, modules_to_save, trained
    biases or tokens) is refused by name.
    """
    prompts = read_prompts(prompts_file) if prompts_file else None

    from hub.opening import open_existing
    from server.cli import bound_openmp

    bound_openmp(threads)
    from server.gguf_export.files import refuse_taken_file

    refuse_taken_file(out)
    with open_existing(hub_url) as hub, tempfile.TemporaryDirectory(prefix="loraplex-export-") as scratch:
        version = hub.resolve(ref)
        located = located_base([version], base)
        fingerprint_of(located, [version])
        directory = Path(scratch) / "adapter"
        hub.pull(version.text, directory)
        quieten_libraries()
        from server.equivalence import PROMPTS
        from server.gguf_export.export import export_lora
        from server.model.base import bound_threads

        bound_threads(threads)
        modules, parity = export_lora(directory, version.text, located.directory, out, gguf_type, prompts or PROMPTS)
    if as_json:
        print_json(
            {
                "version": version.text,
                "digest": version.digest,
                "file": str(out),
                "type": gguf_type,
                "bytes": out.stat().st_size,
                "modules": modules,
                **asdict(parity),
            }
        )
        return
    click.echo(f"{version.text} → {out}: {modules} modules, {gguf_type}; {parity_text(parity)}")
