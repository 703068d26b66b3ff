"""Every benchmark in sequence, each in a process of its own; the tables go to benchmarks/results/.

    python -m benchmarks [--only mix16 memory] [--out benchmarks/results] [--threads 2]     (or `make bench`)

About twenty minutes on two quiet cores. Environment: LORAPLEX_VLLM_PYTHON is the python of an environment with vLLM's
CPU build (`benchmarks/vllm_contender.py` says how to make it); with it mix16 compares with vLLM too. For each benchmark
NAME.md holds the command, the moment, the commit and what was printed, NAME.json the numbers. Exit code 1 when one
failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Benchmark:
    """One module and what it is run with."""

    name: str
    arguments: tuple[str, ...] = ()
    writes_json: bool = True

    def command(self, threads: int, vllm: str | None) -> list[str]:
        """As a person would run it, without the interpreter."""
        command = ["-m", f"benchmarks.{self.name}", "--threads", str(threads), *self.arguments]
        return [*command, "--vllm", vllm] if self.name == "mix16" and vllm else command


BENCHMARKS = (
    Benchmark("mix16"),
    Benchmark("registered"),
    Benchmark("fairness"),
    Benchmark("streams"),
    Benchmark("bookkeeping"),
    Benchmark("memory"),
    Benchmark("deterministic", writes_json=False),
)


def page(command: Sequence[str], printed: str, when: str, commit: str) -> str:
    """NAME.md."""
    return f"`python {' '.join(command)}`, {when}, commit {commit}\n\n{printed.strip()}\n"


def commit() -> str:
    """The tree that is measured, marked where it was changed since."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; the exit code."""
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for benchmark in BENCHMARKS:
        if benchmark.name not in options.only:
            continue
        command = benchmark.command(options.threads, os.environ.get("LORAPLEX_VLLM_PYTHON"))
        numbers = ["--json", str(options.out.resolve() / f"{benchmark.name}.json")] if benchmark.writes_json else []
        print(f"== {benchmark.name}", flush=True)
        started, when = time.monotonic(), datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        done = subprocess.run(
            [sys.executable, *command, *numbers], stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT
        )
        print(f"{done.stdout}\n-- {benchmark.name}: {time.monotonic() - started:.0f} s", flush=True)
        if done.returncode:
            failed.append(benchmark.name)
            continue
        text = page(command, done.stdout, when, commit())
        (options.out / f"{benchmark.name}.md").write_text(text, encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
