"""What the prefix cache's bookkeeping and its look for NaN cost where nothing is ever found in it.

    python -m benchmarks.bookkeeping [--rounds 5] [--prompt-tokens 256] [--tokens 32] [--threads 2] [--json out.json]

16 requests with 16 adapters on SmolLM2-135M in bfloat16; every prompt is random, so that no prefix repeats and the
cache can only cost. One engine, three states in turn: cache off; on, with the look at finished pages (`finite`)
answering yes unseen; on. Prompt steps hash the pages' keys and look at the pages once a prompt is computed; decode
steps do so only when an answer ends.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.figures import Figure, figures_table, markdown
from benchmarks.mix16 import machine
from benchmarks.population import Population
from benchmarks.report import write_json
from benchmarks.watching import Watch, timed
from benchmarks.workload import write_adapters
from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine

SEQUENCES = 16
STATES = ("off", "on, pages not looked at", "on")


class _Unseen:
    """The pages' memory, but every page counts as finite."""

    def __init__(self, memory: Any) -> None:
        self.scrub = memory.scrub

    def finite(self, pages: Sequence[int]) -> list[bool]:
        """Yes."""
        return [True] * len(pages)


@contextmanager
def state(engine: Engine, name: str) -> Iterator[None]:
    """The engine's scheduler in one of `STATES`, from inside: no setting changes on a running engine."""
    scheduler: Any = engine._scheduler
    memory = scheduler._memory
    scheduler._prefix_cache = name != "off"
    if name == "on, pages not looked at":
        scheduler._memory = _Unseen(memory)
    try:
        yield
    finally:
        scheduler._prefix_cache, scheduler._memory = False, memory


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of each prompt (default 256)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a prompt (default 32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--base", type=Path, default=None, help="a transformers directory (default: smollm2-135m)")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    base = options.base
    if base is None:
        from server.model.builtin import smollm2_135m

        base = smollm2_135m()
    watch = Watch()
    rates: dict[str, list[float]] = {name: [] for name in STATES}
    decodes: dict[str, list[float]] = {name: [] for name in STATES}
    with tempfile.TemporaryDirectory(prefix="loraplex-bookkeeping-") as directory:
        population = Population(write_adapters(base, Path(directory), SEQUENCES), SEQUENCES)
        limits = EngineLimits(max_sequences=SEQUENCES, kv_memory_bytes=256 << 20, adapter_memory_bytes=256 << 20)
        model = ModelConfig(base=str(base), quantization="none", threads=options.threads)
        engine = Engine.build(model, limits, population.fetch, watch)
        uses = [[population.use(n)] for n in range(SEQUENCES)]
        for turn in range(options.rounds + 1):
            for name in STATES if turn % 2 else reversed(STATES):
                since = len(watch.steps)
                with state(engine, name):
                    rate = timed(engine, uses, options.tokens, options.prompt_tokens)
                if turn:
                    rates[name].append(rate)
                    decodes[name].append(statistics.median(watch.decode_steps(SEQUENCES, since)))
            print(f"round {turn} of {options.rounds}", file=sys.stderr)
        if engine.snapshot().prefix_hit_tokens:
            raise SystemExit("a prefix was found: the prompts were not random")
        engine.close()
    where = machine(options.threads)
    print(
        f"Prefix cache without hits, {options.rounds} rounds of 16 x ({options.prompt_tokens} prompt + "
        f"{options.tokens} new tokens); {where}; bf16\n"
    )
    speed = {name: statistics.median(each) for name, each in rates.items()}
    step = {name: statistics.median(each) for name, each in decodes.items()}
    seconds = {name: SEQUENCES * options.tokens / speed[name] for name in STATES}
    rows = [(name, f"{speed[name]:.0f}", f"{1000 * seconds[name]:.0f}", f"{1000 * step[name]:.2f}") for name in STATES]
    print(markdown(("prefix cache", "tokens/s", "all 16 answered ms", "decode step ms"), rows))
    off, unseen, on = (seconds[name] for name in STATES)
    figures = [
        Figure("time to answer, cache on / off", on / off),
        Figure("time to answer, looking at pages / not", on / unseen),
        Figure("decode step, cache on / off", step["on"] / step["off"]),
    ]
    print(f"\n{figures_table(figures)}")
    if options.json:
        write_json(options.json, where, figures)


if __name__ == "__main__":
    main()
