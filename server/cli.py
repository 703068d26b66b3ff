"""`hub serve`. Imports torch only after the threads are bounded."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from hub.byte_size import ByteSize, as_option
from hub.cli_trust import trust_options
from hub.duration import Duration
from hub.duration import as_option as as_duration
from hub.errors import HubNotFound
from hub.listen_address import ListenAddress
from hub.unwinding import end_at_once
from server.config import MIB, EngineLimits, FeedbackConfig, ModelConfig, Quantization, ServerConfig
from server.errors import BaseUnavailable
from server.serve_options import Device, MetadataKey, NamedRouter

if TYPE_CHECKING:
    from hub.facade import HubFacade
    from server.adapters.directory import AdapterDirectory
    from server.adapters.hub_leases import HubLeases
    from server.engine.engine import Engine
    from server.metrics import Metrics

_MODEL, _LIMITS, _SERVER, _FEEDBACK = ModelConfig(), EngineLimits(), ServerConfig(), FeedbackConfig(Path())
_POSITIVE = click.IntRange(min=1)


def _size(default: int, least: int = 0) -> dict[str, Any]:
    return {"type": ByteSize(least), "default": as_option(default), "show_default": True, "metavar": "SIZE"}


@click.command(epilog="Example: hub serve --listen 0.0.0.0:50051 --quantize nf4 --adapter-memory 1GiB")
@click.option(
    "--base",
    default=_MODEL.base,
    show_default=True,
    metavar="NAME|DIR|REF|ORG/NAME[@REV]",
    help="The one base model: a built-in name, a local directory, a whole model of the hub, or a Hugging Face id.",
)
@click.option(
    "--hub",
    envvar="LORAPLEX_HUB",
    metavar="URL",
    show_envvar=True,
    help="Where adapters come from. Default: your own hub, a directory.",
)
@click.option(
    "--listen",
    type=ListenAddress(),
    default=_SERVER.listen,
    show_default=True,
    metavar="HOST:PORT",
    help="gRPC address; port 0 takes any free port.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(-1, 65535),
    default=_SERVER.metrics_port,
    show_default=True,
    help="Port of the Prometheus page on the same host; 0 takes any free port, -1 turns it off.",
)
@click.option(
    "--quantize",
    type=click.Choice(get_args(Quantization)),
    default=_MODEL.quantization,
    show_default=True,
    help="How the base's weights are kept.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "float16"]),
    default=_MODEL.dtype,
    show_default=True,
    help="Activations, and weights that are not quantized.",
)
@click.option(
    "--device",
    type=Device(),
    default=_MODEL.device,
    show_default=True,
    metavar="cpu|cuda[:N]",
    help="Where the model lives.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=_MODEL.threads,
    show_default=True,
    help="CPU threads for the model; 0: all cores this process may use.",
)
@click.option(
    "--max-sequences", type=_POSITIVE, default=_LIMITS.max_sequences, show_default=True, help="Requests in one step."
)
@click.option(
    "--max-batch-tokens",
    type=_POSITIVE,
    default=_LIMITS.max_batch_tokens,
    show_default=True,
    help="Tokens in one step, prompts and answers together.",
)
@click.option("--kv-memory", **_size(_LIMITS.kv_memory_bytes, least=MIB), help="Memory for attention keys and values.")
@click.option(
    "--adapter-memory",
    **_size(_LIMITS.adapter_memory_bytes),
    help="Memory for adapters ready to run, on the model's device.",
)
@click.option(
    "--adapter-parts-memory",
    **_size(_LIMITS.adapter_parts_memory_bytes),
    help="Device memory for what adapters bring beside LoRA, such as replaced output heads.",
)
@click.option(
    "--host-adapter-memory",
    **_size(_LIMITS.host_adapter_memory_bytes),
    help="Memory for adapters kept near, in the host's memory.",
)
@click.option(
    "--device-memory",
    type=ByteSize(),
    default=0,
    metavar="SIZE",
    help="What weights, keys and values, adapters and work space may take together; refused at start where they need "
    "more. Default: what the GPU, or for a CPU the machine, has left.",
)
@click.option(
    "--deterministic",
    is_flag=True,
    help="A request gives the same tokens and log-probabilities whatever shares its batch, in the served precision, "
    "with every kind of adapter. Slower; refused where it cannot be promised.",
)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=_SERVER.drain_seconds,
    show_default=True,
    help="Time that running requests get after SIGTERM.",
)
@click.option(
    "--lease-seconds",
    type=click.FloatRange(min=0, max=3600),
    default=_SERVER.lease_seconds,
    show_default=True,
    help="For how long the hub may not remove the versions held here; renewed meanwhile. 0: take no leases.",
)
@click.option(
    "--tenant-header",
    type=MetadataKey(),
    metavar="KEY",
    help="Metadata key, set by a proxy that you trust, that says whose share of the server a call uses. Default: all "
    "callers share one.",
)
@click.option(
    "--feedback",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep what callers say of answers (the call Feedback), with request and answer, in DIR. Default: refuse it.",
)
@click.option(
    "--feedback-retention",
    type=Duration(),
    default=as_duration(_FEEDBACK.retention_seconds),
    show_default=True,
    help="How long after a day's end its feedback is removed.",
)
@click.option(
    "--feedback-window",
    type=Duration(),
    default=as_duration(_FEEDBACK.window_seconds),
    show_default=True,
    help="How long after its answer a request can be marked; until then it is remembered, in memory alone.",
)
@click.option("--feedback-limit", **_size(_FEEDBACK.max_tenant_bytes), help="What one tenant's feedback may take.")
@click.option(
    "--router",
    "routers",
    multiple=True,
    type=NamedRouter(),
    metavar="NAME=DIR",
    help="A router of `hub continual`, which chooses for requests that ask for auto (auto:NAME where there are "
    "several); may be given several times. Refused where it was fitted for another base.",
)
@trust_options
def serve(hub: str | None, trusted_keys: tuple[Path, ...], **options: Any) -> int:
    """Serve one base model with any mix of adapters, over gRPC.

    Prints one line that begins with "ready" on stdout once it answers; everything else goes to stderr. Every request
    names its own adapters; an alias moved in the hub is seen at once. With --require-signature adapters that no trusted
    key signed are refused (SIGNATURE_MISSING, SIGNATURE_UNTRUSTED). SIGTERM or Ctrl-C lets running requests end, a
    second one stops at once.
    """
    names = [name for name, _ in options["routers"]]
    if twice := {name for name in names if names.count(name) > 1}:
        raise click.UsageError(f"two routers are called {min(twice)}")
    config = ServerConfig(
        model=ModelConfig(
            options["base"], options["quantize"], options["dtype"], options["device"], options["threads"]
        ),
        engine=EngineLimits(
            max_sequences=options["max_sequences"],
            max_batch_tokens=options["max_batch_tokens"],
            kv_memory_bytes=options["kv_memory"],
            adapter_memory_bytes=options["adapter_memory"],
            adapter_parts_memory_bytes=options["adapter_parts_memory"],
            host_adapter_memory_bytes=options["host_adapter_memory"],
            device_memory_bytes=options["device_memory"],
            deterministic=options["deterministic"],
        ),
        hub=hub,
        listen=options["listen"],
        metrics_port=options["metrics_port"],
        drain_seconds=options["drain_seconds"],
        lease_seconds=options["lease_seconds"],
        tenant_header=options["tenant_header"],
        feedback=FeedbackConfig(
            options["feedback"],
            retention_seconds=options["feedback_retention"],
            window_seconds=options["feedback_window"],
            max_tenant_bytes=options["feedback_limit"],
        )
        if options["feedback"] is not None
        else None,
        routers=options["routers"],
        trusted_keys=trusted_keys,
    )
    bound_openmp(config.model.threads)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("server").setLevel(logging.INFO)
    end_at_once(signal.SIGHUP)
    return _serve(config)


def _serve(config: ServerConfig) -> int:
    from dataclasses import replace

    from hub.base import locate_base
    from hub.model_base import find_base
    from hub.signing.requiring import requiring
    from server.adapters.hub_leases import HubLeases
    from server.api.serving import Outcome, Parts
    from server.api.serving import serve as run
    from server.feedback.store import prepare_directory
    from server.router_files import check_directory

    # What a typing error breaks is found out before anything is bound or loaded.
    base = find_base(config.model.base, config.hub, config.trusted_keys)
    config = replace(config, model=replace(config.model, base=base))
    locate_base(base)
    if config.feedback is not None:
        prepare_directory(config.feedback.directory)
    for _, directory in config.routers:
        check_directory(directory)
    _check_device(config.model.device)
    with requiring(_hub(config.hub), config.trusted_keys) as opened:
        leases = HubLeases(opened, config.lease_seconds) if config.lease_seconds else None
        parts = Parts(lambda: _directory(opened), lambda metrics: _engine(config, opened, leases, metrics))
        try:
            outcome = asyncio.run(run(config, parts, announce=_announce, progress=_progress))
        finally:
            if leases is not None:
                leases.close()
    if outcome is Outcome.ABANDONED:
        # A thread is still inside the model library; the interpreter's own end would pull the floor from under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0 if outcome is Outcome.DRAINED else 1


def bound_openmp(threads: int) -> None:
    """Make OpenMP's threads few and let idle ones sleep; only works before torch is imported.

    By default they spin while they wait, which on a shared machine makes decoding ten times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _check_device(device: str) -> None:
    """Raise `BaseUnavailable` where there is no such GPU; torch, which knows, is imported for one alone."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        import torch

        if int(index or 0) >= torch.cuda.device_count():
            raise BaseUnavailable(f"there is no device {device} here; PyTorch sees {torch.cuda.device_count()} GPUs")


def _hub(url: str | None) -> HubFacade:
    """The hub at `url`; where there is none, an empty one is made, and said."""
    from hub.opening import open_existing, open_hub

    try:
        return open_existing(url)
    except HubNotFound as missing:
        _progress(f"warning: {missing}")
        return open_hub(url)


def _directory(hub: HubFacade) -> AdapterDirectory:
    from server.adapters.directory import AdapterDirectory

    return AdapterDirectory(hub)


def _engine(config: ServerConfig, hub: HubFacade, leases: HubLeases | None, metrics: Metrics) -> Engine:
    from server.adapters.directory import hub_fetch
    from server.engine.engine import Engine

    try:
        if leases is None:
            return Engine.build(config.model, config.engine, hub_fetch(hub), metrics)
        engine = Engine.build(config.model, config.engine, hub_fetch(hub, leases.fetched), metrics)
        leases.follow(lambda: {each.digest for each in engine.adapters.list()})
        return engine
    except (MemoryError, RuntimeError) as error:
        # PyTorch says "out of memory" on a GPU and "can't allocate memory" or "not enough memory" on a CPU.
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise BaseUnavailable(
            "this machine's memory is too small for the base with "
            f"--kv-memory {as_option(config.engine.kv_memory_bytes)} and "
            f"--adapter-memory {as_option(config.engine.adapter_memory_bytes)}"
        ) from None


def _announce(line: str) -> None:
    print(line, flush=True)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
