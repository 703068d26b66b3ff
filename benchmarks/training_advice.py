"""What `hub advise` says of a run, and what `hub train` then takes: memory and time, on bases of different shape.

Both are run as a person runs them, on the same file with the same recipe. Memory is the whole process's largest
resident set; time is the processor's in the optimizer loop. The advice is asked for before and after each base's runs,
and the mean of the two times is taken, for a machine's speed drifts; `--said-again` asks twice for the advice on kept
runs, after the planner was changed. Beside SmolLM2-135M two models with random
weights: half a billion parameters with Qwen2's shape (a vocabulary of 151,936, biases), and four wide layers of Llama's
kind. What was learned does not matter here; the planner's numbers were fitted on SmolLM2-135M alone.

    python -m benchmarks.training_advice --threads 1 --rows 160 [--base smollm2-135m …] [--write] [--said-again]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

RESULTS = Path(__file__).parent / "results" / "training_advice"
RECIPE: Final = "demo"
SHAPES: Final = {
    "qwen2-0.5b-shaped": {
        "architecture": "Qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "llama-4-wide-layers": {
        "architecture": "Llama", "vocab_size": 49152, "hidden_size": 1536, "intermediate_size": 4096,
        "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip
BASES: Final = ("smollm2-135m", *SHAPES)


@dataclass(frozen=True)
class Run:
    """One way to train one base: bytes and seconds, said and taken."""

    base: str
    task: str
    rows: int  # examples, of which some are held out
    threads: int
    precision: str
    method: str
    checkpointing: bool
    said_bytes: int
    bytes: int
    said_seconds: tuple[float, float]  # before and after
    seconds: float
    said_again: bool = False  # both times after, by a later planner

    @property
    def memory_error(self) -> float:
        """Of the prediction, relative."""
        return self.said_bytes / self.bytes - 1

    @property
    def time_error(self) -> float:
        """Of the prediction, relative."""
        return statistics.mean(self.said_seconds) / self.seconds - 1


def make_base(name: str, directory: Path) -> str:
    """What --base takes: the name of a base that is here, or a new model of that shape with SmolLM2's tokenizer."""
    if name not in SHAPES:
        return name
    import torch
    import transformers

    from hub.base import locate_base

    shape = dict(SHAPES[name])
    kind = shape.pop("architecture")
    config = getattr(transformers, f"{kind}Config")(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16()
    model.save_pretrained(directory)
    real = locate_base("smollm2-135m").directory
    for file in (*real.glob("*token*"), *real.glob("chat_template*")):
        shutil.copy(file, directory)
    return str(directory)


def said_and_held(arguments: list[str], threads: int) -> tuple[str, int]:
    """What `hub …` said, and the largest resident set of its process in bytes."""
    code = "from hub.cli import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    threaded = [] if arguments[0] == "data" else ["--threads", str(threads)]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments, *threaded, "--json"],
            stdout=said, stderr=subprocess.DEVNULL, env=environment,
        ) as process,
    ):  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{shlex.join(['hub', *arguments])} ended with {process.returncode}")
        said.seek(0)
        return said.read(), usage.ru_maxrss * 1024


def advice(data: Path, common: list[str], threads: int) -> list[dict[str, Any]]:
    """The options of `hub advise`."""
    said, _ = said_and_held(["advise", "--data", str(data), *common], threads)
    options: list[dict[str, Any]] = json.loads(said)["options"]
    return options


def measure(name: str, base: str, data: Path, given: argparse.Namespace, work: Path) -> list[Run]:
    """Every method with and without checkpointing."""
    common = ["--base", base, "--recipe", RECIPE, "--precision", given.precision]
    before, taken = advice(data, common, given.threads), []
    for option in before:
        flags = ["--gradient-checkpointing"] if option["checkpointing"] else []
        rate = ["--learning-rate", "1e-5"]  # whatever is learned, nothing may diverge
        out = work / "out"
        said, size = said_and_held(
            ["train", str(data), "--out", str(out), "--method", option["method"], *flags, *rate, *common],
            given.threads,
        )
        shutil.rmtree(out)
        taken.append((size, json.loads(said)["metrics"]["cpu_seconds"]))
        print(f"{name} {option['method']} {flags}: {size / 1e9:.2f} GB", file=sys.stderr, flush=True)
    return [
        Run(
            name, given.task, given.rows, given.threads, given.precision, was["method"], was["checkpointing"],
            was["memory"], size, (was["seconds"], now["seconds"]), seconds,
        )
        for was, now, (size, seconds) in zip(before, advice(data, common, given.threads), taken, strict=True)
    ]  # fmt: skip


