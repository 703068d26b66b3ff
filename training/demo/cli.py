"""`hub demo`: seven chapters, each a real command or a real call, with the numbers of this run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from hub.cli_options import examples
from server.cli import bound_openmp
from training.demo.live import Row, metric, mixed_batch, move_alias
from training.demo.shell import Shell
from training.errors import DemoFailed

_MARKER = ".loraplex-demo"


@dataclass(frozen=True)
class Plan:
    """One adapter of the demo."""

    task: str  # of `hub data build`
    ref: str
    train: int  # examples
    evaluate: int
    headline: str  # the metric that must rise
    epochs: float = 1.0


PLANS = (
    Plan("sentiment", "team/sentiment", train=480, evaluate=120, headline="accuracy"),
    Plan("iam-policy", "team/iam", train=320, evaluate=60, headline="policy_accuracy"),
    Plan("aws-summary", "team/summary", train=240, evaluate=60, headline="rouge_l"),
)
# The second version of the sentiment adapter: other examples, fewer.
SECOND = Plan("sentiment", "team/sentiment", train=160, evaluate=1, headline="accuracy")
BASE = "smollm2-135m"


@click.command(epilog=examples("hub demo\nhub demo --out /tmp/demo --scale 0.1"))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-out"), show_default=True)
@click.option(
    "--scale",
    type=click.FloatRange(0.01, 10),
    default=1.0,
    show_default=True,
    help="Factor on all numbers of examples; below 1 the adapters may not beat the base.",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads.  [default: all cores]")
def demo(out: Path, scale: float, threads: int) -> None:
    """The whole product on the embedded model: data, three adapters, hub, one server, hot swap, merge.

    Takes 12 to 20 minutes on two cores. Everything it makes lies in --out, with a hub of its own; run again, it
    begins anew.
    """
    bound_openmp(threads)
    _fresh(out)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a log has no edge
    started = time.monotonic()
    shell = Shell(console, out / "hub")
    limit = ("--threads", str(threads)) if threads else ()
    _data(shell, out, scale)
    _train(shell, out, limit)
    _push(shell, out)
    _score(shell, out, limit, strict=scale >= 1)
    _serve(shell, out, limit)
    _merge(shell, out, limit)
    _farewell(shell, out, time.monotonic() - started)


def _fresh(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / _MARKER).exists():
            raise click.UsageError(f"{out} is not empty and was not made by this demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()


def _chapter(shell: Shell, number: int, title: str) -> None:
    shell.console.print()
    shell.console.rule(f"[bold]{number}/7  {title}", align="left")


def _data(shell: Shell, out: Path, scale: float) -> None:
    _chapter(shell, 1, "Three data sets from what packages ship")
    for plan in PLANS:
        _build(shell, plan, out / "data" / plan.task, scale, seed=0)
    _build(shell, SECOND, out / "data" / "sentiment-more", scale, seed=1)


def _build(shell: Shell, plan: Plan, target: Path, scale: float, seed: int) -> None:
    sizes = [str(max(8, round(count * scale))) for count in (plan.train, plan.evaluate)]
    built = shell.ask(
        *("data", "build", plan.task, "--out", str(target), "--train", sizes[0], "--eval", sizes[1]),
        *(("--seed", str(seed)) if seed else ()),
    )
    files = ", ".join(f"{facts['examples']} in {name}" for name, facts in built["files"].items())
    shell.say(f"{files}\n  [dim]from {built['provenance']}; {built['licence']}[/dim]")


def _train(shell: Shell, out: Path, limit: Sequence[str]) -> None:
    _chapter(shell, 2, f"One adapter for each, on {BASE}")
    for plan in PLANS:
        _train_one(shell, plan, out / "data" / plan.task, out / plan.task, limit)
    _train_one(shell, SECOND, out / "data" / "sentiment-more", out / "sentiment-second", limit)


def _train_one(shell: Shell, plan: Plan, data: Path, target: Path, limit: Sequence[str]) -> None:
    shell.show(
        *("train", str(data / "train.jsonl"), "--base", BASE, "--recipe", "demo", "--epochs", f"{plan.epochs:g}"),
        *("--out", str(target), *limit),
    )


def _push(shell: Shell, out: Path) -> None:
    _chapter(shell, 3, "Versions in the hub")
    for plan in PLANS:
        _push_one(shell, out / plan.task, plan.ref)
    shell.show("list")


def _push_one(shell: Shell, directory: Path, ref: str) -> None:
    pushed = shell.ask("push", str(directory), ref, "--alias", "prod")
    shell.say(f"{pushed['version']}  [dim]{pushed['digest']}[/dim]")


def _score(shell: Shell, out: Path, limit: Sequence[str], strict: bool) -> None:
    shell.console.print("\nDo they help? Base and adapter on examples that training never saw:")
    for plan in PLANS:
        data = out / "data" / plan.task / "eval.jsonl"
        with shell.console.status(f"scoring {plan.ref} …"):
            scores = shell.ask(
                "eval", "base", f"{plan.ref}:prod", "--task", plan.task, "--data", str(data), *limit, echo=False
            )
        base, adapted = (scores["models"][model][plan.headline] for model in ("base", f"{plan.ref}:prod"))
        metric_name = plan.headline.replace("_", " ")
        shell.say(
            f"{plan.ref:<15} {metric_name:<16} base {base:.3f}  adapter [bold]{adapted:.3f}[/bold]"
            f"  ({scores['data']['examples']} examples)"
        )
        if strict and adapted <= base:
            raise DemoFailed(f"{plan.ref} does not beat the base on its own task: {adapted:.3f} against {base:.3f}")


def _serve(shell: Shell, out: Path, limit: Sequence[str]) -> None:
    _chapter(shell, 4, "One server, one NF4 base, every request its own adapter")
    rows = _questions(out)
    with shell.serving("--base", BASE, "--quantize", "nf4", *limit) as served:
        mixed_batch(shell.console, served["grpc"], rows, max_new_tokens=72)
        distinct = metric(served["metrics"], "loraplex_batch_adapters_max")
        shell.console.print(
            f"  distinct adapters in one step, by the server's own metrics: [bold]{distinct:.0f}[/bold]"
        )
        if distinct < 3:
            raise DemoFailed(f"the server never had more than {distinct:.0f} adapters in one step")

        _chapter(shell, 5, "A new version while a stream runs")
        story = move_alias(
            served["grpc"],
            "team/sentiment:prod",
            [{"role": "user", "content": "Tell me a long story about a lighthouse."}],
            lambda: _push_one(shell, out / "sentiment-second", "team/sentiment"),
        )
        shell.say(
            f"the running stream: {story.stream_tokens} tokens, all from {', '.join(story.stream_versions)}\n"
            f"  the next call, {story.seconds_to_new:.2f} s after the push: [bold]{story.after}[/bold]"
            f"{' (the stream was still running)' if story.stream_was_running else ''}; nothing was restarted"
        )


def _questions(out: Path) -> list[Row]:
    from training.data import read_jsonl

    def prompt(task: str, index: int) -> tuple[str, list[dict[str, str]]]:
        example = read_jsonl(out / "data" / task / "eval.jsonl").examples[index]
        return example.prompt[-1].content, [{"role": m.role, "content": m.content} for m in example.prompt]

    sentiment, other = prompt("sentiment", 0), prompt("sentiment", 1)
    policy, summary = prompt("iam-policy", 0), prompt("aws-summary", 0)
    capital = "What is the capital of France?"
    return [
        Row(capital, [{"role": "user", "content": capital}], []),
        Row(*sentiment, [("team/sentiment:prod", 1.0)]),
        Row(*other, [("team/sentiment:prod", 1.0)]),
        Row(*policy, [("team/iam:prod", 1.0)]),
        Row(*summary, [("team/summary:prod", 1.0)]),
        Row(*summary, [("team/summary@1", 0.7), ("team/iam@1", 0.3)]),
    ]


def _merge(shell: Shell, out: Path, limit: Sequence[str]) -> None:
    from server.client import Client

    _chapter(shell, 6, "A dedicated model: base and adapter merged in full precision")
    merged = out / "merged"
    shell.show("merge", "team/sentiment:prod", "--out", str(merged), *limit)
    row = _questions(out)[1]
    with shell.serving("--base", str(merged), "--quantize", "none", *limit) as served, Client(served["grpc"]) as client:
        answer = client.generate(row.messages, max_new_tokens=16)
        shell.say(f"the merged model, no adapter named: [bold]{answer.text.strip()}[/bold]")


def _farewell(shell: Shell, out: Path, seconds: float) -> None:
    _chapter(shell, 7, "Try next")
    hub = f"--hub {shell.hub}"
    for command in (
        f"hub serve {hub}",
        'hub generate "I waited three weeks and it came broken." --adapter team/sentiment:prod',
        f"hub log team/sentiment {hub}",
        f"hub tag team/sentiment@1 prod {hub}",
    ):
        shell.say(command)
    shell.console.print(f"\nDone in {seconds / 60:.1f} minutes; everything lies in {out}.", style="bold")
