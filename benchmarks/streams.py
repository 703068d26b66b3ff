"""256 open streams: what the front costs the engine in one process with it, and with a process between them.

    python -m benchmarks.streams [--streams 256] [--max-sequences 64 256] [--rounds 3] [--threads 2] [--json out.json]

The same requests to SmolLM2-135M in bfloat16, without adapters, in three arrangements that take turns:

* offline: the engine alone, through its Python door; nobody reads but the caller.
* thread: the gRPC server as it is, its event loop and the engine's thread in one process; one client process (this
  one) holds all streams open and reads every token.
* own process: the same front, the engine in a child behind a pipe (`benchmarks/apart.py`).

"step" is the mean decode step over all steps, from the engine's own clock. The client shares the machine with what it
measures, in both of the last two: what separates them is what the process boundary changes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.figures import Figure, figures_table, markdown
from benchmarks.workload import prompt

ARRANGEMENTS = ("offline", "thread", "own process")


@dataclass(frozen=True)
class Turn:
    """One arrangement answered all requests once."""

    seconds: float
    step_seconds: float  # mean
    loop_share: float  # of the wall time that the event loop's thread computed; 0 where there is none


@dataclass
class Taken:
    """One arrangement at one size."""

    tokens: int  # of a turn
    turns: list[Turn] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second, median."""
        return statistics.median(self.tokens / turn.seconds for turn in self.turns)

    @property
    def step(self) -> float:
        """Seconds, median of the means."""
        return statistics.median(turn.step_seconds for turn in self.turns)


class Offline:
    """An engine process that answers when told to."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def turn(self, streams: int, tokens: int) -> Turn:
        """All requests at once."""
        assert self._process.stdin is not None
        print(streams, tokens, file=self._process.stdin, flush=True)
        return Turn(**self._read())

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=30)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the offline engine died; its traceback is above")
        return json.loads(line)


class Online:
    """A server process with a metrics page."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("ready "):
            raise SystemExit("the server did not get ready; what it said is above")
        facts = dict(pair.split("=", 1) for pair in line.split()[1:])
        self._address, self._metrics = facts["grpc"], facts["metrics"]

    def turn(self, streams: int, tokens: int) -> Turn:
        """All streams open at once; the last token's arrival ends the turn."""
        before, cpu = self._steps(), self._loop_seconds()
        seconds = asyncio.run(read_all(self._address, streams, tokens))
        after = self._steps()
        step = (after[0] - before[0]) / max(after[1] - before[1], 1)
        return Turn(seconds, step, (self._loop_seconds() - cpu) / seconds)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.communicate(timeout=60)

    def _steps(self) -> tuple[float, float]:
        """Sum of all steps' seconds, and their number."""
        with urllib.request.urlopen(self._metrics, timeout=30) as page:
            lines = page.read().decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return float(values["loraplex_step_seconds_sum"]), float(values["loraplex_step_seconds_count"])

    def _loop_seconds(self) -> float:
        """CPU seconds of the process's first thread, on which the event loop runs."""
        pid = self._process.pid
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def read_all(address: str, streams: int, tokens: int) -> float:
    """Seconds from the first request to the last token of `streams` streams that are all open at once."""
    from server.client import AsyncClient

    async def one(client: AsyncClient, number: int) -> None:
        count = 0
        async with await client.stream(prompt(number), max_new_tokens=tokens, ignore_eos=True) as stream:
            async for chunk in stream:
                count += len(chunk.token_ids)
        if count != tokens:
            raise SystemExit(f"a stream gave {count} tokens, not {tokens}")

    async with AsyncClient(address) as client:
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(streams):
                group.create_task(one(client, number))
        return time.perf_counter() - started


