"""A thousand registered adapters and room for 32: what the crowd costs those who are served.

    python -m benchmarks.registered [--parts zipf steps first-token] [--rounds 4] [--turns 12] [--windows 24]

SmolLM2-135M in bfloat16, adapters of rank 16 on every linear layer, an arena for 32 of them, prefix cache off. All
figures of one run, its cases in turn (A B A B, or up and down), after a turn that is not counted:

* zipf: tokens/s of 64 prompts whose adapters are drawn from 1,000 (zipf 1.2, other draws each round), at most 16 at
  once, against mix16 (16 prompts, 16 resident adapters) on an engine of its own.
* steps: the median decode step of 16 sequences with 16 resident adapters while 1, 10, 100 and 1,000 other adapters are
  known to the directory and parsed in host memory (those have rank 2, to fit). Four engines take short turns, and each
  of them has each number once (a Latin square): neither a slow minute nor a place in memory is taken for the crowd's.
* first-token: p99 time to first token of callers on resident adapters, each with an adapter of its own and always one
  request in flight, while nothing loads and while one adapter loads (and another is evicted) after the other without a
  pause. Short windows take turns, so that a slow minute of the machine falls on both; the middle 95 % of a ratio is
  taken over draws of the requests (bootstrap).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.figures import Figure, figures_table, markdown, percentile
from benchmarks.mix16 import machine
from benchmarks.population import Population, Registered, ask, resolved, zipf
from benchmarks.report import write_json
from benchmarks.watching import Watch, answered, timed
from benchmarks.workload import RANK, write_adapters
from hub.refs import AdapterRef
from server.adapters.arena import row_bytes
from server.adapters.directory import AdapterDirectory
from server.config import MIB, EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.request import AdapterUse
from server.model.base import load_base

SEQUENCES = 16
ROOM = 32  # adapters of rank 16 that the arena holds
CALLERS = 8
BEGIN = 0.5  # seconds in which they begin, or the first step of a window, with all their prompts, would be its p99
COUNTS = (1, 10, 100, 1000)
PARTS = ("zipf", "steps", "first-token")
QUIET, LOADING = "nothing loads", "loads without a pause"


class Bench:
    """One engine, what it tells, and the adapters it can ask for."""

    def __init__(self, base: Path, threads: int, hub: Registered) -> None:
        self.watch = Watch()
        self.hub = hub
        loaded = load_base(ModelConfig(base=str(base), quantization="none", threads=threads))
        shapes = {site: (linear.out_features, linear.in_features) for site, linear in loaded.linears().items()}
        limits = EngineLimits(
            max_sequences=SEQUENCES,
            prefix_cache=False,
            kv_memory_bytes=128 * MIB,
            adapter_memory_bytes=ROOM * RANK * row_bytes(shapes, loaded.dtype),
            host_adapter_memory_bytes=4096 * MIB,
        )
        self.engine = Engine(loaded, limits, hub.fetch, self.watch)
        self.engine.start()

    def load(self, use: AdapterUse) -> None:
        """Bring an adapter to the device."""
        self.engine.adapters.load(use.digest, use.version)


# -- tokens a second -------------------------------------------------------------------------------------------------


def throughput(
    mix: Bench, crowd: Bench, few: Population, many: Population, options: argparse.Namespace
) -> tuple[str, list[Figure]]:
    """mix16 and zipf16 in turn."""
    mixed = [[few.use(n)] for n in range(SEQUENCES)]
    rates: dict[str, list[float]] = {"mix16": [], "zipf16": []}
    loads, distinct = [], []
    for turn in range(options.rounds + 1):
        mix_rate = timed(mix.engine, mixed, options.tokens)
        drawn = zipf(many.count, 1.2, options.requests, seed=turn)
        before = crowd.watch.loads["device"]
        zipf_rate = timed(crowd.engine, [[many.use(n)] for n in drawn], options.tokens)
        if turn:
            rates["mix16"].append(mix_rate)
            rates["zipf16"].append(zipf_rate)
            loads.append(crowd.watch.loads["device"] - before)
            distinct.append(len(set(drawn)))
        progress(f"tokens/s, round {turn} of {options.rounds}")
    medians = {name: statistics.median(each) for name, each in rates.items()}
    table = markdown(
        ("tokens/s", "median", "rounds", "adapters in a round", "of those loaded"),
        [
            ("mix16", f"{medians['mix16']:.0f}", shown(rates["mix16"]), str(SEQUENCES), "0"),
            ("zipf16", f"{medians['zipf16']:.0f}", shown(rates["zipf16"]), shown(distinct), shown(loads)),
        ],
    )
    return table, [Figure("zipf16 / mix16, tokens/s", medians["zipf16"] / medians["mix16"], least=0.8)]


# -- a step ----------------------------------------------------------------------------------------------------------


class Crowded:
    """An engine whose 16 callers answer beside a number of other registered adapters."""

    def __init__(self, base: Path, few: Population, others: Population, hub: Registered, threads: int) -> None:
        self.bench = Bench(base, threads, hub)
        self._others = others
        self._directory = AdapterDirectory(hub)
        self._held = 0
        self._uses = [[self._resolve(few, n)] for n in range(SEQUENCES)]
        for (use,) in self._uses:
            self.bench.load(use)
            self.bench.engine.adapters.pin(use.digest)

    def _resolve(self, population: Population, number: int) -> AdapterUse:
        return resolved(self._directory.resolve(AdapterRef.parse(population.use(number).name)))

    def register(self, count: int) -> None:
        """Have `count` others known and parsed in host memory, no more and no less."""
        for number in range(self._held, count):
            self.bench.load(self._resolve(self._others, number))
        for number in range(count, self._held):
            self.bench.engine.adapters.unload(self._others.digest(number))
        self._held = count
        known = len(self.bench.engine.adapters.list())
        if known != SEQUENCES + count:
            raise SystemExit(f"{known} adapters are held, not {SEQUENCES + count}: host memory is too small")

    def step(self, tokens: int) -> float:
        """The median decode step in seconds of 16 requests for `tokens` tokens each."""
        since = len(self.bench.watch.steps)
        timed(self.bench.engine, self._uses, tokens)
        return statistics.median(self.bench.watch.decode_steps(SEQUENCES, since))

    def close(self) -> None:
        """Stop the engine."""
        self._directory.close()
        self.bench.engine.close()


def steps(
    base: Path, few: Population, others: Population, hub: Registered, options: argparse.Namespace
) -> tuple[str, list[Figure]]:
    """One engine for each count, in short turns; and each engine with each count, for no two lie in memory alike."""
    engines = [Crowded(base, few, others, hub, options.threads) for _ in COUNTS]
    taken: dict[int, list[float]] = {count: [] for count in COUNTS}
    for placing in range(len(COUNTS)):
        placed = [(COUNTS[(place + placing) % len(COUNTS)], engine) for place, engine in enumerate(engines)]
        for count, engine in placed:
            engine.register(count)
            engine.step(options.tokens)  # settles caches after the loading
        for turn in range(options.turns):
            for count, engine in placed if turn % 2 else reversed(placed):
                taken[count].append(engine.step(options.tokens // 2))
        progress(f"steps, placing {placing + 1} of {len(COUNTS)}")
    for engine in engines:
        engine.close()
    alone = taken[COUNTS[0]]
    changes = {count: [seconds / one for seconds, one in zip(taken[count], alone, strict=True)] for count in COUNTS}
    medians = {count: statistics.median(each) for count, each in changes.items()}
    table = markdown(
        ("registered beside the 16 that answer", "decode step ms", "of the same turn's with 1", "middle 95 %"),
        [
            (
                str(count),
                f"{1000 * statistics.median(taken[count]):.2f}",
                f"{medians[count]:.3f}",
                "–" if count == COUNTS[0] else "{:.3f} … {:.3f}".format(*spread(statistics.median, changes[count])),
            )
            for count in COUNTS
        ],
    )
    worst = max(abs(median - 1) for median in medians.values())
    return table, [Figure("decode step, 1 → 1,000 registered: largest change", worst, most=0.05)]


def spread(statistic: Callable[..., float], *samples: Sequence[float], draws: int = 1000) -> tuple[float, float]:
    """The middle 95 % of `statistic(*samples)` over draws of every sample with replacement."""
    drawn = random.Random(0)
    found = sorted(statistic(*(drawn.choices(each, k=len(each)) for each in samples)) for _ in range(draws))
    return found[int(0.025 * draws)], found[int(0.975 * draws)]


# -- the first token -------------------------------------------------------------------------------------------------


def first_tokens(crowd: Bench, many: Population, options: argparse.Namespace) -> tuple[str, list[Figure]]:
    """Steady callers, in turn without loads and with as many as go."""
    seconds: dict[str, list[float]] = {QUIET: [], LOADING: []}
    loads: list[float] = []
    cold = iter(range(CALLERS, 10**9))
    for turn in range(options.windows + 1):
        wait = options.seconds if turn else 1.0
        for name in (QUIET, LOADING) if turn % 2 else (LOADING, QUIET):
            with loading(crowd, many, cold if name == LOADING else iter(())) as loaded:
                found = steady(crowd, many, wait, seed=turn)
            if turn:
                seconds[name] += found
                if name == LOADING:
                    loads.append(len(loaded) / wait)
        progress(f"first tokens, window {turn} of {options.windows}")
    p99 = {name: percentile(each, 0.99) for name, each in seconds.items()}
    table = markdown(
        ("beside steady callers", "loads/s", "requests", "p50 ms", "p99 ms", "p99 of nothing's, middle 95 %"),
        [
            (
                name,
                "0" if name == QUIET else f"{statistics.mean(loads):.1f}",
                str(len(each)),
                f"{1000 * percentile(each, 0.5):.0f}",
                f"{1000 * p99[name]:.0f}",
                "–" if name == QUIET else "{:.2f} … {:.2f}".format(*spread(p99_ratio, each, seconds[QUIET])),
            )
            for name, each in seconds.items()
        ],
    )
    return table, [Figure(f"p99 first token, {LOADING} / {QUIET}", p99[LOADING] / p99[QUIET], most=1.3)]


def p99_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """p99 of the values over that of the others."""
    return percentile(values, 0.99) / percentile(others, 0.99)


def steady(crowd: Bench, many: Population, seconds: float, seed: int) -> list[float]:
    """Seconds to first token of every request that `CALLERS` callers sent, one after the other each."""
    found: list[float] = []
    failed: list[BaseException] = []
    end = time.monotonic() + seconds

    def call(caller: int) -> None:
        lengths = random.Random(seed * CALLERS + caller)  # unlike, or all would begin and end in the same steps
        try:
            time.sleep(lengths.uniform(0, BEGIN))
            while time.monotonic() < end:
                request = ask(crowd.engine, caller, [many.use(caller)], lengths.randint(4, 12))
                answered(crowd.engine, request)
                found.append(crowd.watch.first_tokens[request.id])
        except BaseException as error:
            failed.append(error)

    for caller in range(CALLERS):
        crowd.load(many.use(caller))
    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


@contextmanager
def loading(crowd: Bench, many: Population, cold: Iterator[int]) -> Iterator[list[int]]:
    """Meanwhile load one adapter after the other that is not on the device, as long as `cold` gives a number; yields
    those loaded."""
    loaded: list[int] = []
    stop = threading.Event()

    def load() -> None:
        for drawn in cold:
            if stop.is_set():
                return
            number = CALLERS + drawn % (many.count - CALLERS)
            # Forgotten first, so that each load reads, checks and converts the files.
            crowd.engine.adapters.unload(many.digest(number))
            crowd.load(many.use(number))
            loaded.append(number)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        yield loaded
    finally:
        stop.set()
        thread.join()


# -- the run ---------------------------------------------------------------------------------------------------------


def shown(values: Sequence[float]) -> str:
    """One value a round."""
    return " ".join(f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}" for value in values)


def progress(line: str) -> None:
    """For who watches."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=4, help="counted rounds (default 4)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a prompt (default 32)")
    parser.add_argument("--requests", type=int, default=64, help="prompts of zipf16 (default 64)")
    parser.add_argument("--turns", type=int, default=12, help="of steps in each of four placings (default 12)")
    parser.add_argument("--windows", type=int, default=24, help="of each first-token case (default 24)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a window (default 4)")
    parser.add_argument("--files", type=int, default=40, help="distinct files behind the 1,000 adapters (default 40)")
    parser.add_argument("--base", type=Path, default=None, help="a transformers directory (default: smollm2-135m)")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    base = options.base
    if base is None:
        from server.model.builtin import smollm2_135m

        base = smollm2_135m()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="loraplex-registered-") as directory:
        root = Path(directory)
        files = write_adapters(base, root / "wide", options.files)
        many = Population(files, 1000)
        few = Population(files[:SEQUENCES], SEQUENCES, first=10_000)
        others = Population(write_adapters(base, root / "narrow", 8, rank=2), max(COUNTS), first=20_000)
        hub = Registered((many, few, others))
        tables: dict[str, tuple[str, list[Figure]]] = {}
        if "zipf" in options.parts or "first-token" in options.parts:
            crowd = Bench(base, options.threads, hub)
        if "zipf" in options.parts:
            mix = Bench(base, options.threads, hub)
            tables["zipf"] = throughput(mix, crowd, few, many, options)
            mix.engine.close()
        if "first-token" in options.parts:
            tables["first-token"] = first_tokens(crowd, many, options)
        if "zipf" in options.parts or "first-token" in options.parts:
            crowd.engine.close()
        if "steps" in options.parts:
            tables["steps"] = steps(base, few, others, hub, options)
    where = machine(options.threads)
    print(f"1,000 registered adapters, room for {ROOM}; {options.rounds} rounds; {where}; bf16\n")
    for part in options.parts:
        print(f"{tables[part][0]}\n")
    figures = [figure for part in options.parts for figure in tables[part][1]]
    print(figures_table(figures))
    print(f"\ntaken in {time.monotonic() - started:.0f} s")
    if options.json:
        write_json(options.json, where, figures)


if __name__ == "__main__":
    main()
