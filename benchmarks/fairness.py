"""What a flood on one adapter does to another's time to first token.

    python -m benchmarks.fairness [--flood 400] [--requests 25] [--rounds 3] [--prompt-tokens 16 64] [--json out.json]

A modest caller asks adapter 1 for at most `--rate` prompt tokens a second, less than its share, one request after the
other; in turn with nobody else, and beside a flood that keeps `--flood` requests of adapter 0 waiting all the time. One
engine, prefix cache off, so that every prompt is computed; one table line for each length of the modest caller's
prompt. Printed are seconds and steps to the first token: steps say what the scheduler does, seconds also what it costs
that the flood makes every step fuller (a larger batch takes longer, with any scheduler). "flood tokens/s" are tokens
computed for the flood while the modest caller asks, prompts included.
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
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.figures import Figure, figures_table, markdown, percentile
from benchmarks.mix16 import machine
from benchmarks.population import Population, ask
from benchmarks.report import write_json
from benchmarks.watching import Watch, answered
from benchmarks.workload import write_adapters
from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.outbox import Outbox
from server.engine.request import AdapterUse, Delta

WANTED = 2.0  # times the p99 without the flood
FLOOD_TOKENS = 32  # of an answer in the flood


@dataclass
class Seen:
    """What the modest caller saw in one situation, and how long a step took then."""

    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    others: int = 0  # tokens computed for the flood meanwhile
    wall: float = 0.0  # seconds all of it took

    def p99(self) -> float:
        """Seconds to first token."""
        return percentile(self.seconds, 0.99)


class _Counted(Outbox):
    """An outbox nobody reads; tells once when its answer ended."""

    def __init__(self, ended: threading.Semaphore) -> None:
        super().__init__(lambda: None)
        self._ended = ended

    def put(self, delta: Delta) -> None:
        if delta.last:
            self._ended.release()


@contextmanager
def flood(engine: Engine, use: AdapterUse, waiting: int) -> Iterator[None]:
    """Keep about `waiting` requests in the queue; on leaving, cancel them all and wait until they are gone."""
    ended = threading.Semaphore(0)
    stop = threading.Event()
    sent: deque[str] = deque(maxlen=waiting + engine.limits.max_sequences)  # any older one has ended

    def send() -> None:
        request = ask(engine, len(sent), [use], FLOOD_TOKENS)
        engine.submit(request, _Counted(ended))
        sent.append(request.id)

    def feed() -> None:
        while not stop.is_set():
            if ended.acquire(timeout=0.1):
                send()

    for _ in range(waiting + engine.limits.max_sequences):
        send()
    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield
    finally:
        stop.set()
        feeder.join()
        for each in sent:
            engine.cancel(each)
        while engine.snapshot().running or engine.snapshot().waiting:
            time.sleep(0.01)


def modest(engine: Engine, watch: Watch, use: AdapterUse, options: argparse.Namespace, prompt: int, seen: Seen) -> None:
    """The caller's requests of one new token each, one after the other."""
    pauses = random.Random(options.requests)
    first, started = len(watch.steps), time.monotonic()
    for number in range(options.requests):
        # At times of their own, or each would come just as a step begins.
        time.sleep(pauses.uniform(0, 2 * prompt / options.rate))
        request = ask(engine, number, [use], 1, prompt)
        before = len(watch.steps)
        answered(engine, request)
        seen.seconds.append(watch.first_tokens[request.id])
        seen.steps.append(watch.first_steps[request.id] - before)
    seen.step_seconds += [step.seconds for step in watch.steps[first:]]
    seen.others += sum(step.tokens for step in watch.steps[first:]) - options.requests * prompt
    seen.wall += time.monotonic() - started


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", type=Path, default=None, help="a transformers directory (default: smollm2-135m)")
    parser.add_argument("--flood", type=int, default=400, help="requests kept waiting (default 400)")
    parser.add_argument("--requests", type=int, default=25, help="modest requests in a round (default 25)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each situation (default 3)")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[16, 64], help="of a modest request")
    parser.add_argument("--rate", type=float, default=150.0, help="prompt tokens a second it asks for at most")
    parser.add_argument("--sequences", type=int, default=16, help="sequences in one step")
    parser.add_argument("--max-batch-tokens", type=int, default=EngineLimits.max_batch_tokens, help="in one step")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    base = options.base
    if base is None:
        from server.model.builtin import smollm2_135m

        base = smollm2_135m()
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="loraplex-fairness-") as scratch:
        population = Population(write_adapters(base, Path(scratch), 2), 2)
        limits = EngineLimits(
            prefix_cache=False,
            max_sequences=options.sequences,
            max_batch_tokens=options.max_batch_tokens,
            max_waiting=options.flood + 64,
            max_waiting_per_tenant=options.flood + 64,
        )
        model = ModelConfig(base=str(base), quantization="none", threads=options.threads)
        engine = Engine.build(model, limits, population.fetch, watch)
        loud, quiet = population.use(0), population.use(1)
        for use in (loud, quiet):  # both on the device, everything warm
            for answer in engine.generate([ask(engine, 0, [use], 4)]):
                if answer.error is not None:
                    raise answer.error
        seen = {(prompt, name): Seen() for prompt in options.prompt_tokens for name in ("alone", "beside a flood")}
        for turn in range(options.rounds):
            for prompt in options.prompt_tokens:
                modest(engine, watch, quiet, options, prompt, seen[prompt, "alone"])
                with flood(engine, loud, options.flood):
                    modest(engine, watch, quiet, options, prompt, seen[prompt, "beside a flood"])
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
        engine.close()
    where = machine(options.threads)
    count = options.requests * options.rounds
    print(f"Time to first token of a modest caller, {count} requests a line; {options.flood} waiting; {where}; bf16\n")
    rows = [
        (
            f"{prompt} prompt tokens, {name}",
            f"{1000 * statistics.median(each.seconds):.0f}",
            f"{1000 * each.p99():.0f}",
            f"{percentile(each.steps, 0.99):.0f}",
            f"{1000 * statistics.mean(each.step_seconds):.1f}",
            f"{each.others / each.wall:.0f}",
        )
        for (prompt, name), each in seen.items()
    ]
    print(markdown(("modest caller", "p50 ms", "p99 ms", "p99 steps", "mean step ms", "flood tokens/s"), rows))
    figures = []
    for prompt in options.prompt_tokens:
        alone, beside = seen[prompt, "alone"], seen[prompt, "beside a flood"]
        name = f"{prompt} prompt tokens, beside a flood / alone"
        fuller = statistics.mean(beside.step_seconds) / statistics.mean(alone.step_seconds)
        steps = percentile(beside.steps, 0.99) / percentile(alone.steps, 0.99)
        figures.append(Figure(f"{name}: p99 seconds", beside.p99() / alone.p99(), most=WANTED))
        figures += [Figure(f"{name}: p99 steps", steps), Figure(f"{name}: mean step", fuller)]
    print(f"\n{figures_table(figures)}")
    if options.json:
        write_json(options.json, where, figures)


if __name__ == "__main__":
    main()