def serve_offline(base: Path, max_sequences: int, threads: int) -> None:
    """The offline process: reads "STREAMS TOKENS" lines, answers with JSON."""
    from transformers.utils import logging as transformers_logging

    from benchmarks.apart import settings
    from benchmarks.population import Registered
    from benchmarks.watching import Watch, timed
    from server.engine.engine import Engine

    transformers_logging.disable_progress_bar()
    config, watch = settings(base, max_sequences, threads), Watch()
    engine = Engine.build(config.model, config.engine, Registered(()).fetch, watch)
    print("{}", flush=True)
    for line in sys.stdin:
        streams, tokens = map(int, line.split())
        since = len(watch.steps)
        rate = timed(engine, [[]] * streams, tokens)
        taken = [step.seconds for step in watch.steps[since:]]
        seconds = streams * tokens / rate
        print(json.dumps(Turn(seconds, statistics.mean(taken), 0.0).__dict__), flush=True)
    engine.close()


def measure(base: Path, max_sequences: int, options: argparse.Namespace) -> dict[str, Taken]:
    """The three arrangements in turn; the first turn does not count."""
    shared = ["--base", str(base), "--max-sequences", str(max_sequences), "--threads", str(options.threads)]
    serve = [
        "-c",
        "from hub.cli import main; main()",
        "serve",
        *shared,
        "--listen",
        "127.0.0.1:0",
        "--metrics-port",
        "0",
    ]
    serve += ["--quantize", "none", "--kv-memory", "256MiB", "--adapter-memory", "64MiB", "--hub", str(options.hub)]
    running: dict[str, Offline | Online] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `timeout` must not leave servers behind
    try:
        running["offline"] = Offline(["-m", "benchmarks.streams", "--inside", *shared])
        running["thread"] = Online(serve)
        running["own process"] = Online(["-m", "benchmarks.apart", *shared])
        taken = {name: Taken(options.streams * options.tokens) for name in running}
        for turn in range(options.rounds + 1):
            for name, each in running.items():
                result = each.turn(options.streams, options.tokens)
                if turn:
                    taken[name].turns.append(result)
            print(f"{max_sequences} in a step, round {turn} of {options.rounds}", file=sys.stderr)
    finally:
        for each in running.values():
            each.close()
    return taken


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=256, help="open at once (default 256)")
    parser.add_argument("--max-sequences", type=int, nargs="+", default=[64, 256], help="in one step (default 64 256)")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of a stream (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--base", type=Path, default=None, help="a transformers directory (default: smollm2-135m)")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # be the offline process
    options = parser.parse_args(arguments)
    base = options.base
    if base is None:
        from server.model.builtin import smollm2_135m

        base = smollm2_135m()
    if options.inside:
        serve_offline(base, options.max_sequences[0], options.threads)
        return
    import tempfile

    from benchmarks.mix16 import machine
    from benchmarks.report import write_json

    rows, figures = [], []
    with tempfile.TemporaryDirectory(prefix="loraplex-streams-") as hub:
        options.hub = hub
        for size in options.max_sequences:
            taken = measure(base, size, options)
            alone = taken["offline"]
            rows += [
                (
                    f"{size} in a step, {name}",
                    f"{each.rate:.0f}",
                    f"{each.rate / alone.rate:.2f}",
                    f"{1000 * each.step:.1f}",
                    f"{each.step / alone.step:.2f}",
                    f"{statistics.median(turn.loop_share for turn in each.turns):.0%}" if name != "offline" else "–",
                )
                for name, each in taken.items()
            ]
            thread, apart = taken["thread"], taken["own process"]
            figures += [
                Figure(f"{size} in a step: thread / offline, tokens/s", thread.rate / alone.rate),
                Figure(f"{size} in a step: thread / own process, tokens/s", thread.rate / apart.rate),
            ]
    where = machine(options.threads)
    print(f"{options.streams} open streams of {options.tokens} tokens; {options.rounds} rounds; {where}; bf16\n")
    head = ("arrangement", "tokens/s", "of offline", "step ms", "of offline", "event loop's share of a core")
    print(markdown(head, rows))
    print(f"\n{figures_table(figures)}")
    if options.json:
        write_json(options.json, where, figures)


if __name__ == "__main__":
    main()
