"""How well the adapter `auto` is chosen on the real base, by routers fitted and served in each precision.

    python -m benchmarks.routing [--fit 40 200] [--held 100] [--quantize none nf4] [--threads 2]

Three tasks have adapters; a router is fitted on their training prompts as `hub continual` does it. Then come prompts
that it has not seen: the three tasks' own; strangers, of three other tasks and passages of Python's manual; and the
tasks' questions without their instruction ("bare"), which no adapter was trained on either. Last, `hub serve` with that
router answers some of each for `auto`, one at a time and sixteen at once, and its choices are compared with the offline
ones. Adapters are random: nothing of them is in a choice.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from torch import Tensor

from benchmarks.figures import markdown
from benchmarks.mix16 import machine
from benchmarks.workload import write_adapters
from hub.hub import Hub
from server.client import AsyncClient, Routing
from server.config import Quantization
from server.model.builtin import smollm2_135m
from server.router import Choice, Router
from training.continual.embedding import EngineEmbed
from training.continual.router import fit, write_router
from training.data import Example
from training.tasks import MODULES, task_named

TASKS, OTHERS = tuple(MODULES)[:3], tuple(MODULES)[3:]
MANUAL = "Python's manual"
AT_ONCE = 16
_NAMES = {f"team/{task}:prod": task for task in TASKS}


def prompts(count: int, held: int) -> dict[str, list[Example]]:
    """By kind: "fit TASK", "TASK", "TASK, bare", the other tasks and the manual."""
    found: dict[str, list[Example]] = {}
    for name in (*TASKS, *OTHERS):
        built = task_named(name).build(count, held, 0)
        found[name] = list(built.evaluation)
        if name in TASKS:
            found[f"fit {name}"] = list(built.train)
            found[f"{name}, bare"] = [Example.of(user=one.prompt[-1].content, answer="") for one in built.evaluation]
    from pydoc_data.topics import topics

    passages = [part.strip() for text in topics.values() for part in text.split("\n\n") if 100 < len(part) < 600]
    found[MANUAL] = [Example.of(user=one, answer="") for one in random.Random(0).sample(passages, held)]
    return found


def shares(choices: Sequence[Choice], own: str | None) -> tuple[float, float, float]:
    """The share that goes to the adapter of the task `own`, to the base, and to another adapter."""
    chosen = [None if choice.adapter is None else _NAMES[choice.adapter] for choice in choices]
    base = chosen.count(None)
    right = chosen.count(own) if own is not None else 0
    other = len(chosen) - base - right
    return right / len(chosen), base / len(chosen), other / len(chosen)


@dataclass(frozen=True)
class Reading:
    """All prompts as one precision reads them, and the routers that are fitted on them."""

    rows: Mapping[str, Tensor]
    routers: Mapping[int, Router]  # by how many prompts of a task
    seconds: float  # of reading, the engine's start included


def read(asked: Mapping[str, Sequence[Example]], quantize: Quantization, options: argparse.Namespace) -> Reading:
    """Read everything once."""
    started = time.perf_counter()
    embedded = EngineEmbed("smollm2-135m", quantize, options.threads)(list(asked.values()))
    seconds = time.perf_counter() - started
    rows = dict(zip(asked, embedded.groups, strict=True))
    routers = {
        count: fit(
            {name: rows[f"fit {task}"][:count] for name, task in _NAMES.items()},
            embedded.layer,
            embedded.base,
            embedded.quantization,
        )
        for count in options.fit
    }
    return Reading(rows, routers, seconds)


def choose(router: Router, rows: Tensor) -> list[Choice]:
    """A choice a row."""
    return [router.choose(row) for row in rows]


def overall(router: Router, rows: Mapping[str, Tensor]) -> tuple[float, float, float]:
    """(tasks' own prompts sent right, sent to another task's adapter, strangers sent to the base)."""
    own = [shares(choose(router, rows[task]), task) for task in TASKS]
    strange = [shares(choose(router, rows[kind]), None)[1] for kind in (*OTHERS, MANUAL)]
    return sum(one[0] for one in own) / len(own), sum(one[2] for one in own) / len(own), sum(strange) / len(strange)


@contextmanager
def serving(hub: Path, router: Path, quantize: Quantization, threads: int) -> Iterator[str]:
    """`hub serve` with the router; its address."""
    command = [
        sys.executable,
        "-c",
        "from hub.cli import main; main()",
        "serve",
        "--hub",
        str(hub),
        "--quantize",
        quantize,
    ]
    command += [
        "--router",
        f"three={router}",
        "--threads",
        str(threads),
        "--listen",
        "127.0.0.1:0",
        "--metrics-port",
        "-1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready "):
            raise SystemExit("the server did not get ready; what it said is above")
        yield dict(pair.split("=", 1) for pair in line.split()[1:])["grpc"]
    finally:
        process.terminate()
        process.communicate(timeout=60)


async def ask(address: str, asked: Sequence[Example], at_once: int) -> list[Routing]:
    """How the server routed each."""
    gate = asyncio.Semaphore(at_once)

    async def one(client: AsyncClient, example: Example) -> Routing:
        async with gate:
            messages = [message.as_dict() for message in example.prompt]
            answer = await client.generate(messages, "auto", max_new_tokens=1)
        assert answer.routing is not None
        return answer.routing

    async with AsyncClient(address) as client:
        return list(await asyncio.gather(*(one(client, example) for example in asked)))


def served(
    asked: Mapping[str, Sequence[Example]], reading: Reading, quantize: Quantization, options: argparse.Namespace
) -> Iterator[tuple[str, ...]]:
    """A line each for one at a time and several at once: how the server's choices compare with the offline ones."""
    router = reading.routers[max(options.fit)]
    kinds = [kind for kind in asked if not kind.startswith("fit ")]
    some = [example for kind in kinds for example in asked[kind][: options.served]]
    wanted = [choice for kind in kinds for choice in choose(router, reading.rows[kind][: options.served])]
    with tempfile.TemporaryDirectory(prefix="loraplex-routing-") as text:
        place = Path(text)
        with Hub.open(str(place / "hub")) as hub:
            for task, adapter in zip(TASKS, write_adapters(smollm2_135m(), place, len(TASKS), rank=8), strict=True):
                hub.push(adapter, f"team/{task}", base="smollm2-135m")
                hub.tag(f"team/{task}@1", "prod")
        write_router(router, place / "router")
        with serving(place / "hub", place / "router", quantize, options.threads) as address:
            for at_once in (1, AT_ONCE):
                got = asyncio.run(ask(address, some, at_once))
                equal = sum((one.chosen or None) == each.adapter for one, each in zip(got, wanted, strict=True))
                apart = max(abs(one.distance / each.distance - 1) for one, each in zip(got, wanted, strict=True))
                how = f"{quantize}, {at_once} at once"
                yield how, f"{equal} of {len(some)}", f"{apart:.1%}"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fit", type=int, nargs="+", default=[40, 200], help="prompts of a task (default 40 200)")
    parser.add_argument("--held", type=int, default=100, help="unseen prompts of a kind (default 100)")
    parser.add_argument("--served", type=int, default=20, help="of those, asked of a server (default 20)")
    parser.add_argument("--quantize", nargs="+", choices=get_args(Quantization), default=["none", "nf4"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    options = parser.parse_args(arguments)
    asked = prompts(max(options.fit), options.held)
    readings: dict[Quantization, Reading] = {}
    lines: list[tuple[str, ...]] = []
    for quantize in options.quantize:
        readings[quantize] = read(asked, quantize, options)
        print(f"{quantize}: read in {readings[quantize].seconds:.0f} s", file=sys.stderr)
        lines += served(asked, readings[quantize], quantize, options)
    print(f"SmolLM2-135M, activations in bf16; {machine(options.threads)}\n")
    print(f"Adapters for {', '.join(TASKS)}; {options.held} unseen prompts of each kind.\n")
    rows = []
    for fitted, on in itertools.product(readings, readings):
        for count, router in readings[fitted].routers.items():
            told = overall(router, readings[on].rows)
            rows.append((f"{fitted}, {count} prompts a task", on, *(f"{share:.1%}" for share in told)))
    print(markdown(("fitted in", "read in", "own prompts right", "to another's", "strangers to the base"), rows))
    print()
    rows = []
    for kind in (kind for kind in asked if not kind.startswith("fit ")):
        own = kind.removesuffix(", bare")
        each = [
            shares(choose(reading.routers[max(options.fit)], reading.rows[kind]), own if own in TASKS else None)
            for reading in readings.values()
        ]
        rows.append((kind, *(f"{right:.0%} / {base:.0%} / {other:.0%}" for right, base, other in each)))
    print(markdown((f"own / base / other, {max(options.fit)} to fit", *readings), rows))
    print()
    print(markdown(("served", "choices as offline", "distances apart, most"), lines))


if __name__ == "__main__":
    main()
