"""A hub of 100,000 versions: pages of lists and searches, resolution, and 32 clients of a shared server at once.

    python -m benchmarks.hub_catalog                       # SQLite
    python -m benchmarks.hub_catalog --postgres            # and PostgreSQL, from Debian's packages
    python -m benchmarks.hub_catalog --results benchmarks/results/hub_catalog.md

The rows are entered in bulk, as a rebuild enters them; the blobs are not there, and nothing measured reads one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import sqlalchemy as sa

from hub import tables
from hub.base_identity import BaseIdentity
from hub.facade import HubFacade
from hub.hub import Hub
from hub.manifest import FileEntry, LoraFacts, Manifest
from hub.refs import Digest
from hub.search import MetricTest, Query
from hub.transactions import writing

PER_ADAPTER = 10
PAGE = 50
CLIENTS = 32
CREATED = "2026-11-22T00:00:00Z"
BASES = ("smollm2-135m", "llama-8b", "qwen-7b")


_DIGESTS = {what: Digest.of_hex(f"{n}" * 64) for n, what in enumerate(("config", "weights", "tensors"))}
_BASE, _F1, _LOSS = "the-base", 0.125, 0.25


def template() -> bytes:
    """A version's manifest, as a training run would have left it, with places for what differs."""
    made = Manifest(
        name="the/name",
        files={
            "adapter_config.json": FileEntry(_DIGESTS["config"], 700),
            "adapter_model.safetensors": FileEntry(_DIGESTS["weights"], 20_000_000),
        },
        tensors=_DIGESTS["tensors"],
        base=BaseIdentity(_BASE, None, "sha256:" + "f" * 64, "nf4"),
        lora=LoraFacts({"16": 120}, 32, ("q_proj", "v_proj"), 120, 1_000_000, ("F32",), ()),
        recipe={"lr": 2e-4, "epochs": 3},
        metrics={"f1": _F1, "test": {"loss": _LOSS}},
        creator="bench",
        created=CREATED,
    )
    return made.canonical()


def manifest(text: bytes, name: str, number: int) -> tuple[bytes, dict[str, Digest], str, float, float]:
    """The manifest's bytes, its digests, its base and its metrics. Made of text: a hundred thousand times it counts."""
    dice = random.Random(f"{name}@{number}")
    digests = {what: Digest.of_hex(f"{dice.getrandbits(256):064x}") for what in _DIGESTS}
    base, f1, loss = dice.choice(BASES), round(dice.uniform(0.1, 0.99999), 5), round(0.6 + 1 / (number + 1), 5)
    changed = text.decode().replace('"the/name"', f'"{name}"').replace(f'"{_BASE}"', f'"{base}"')
    changed = changed.replace(f"{_F1}", f"{f1}").replace(f'"loss":{_LOSS}', f'"loss":{loss}')
    for what, digest in digests.items():
        changed = changed.replace(_DIGESTS[what], digest)
    return changed.encode(), digests, base, f1, loss


