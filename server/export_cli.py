"""`hub export`: versions for other hubs, for Hugging Face, and for llama.cpp."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json

if TYPE_CHECKING:
    from server.gguf_export.files import GgufType


@click.command(
    epilog=examples(
        """
hub export team/sentiment:prod sentiment.bundle          # for `hub import` where there is no network
hub export 'team/*' everything.bundle
hub export team/sentiment:prod hf://org/sentiment-lora
hub export team/sentiment:prod --gguf-lora sentiment.gguf
llama-cli -m smollm2-135m.gguf --lora sentiment.gguf
"""
    )
)
@click.argument("arguments", nargs=-1, required=True, metavar="REF... [FILE|hf://USER/REPO[@BRANCH]]")
@click.option("--public", is_flag=True, help="hf://: a repository that is made now is public.")
@click.option("--base-model", metavar="ORG/NAME", help="hf://: the base's id for the model card.")
@click.option("--gguf-lora", "out", type=click.Path(path_type=Path), help="GGUF: the new file, for llama.cpp's --lora.")
@click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16"]),
    default="f32",
    show_default=True,
    help="GGUF: of the matrices.",
)
@click.option("--base", help="GGUF: built-in name, directory or Hugging Face id; default: the one the adapter records.")
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="GGUF: prompts for the proof, one a line; default: twelve of ours.",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="GGUF: CPU threads; default: all cores.")
@hub_option
@json_option
def export(
    arguments: tuple[str, ...],
    public: bool,
    base_model: str | None,
    out: Path | None,
    gguf_type: GgufType,
    base: str | None,
    prompts_file: Path | None,
    threads: int,
    hub_url: str | None,
    as_json: bool,
) -> None:
    """Write versions out of the hub, in one of three forms.

    REF... FILE: a bundle, one plain tar file with everything - manifests, files, signatures, aliases - that
    `hub import` takes in elsewhere, byte for byte and under the same digests. A REF with * stands for all versions of
    the adapters that match. The same versions make the same file.

    REF hf://USER/REPO: one commit in a Hugging Face repository, made private where there is none, with a model card:
    base_model, tags, lineage, metrics. HF_ENDPOINT and HF_TOKEN count.

    REF --gguf-lora FILE: a GGUF LoRA, with its proof. The file is read back and computed in plain torch beside the
    base, with llama.cpp's order of rows and its scale; PEFT on the same base must give the same logits. What the format
    cannot hold (DoRA, modules_to_save, trained biases or tokens) is refused by name.
    """
    if out is not None:
        if len(arguments) != 1:
            raise click.UsageError("--gguf-lora writes one version: hub export REF --gguf-lora FILE")
        _to_gguf(arguments[0], out, gguf_type, base, prompts_file, threads, hub_url, as_json)
        return
    if len(arguments) < 2:
        raise click.UsageError("say where to: a FILE, hf://USER/REPO, or --gguf-lora FILE")
    from hub import cli_export
    from hub.hugging_face.address import is_address

    *refs, target = arguments
    if is_address(target):
        if len(refs) > 1:
            raise click.UsageError("a repository holds one version: hub export REF hf://USER/REPO")
        cli_export.to_hugging_face(
            refs[0], target, public=public, base_model=base_model, hub_url=hub_url, as_json=as_json
        )
        return
    if public or base_model is not None:
        raise click.UsageError("--public and --base-model are for hf://")
    cli_export.to_bundle(tuple(refs), Path(target), hub_url, as_json)


def _to_gguf(
    ref: str,
    out: Path,
    gguf_type: GgufType,
    base: str | None,
    prompts_file: Path | None,
    threads: int,
    hub_url: str | None,
    as_json: bool,
) -> None:
    from server.merge_cli import fingerprint_of, located_base, parity_text, quieten_libraries
    from server.prompt_file import read_prompts

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