def said_again(runs: list[Run], base: str, data: Path) -> list[Run]:
    """The same runs, of one base and one precision, with what is said of them now, twice."""
    common = ["--base", base, "--recipe", RECIPE, "--precision", runs[0].precision]
    first, second = (advice(data, common, runs[0].threads) for _ in range(2))
    found = {(a["method"], a["checkpointing"]): (a["memory"], (a["seconds"], b["seconds"]))
             for a, b in zip(first, second, strict=True)}  # fmt: skip
    return [
        replace(run, said_bytes=memory, said_seconds=seconds, said_again=True)
        for run in runs
        for memory, seconds in [found[run.method, run.checkpointing]]
    ]


def commands(runs: list[Run]) -> list[str]:
    """Those that the runs are from, and what was asked again."""
    made: dict[str, None] = {}
    for run in runs:
        asked = f"--threads {run.threads} --task {run.task} --rows {run.rows} --precision {run.precision}"
        again = ", then the same with `--said-again`" if run.said_again else ""
        made[f"`python -m benchmarks.training_advice --base {run.base} {asked} --write`{again}"] = None
    return list(made)


def page(runs: list[Run]) -> str:
    """The result file."""
    errors = {what: [abs(getattr(run, f"{what}_error")) for run in runs] for what in ("memory", "time")}
    worst = {what: max(each) for what, each in errors.items()}
    near = {what: sum(error <= 0.15 for error in each) for what, each in errors.items()}
    return "\n".join(
        [
            "# hub advise against hub train",
            "",
            *(f"- {command}" for command in commands(runs)),
            "",
            "Memory: the whole process's largest resident set. Time: the processor's in the optimizer loop; said is",
            "the mean of an advice before and one after all runs of a base, in brackets; with `--said-again` both were",
            "asked for later, of a changed planner.",
            "",
            f"Of {len(runs)} runs {near['memory']} are within 15 % of the memory said and {near['time']} of the time;",
            f"the worst is {worst['memory']:.0%} off in memory and {worst['time']:.0%} in time.",
            "",
            "| base | task | precision | method | checkpointing | said GB | GB | error | said s | s | error |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {run.base} | {run.task} | {run.precision} | {run.method} | {'yes' if run.checkpointing else 'no'} "
                f"| {run.said_bytes / 1e9:.2f} | {run.bytes / 1e9:.2f} | {run.memory_error:+.0%} "
                f"| {statistics.mean(run.said_seconds):.0f} ({run.said_seconds[0]:.0f}, {run.said_seconds[1]:.0f}) "
                f"| {run.seconds:.0f} | {run.time_error:+.0%} |"
                for run in runs
            ),
            "",
        ]
    )


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", action="append", choices=BASES)
    parser.add_argument("--task", default="aws-summary")
    parser.add_argument("--rows", type=int, default=160, help="examples, of which some are held out")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"keep {RESULTS}.json and .md; other runs there stay")
    parser.add_argument("--said-again", action="store_true", help="train nothing: ask for the kept runs' advice again")
    given = parser.parse_args()
    kept = read() if given.write or given.said_again else []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = work / "data" / "train.jsonl"
        built = ["data", "build", given.task, "--out", str(data.parent), "--train", str(given.rows), "--eval", "2"]
        said_and_held(built, given.threads)
        for called in given.base or BASES:
            base = make_base(called, work / called)
            own = [run for run in kept if like(run, called, given)]
            if given.said_again:
                found = said_again(own, base, data) if own else []
            else:
                found = measure(called, base, data, given, work)
            kept = [*(run for run in kept if not like(run, called, given)), *found]
    kept.sort(key=lambda run: BASES.index(run.base))
    print(page(kept))
    if given.write:
        RESULTS.with_suffix(".json").write_text(json.dumps([asdict(run) for run in kept], indent=1) + "\n", "utf-8")
        RESULTS.with_suffix(".md").write_text(page(kept), "utf-8")


def read() -> list[Run]:
    """The runs that are kept, if any."""
    if not RESULTS.with_suffix(".json").is_file():
        return []
    kept = json.loads(RESULTS.with_suffix(".json").read_text("utf-8"))
    return [Run(**{**run, "said_seconds": tuple(run["said_seconds"])}) for run in kept]


def like(run: Run, base: str, given: argparse.Namespace) -> bool:
    """Whether it is one of those that the command asks for."""
    asked = (base, given.task, given.rows, given.threads, given.precision)
    return (run.base, run.task, run.rows, run.threads, run.precision) == asked


if __name__ == "__main__":
    main()
