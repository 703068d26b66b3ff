"""`hub key`, `hub sign` and `hub signatures`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, print_pairs, print_table
from hub.cli_trust import key_option, trust_option
from hub.errors import HubUnavailable
from hub.opening import open_existing


@click.group(
    epilog=examples(
        """
hub key generate                     # yours, in your configuration directory
hub key show > release.pub           # what others need to trust it
openssl ecparam -name prime256v1 -genkey -noout -out release.key   # the same, without the hub
openssl ec -in release.key -pubout -out release.key.pub
"""
    )
)
def key() -> None:
    """Keys that sign versions: PEM files over P-256, P-384 or P-521, as OpenSSL makes them."""


@key.command(
    epilog=examples(
        """
hub key generate
hub key generate release.key         # and release.key.pub
hub key generate release.key --passphrase
"""
    )
)
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--passphrase", is_flag=True, help="Ask for a passphrase; to sign, put it into LORAPLEX_SIGNING_PASSPHRASE."
)
@json_option
def generate(file: Path | None, passphrase: bool, as_json: bool) -> None:
    """Make a new P-256 key in FILE, for your eyes alone, and its public half in FILE.pub.

    Without FILE it is the one that `--sign` uses by itself. A file that is there is never overwritten.
    """
    from hub.signing import keys

    phrase = click.prompt("passphrase", hide_input=True, confirmation_prompt=True, err=True) if passphrase else None
    path = file or keys.default_key_file()
    made = keys.generate(path, phrase)
    public = path.with_name(path.name + ".pub")
    if as_json:
        print_json({"key": str(path), "public": str(public), "id": made.public.id})
        return
    click.secho(f"made {path}", bold=True)
    print_pairs({"public half": str(public), "id": made.public.id})


@key.command(
    epilog=examples(
        """
hub key show > release.pub
hub key show release.key --json
"""
    )
)
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@json_option
def show(file: Path | None, as_json: bool) -> None:
    """Print the public half of the private key in FILE (yours, if not given), for those who are to trust it."""
    from hub.signing import keys

    public = keys.read_signing_key(file or keys.default_key_file()).public
    if as_json:
        print_json({"id": public.id, "pem": public.pem})
        return
    click.echo(public.pem, nl=False)
    click.echo(f"id {public.id}", err=True)


@click.command(
    epilog=examples(
        """
hub sign team/sentiment@3
hub sign team/sentiment:prod --key release.key
"""
    )
)
@click.argument("ref")
@key_option
@hub_option
@json_option
def sign(ref: str, key_file: Path | None, hub_url: str | None, as_json: bool) -> None:
    """Sign the version REF names: its digest, which stands for all its bytes and facts.

    A version may have several signatures, of several keys; signing again with the same key changes nothing. The digest
    that is signed is printed: compare it with the one you tested.
    """
    from hub.signing import keys
    from hub.signing.pushing import sign_version

    signing_key = keys.read_signing_key(key_file or keys.default_key_file())
    with open_existing(hub_url) as hub:
        version = hub.resolve(ref)
        added = sign_version(hub, version, signing_key)
    if as_json:
        print_json(
            {"version": version.text, "digest": version.digest, "key": signing_key.public.id, "signed_now": added}
        )
        return
    click.secho(f"signed {version.text}" if added else f"{version.text} was signed by this key before", bold=True)
    print_pairs({"digest": version.digest, "key": signing_key.public.id})


@click.command(
    epilog=examples(
        """
hub signatures team/sentiment:prod --trust release.pub
hub signatures team/sentiment@3 --out signatures/
model_signing verify key sentiment --signature signatures/1.sig --public_key release.pub   # OpenSSF model-signing
"""
    )
)
@click.argument("ref")
@trust_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also write them there, 1.sig, 2.sig, …: Sigstore bundles that `model_signing verify key` reads.",
)
@hub_option
@json_option
def signatures(ref: str, trust: tuple[Path, ...], out: Path | None, hub_url: str | None, as_json: bool) -> None:
    """Who signed the version REF names.

    A signature is checked with the key that it names, if that is among those of --trust: "trusted" or "invalid"; of
    other keys it is "unknown" whether they fit.
    """
    from hub.signing.policy import TrustPolicy

    policy = TrustPolicy.read(trust)
    with open_existing(hub_url) as hub:
        version = hub.resolve(ref)
        found = hub.signatures(version.digest)
    findings = policy.examine(version, found)
    if out is not None:
        _write_out(out, found)
    if as_json:
        print_json(
            {
                "version": version.text, "digest": version.digest,
                "signatures": [asdict(finding) for finding in findings],
            }
        )  # fmt: skip
        return
    if not findings:
        click.echo(f"{version.text} is not signed")
        return
    rows = [
        [str(number), finding.state, finding.key_id or "", finding.key or "", finding.problem or ""]
        for number, finding in enumerate(findings, start=1)
    ]
    print_table(["#", "state", "key", "file", "problem"], rows)


def _write_out(out: Path, found: Sequence[bytes]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(found, start=1):
            (out / f"{number}.sig").write_bytes(data)
    except OSError as error:
        raise HubUnavailable(f"{out} cannot be written: {os.strerror(error.errno or 0)}") from error
