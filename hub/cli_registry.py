"""`hub registry`: runs the shared server."""

from __future__ import annotations

import hashlib
import logging
import shlex
import signal
import threading
from pathlib import Path

import click
import platformdirs

from hub.cli_options import examples, hub_option
from hub.listen_address import ListenAddress
from hub.place import Place
from hub.unwinding import end_at_once

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    epilog=examples(
        """
hub token create admin --grant '*:admin'                  # the first token, where the hub lies
hub registry --listen 0.0.0.0:50052 --tls-cert server.pem --tls-key server.key
hub registry --hub 'postgresql://hub@db/hub?blobs=/srv/blobs' --metrics-port 9401
hub registry --without-tokens                             # on this machine, for a try
"""
    )
)
@hub_option
@click.option(
    "--listen",
    type=ListenAddress(),
    default="127.0.0.1:50052",
    show_default=True,
    metavar="HOST:PORT",
    help="Port 0: any free.",
)
@click.option("--tls-cert", type=_FILE, help="PEM certificate chain; read anew when it is replaced.")
@click.option("--tls-key", type=_FILE, help="PEM private key.")
@click.option("--without-tokens", is_flag=True, help="Everybody may do everything; only on a loopback address.")
@click.option(
    "--uploads",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where unfinished pushes are kept, for a day.  [default: in your cache directory]",
)
@click.option(
    "--profile",
    type=_FILE,
    metavar="FILE",
    help="What pushes must keep to: ranks, targets, sizes, bases (TOML); read at every push.  "
    "[default: profile.toml in the hub's directory]",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(-1, 65535),
    default=-1,
    show_default=True,
    help="Port of the Prometheus page; 0 takes any free port, -1 turns it off.",
)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="How long running calls may go on after SIGTERM; a second signal ends them.",
)
def registry(
    hub_url: str | None,
    listen: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    without_tokens: bool,
    uploads: Path | None,
    profile: Path | None,
    metrics_port: int,
    drain_seconds: float,
) -> None:
    """Offer a hub to others over gRPC, at grpc://HOST:PORT or, with TLS, grpcs://HOST:PORT.

    Callers need a token (`hub token create`). Health and reflection answer on the same port. Prints one line, `ready`
    with the addresses, when it serves; SIGTERM and Ctrl-C drain it.
    """
    from hub.errors import CredentialsUnsafe, HubUnavailable
    from hub.opening import named, open_own
    from hub.profile import Profile
    from hub.registry.server import RegistryConfig, RegistryServer
    from hub.registry.tokens import TokenStore
    from hub.remote.address import Address, is_remote

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("give --tls-cert and --tls-key, or neither")
    if is_remote(named(hub_url)):
        raise HubUnavailable("a shared server offers a hub of its own: give a directory or a PostgreSQL URL")
    scheme = "grpc" if tls_cert is None else "grpcs"
    if without_tokens and not Address.parse(f"grpc://{listen}").private:
        raise CredentialsUnsafe(f"without tokens a server listens on a loopback address, which {listen} is not")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uploads = uploads or _uploads(named(hub_url))
    config = RegistryConfig(
        listen=listen, uploads=uploads, tls_cert=tls_cert, tls_key=tls_key, metrics_port=metrics_port,
        drain_seconds=drain_seconds,
    )  # fmt: skip
    end_at_once(signal.SIGHUP)
    ending = threading.Event()
    with open_own(hub_url, _say) as hub:
        hub.profile_file = profile or hub.profile_file
        if hub.profile_file is not None:
            Profile.read(hub.profile_file)  # one that cannot be read is said now, not at the first push
        tokens = None if without_tokens else TokenStore(hub.database)
        if tokens is not None and not any(token.revoked is None for token in tokens.list()):
            _say(f"there is no token yet: `hub token create admin --grant '*:admin'{_same(hub_url)}` makes the first")
        if scheme == "grpc" and not Address.parse(f"grpc://{listen}").private:
            _say("warning: without --tls-cert and --tls-key, tokens and adapters pass unencrypted")
        server = RegistryServer(hub, tokens, config).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ending.set())
        metrics = f" metrics={server.metrics_url}" if server.metrics_url else ""
        click.echo(f"ready hub={scheme}://{server.address}{metrics}")
        while not ending.wait(1.0):
            pass
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        server.stop()


def _say(text: str) -> None:
    click.echo(text, err=True)


def _same(hub_url: str | None) -> str:
    """What makes another verb go to this hub; never a password."""
    if hub_url is None:
        return ""
    database = Place.parse(hub_url).database
    return " --hub URL" if database is not None and database.password else f" --hub {shlex.quote(hub_url)}"


def _uploads(url: str) -> Path:
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("loraplex") / "registry-uploads" / name