def fill(connection: sa.Connection, versions: int) -> None:
    """Enter adapters of PER_ADAPTER versions each: latest holds the last, prod is split over two."""
    adapters = [f"team{n % 97}/adapter-{n:06}" for n in range(versions // PER_ADAPTER)]
    seq, text = 0, template()
    for begin in range(0, len(adapters), 200):
        rows: dict[sa.Table, list[dict[str, object]]] = {
            table: []
            for table in (
                tables.adapters, tables.versions, tables.files, tables.metrics, tables.aliases, tables.targets,
                tables.events,
            )
        }  # fmt: skip
        for name in adapters[begin : begin + 200]:
            rows[tables.adapters].append({"full_name": name, "next_number": PER_ADAPTER + 1})
            for number in range(1, PER_ADAPTER + 1):
                seq += 1
                made, digests, base, f1, loss = manifest(text, name, number)
                digest = Digest.of_hex(hashlib.sha256(made).hexdigest())
                key = {"full_name": name, "number": number}
                event = {"seq": seq, "batch": seq, "time": CREATED, "actor": "bench", "digest": digest}
                rows[tables.events].append({**key, **event, "kind": "push", "alias": None})
                rows[tables.versions].append(
                    {
                        **key, "digest": digest, "content": digests["tensors"], "manifest": made.decode(),
                        "removed": None, "base_name": base, "base_fingerprint": "sha256:" + "f" * 64,
                    }
                )  # fmt: skip
                rows[tables.files] += [
                    {**key, "name": "adapter_config.json", "sha256": digests["config"]},
                    {**key, "name": "adapter_model.safetensors", "sha256": digests["weights"]},
                ]
                rows[tables.metrics] += [
                    {**key, "name": "f1", "value": f1}, {**key, "name": "test.loss", "value": loss},
                ]  # fmt: skip
            for alias, held in (("latest", {PER_ADAPTER: 1}), ("prod", {3: 9, 4: 1})):
                rows[tables.aliases].append({"full_name": name, "alias": alias, "generation": seq})
                rows[tables.targets] += [
                    {"full_name": name, "alias": alias, "number": number, "weight": weight}
                    for number, weight in held.items()
                ]
        for table, entries in rows.items():
            connection.execute(sa.insert(table), entries)


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of each round."""
    took = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        took.append((time.perf_counter() - begun) * 1e3)
    return took


def row(where: str, what: str, took: list[float], wanted: str = "") -> str:
    """One line of the table, printed too."""
    ordered = sorted(took)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    line = f"| {where} | {what} | {statistics.median(took):.2f} | {p99:.2f} | {ordered[-1]:.2f} | {wanted} |"
    print(line, flush=True)
    return line


def measure(where: str, hub: HubFacade, versions: int, *, far: bool = False) -> Iterator[str]:
    """Pages, searches and resolutions, one caller."""
    dice = random.Random(1)
    last = versions // PER_ADAPTER - 1

    def name() -> str:
        number = dice.randint(0, last)
        return f"team{number % 97}/adapter-{number:06}"

    def page(query: Query) -> Callable[[], object]:
        return lambda: hub.search(replace(query, limit=PAGE))

    def later(query: Query) -> Callable[[], object]:
        return lambda: hub.search(replace(query, limit=PAGE, after=(name(), PER_ADAPTER)))

    rounds = 50
    wanted = "" if far else "< 100"
    yield row(where, f"list, first page of {PAGE}", timed(page(Query(newest=True)), rounds), wanted)
    yield row(where, "list, a page in the middle", timed(later(Query(newest=True)), rounds), wanted)
    yield row(where, "list team42/*", timed(page(Query("team42/*", newest=True)), rounds), wanted)
    yield row(where, "list *-099* (no prefix)", timed(page(Query("*-0099*", newest=True)), rounds), wanted)
    yield row(where, "search f1 > 0.99", timed(page(Query(metrics=(MetricTest("f1", ">", 0.99),))), rounds), wanted)
    yield row(where, "search f1 > 0.5", timed(page(Query(metrics=(MetricTest("f1", ">", 0.5),))), rounds), wanted)
    both = Query(base=BASES[1], tag="prod", metrics=(MetricTest("f1", ">", 0.9), MetricTest("test.loss", "<", 0.82)))
    yield row(where, "search base, tag, two metrics", timed(page(both), rounds), wanted)
    wanted = "" if far else "< 2"
    hub.resolve(name())
    yield row(where, "resolve NAME", timed(lambda: hub.resolve(name()), 1000), wanted)
    yield row(where, "resolve NAME@3", timed(lambda: hub.resolve(f"{name()}@3"), 1000), wanted)
    yield row(
        where, "resolve NAME:prod, split, by key", timed(lambda: hub.resolve(f"{name()}:prod", "me"), 1000), wanted
    )
    digests = [version.digest for version in hub.search(Query(limit=500)).versions]
    yield row(where, "get DIGEST", timed(lambda: hub.get(dice.choice(digests)), 1000), wanted)


def crowd(where: str, url: str, versions: int, tmp: Path) -> Iterator[str]:
    """Resolutions by 32 clients of a shared server, each with a connection of its own, for five seconds."""
    from hub.remote.address import Address
    from hub.remote.cache import Cache
    from hub.remote.connection import Connection
    from hub.remote.remote_hub import RemoteHub

    program = [sys.executable, "-c", "from hub.cli import main; main()", "registry", "--hub", url, "--listen",
               "127.0.0.1:0", "--without-tokens", "--uploads", str(tmp / "uploads")]  # fmt: skip
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[1].removeprefix("hub=")
        begin, stop = threading.Barrier(CLIENTS + 1), threading.Event()

        def client(number: int) -> list[float]:
            dice = random.Random(number)
            took = []
            connection = Connection(Address.parse(address), None)
            with RemoteHub(connection, Cache(tmp / f"client-{number}")) as hub:
                hub.last_seq()
                begin.wait()
                while not stop.is_set():
                    n = dice.randrange(versions // PER_ADAPTER)
                    ref = f"team{n % 97}/adapter-{n:06}"
                    begun = time.perf_counter()
                    hub.connection.call("Resolve", request(ref))
                    took.append((time.perf_counter() - begun) * 1e3)
            return took

        with ThreadPoolExecutor(CLIENTS) as pool:
            results = [pool.submit(client, number) for number in range(CLIENTS)]
            begin.wait()
            time.sleep(5)
            stop.set()
            took = [each for result in results for each in result.result()]
        server.terminate()
    yield row(where, f"resolve NAME, {CLIENTS} clients at once ({len(took) / 5:.0f} a second in all)", took)


def request(ref: str) -> object:
    """What a client asks."""
    from protos.loraplex.v1 import registry_pb2 as pb

    return pb.ResolveRequest(ref=ref)


def help_seconds() -> list[float]:
    """`hub --help`, the whole process."""
    program = [sys.executable, "-c", "from hub.cli import main; main()", "--help"]
    return timed(lambda: subprocess.run(program, check=True, stdout=subprocess.DEVNULL), 15)


def main() -> None:
    """Parse the command line, fill, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=100_000)
    parser.add_argument("--postgres", action="store_true", help="measure PostgreSQL, too")
    parser.add_argument("--results", type=Path, help="write the table here")
    options = parser.parse_args()
    lines = ["| where | what | median ms | p99 ms | worst ms | wanted |", "|---|---|---|---|---|---|"]
    print("\n".join(lines))
    with ExitStack() as stack:
        tmp = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["XDG_CACHE_HOME"] = str(tmp / "cache")
        urls = {"SQLite": str(tmp / "hub")}
        if options.postgres:
            from tests.hub import postgres  # from a checkout only

            found = postgres.binaries()
            if found is None:
                raise SystemExit("apt-get install postgresql")
            urls["PostgreSQL"] = f"{stack.enter_context(postgres.server(found))}?blobs={tmp / 'blobs'}"
        for where, url in urls.items():
            begun = time.perf_counter()
            with Hub.open(url) as hub:
                with writing(hub.database) as connection:
                    fill(connection, options.versions)
                if where == "PostgreSQL":
                    with hub.database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                        connection.exec_driver_sql("ANALYZE")
                print(f"filled {where} in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
                lines += measure(where, hub, options.versions)
            lines += crowd(f"{where}, over gRPC", url, options.versions, tmp / where)
    lines.append(row("", "hub --help", help_seconds(), "< 150"))
    if options.results is not None:
        command = f"python -m benchmarks.hub_catalog --versions {options.versions}" + (
            " --postgres" if options.postgres else ""
        )
        options.results.write_text(
            f"# A hub of {options.versions:,} versions\n\n`{command}`, on {os.cpu_count()} shared cores.\n\n"
            + "\n".join(lines) + "\n"
        )  # fmt: skip


if __name__ == "__main__":
    main()
