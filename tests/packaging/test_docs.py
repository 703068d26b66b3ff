"""What the written pages say to type exists: verbs, flags, links, calls, alerts."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import click
import pytest
import yaml
from click.core import ParameterSource
from google.protobuf import json_format

from hub.cli import group
from protos.loraplex.v1 import inference_pb2

ROOT = Path(__file__).parents[2]
MADE_BY_HAND = [
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "deploy" / "README.md")
    if path.name not in ("cli.md", "metrics.md", "files.md")
]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def hub_calls(text: str) -> Iterator[list[str]]:
    """The `hub …` command lines of a page's shell blocks, as words."""
    for block in fenced(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("hub "):
                words = shlex.split(line, comments=True)[1:]
                yield list(takewhile(lambda word: word not in ("&", "&&", "|", ">", "2>"), words))


def inline_hub_calls(text: str) -> Iterator[list[str]]:
    """What stands as `hub …` in a page's sentences and tables, as words."""
    sentences = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for call in re.findall(r"`hub\s([^`]+)`", sentences):
        words = shlex.split(call.replace("\\|", "|"))
        if not words[0].isupper():  # `hub VERB --help`
            yield words


@dataclass(frozen=True)
class Call:
    """A command line as the verb's own parser takes it apart; values are not looked at."""

    given: frozenset[click.Parameter]
    lacks: frozenset[click.Parameter]  # what has to be given and is not
    too_much: tuple[str, ...]

    @classmethod
    def parse(cls, words: list[str]) -> Call:
        """Raises click's errors, and AssertionError where there is no such verb."""
        command, context = group, click.Context(group, info_name="hub")
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(context, words[0])
            assert found is not None, f"there is no verb {words[0]!r}"
            command, words = found, words[1:]
            context = click.Context(command, context, info_name=command.name)
        values, left, _ = command.make_parser(context).parse_args(list(words))
        told = [each.consume_value(context, values)[1] is ParameterSource.COMMANDLINE for each in command.params]
        given = frozenset(each for each, is_told in zip(command.params, told, strict=True) if is_told)
        return cls(given, frozenset(each for each in command.params if each.required) - given, tuple(left))


@pytest.mark.parametrize("page", MADE_BY_HAND, ids=named)
def test_command_lines_are_ones_that_verbs_take(page: Path) -> None:
    for words in hub_calls(page.read_text(encoding="utf-8")):
        call = Call.parse(words)
        assert (call.too_much, call.lacks) == ((), frozenset()), words


@pytest.mark.parametrize("page", [*MADE_BY_HAND, ROOT / "docs" / "cli.md"], ids=named)
def test_commands_in_sentences_are_ones_that_verbs_take(page: Path) -> None:
    """A verb may be named alone or with a flag (`hub eval --record`); with one argument all of them are given."""
    for words in inline_hub_calls(page.read_text(encoding="utf-8")):
        try:
            call = Call.parse(words)
        except click.BadOptionUsage:  # the flag is meant, and its value left out
            call = Call.parse([*words, "VALUE"])
        assert call.too_much == (), words
        if any(isinstance(each, click.Argument) for each in call.given):
            assert not [each for each in call.lacks if isinstance(each, click.Argument)], words


@pytest.mark.parametrize("page", MADE_BY_HAND, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link.partition("#")[0]).exists()]

    assert missing == []


@pytest.mark.parametrize("page", MADE_BY_HAND, ids=named)
def test_named_source_files_exist(page: Path) -> None:
    if page.parent.name == "decisions":
        return  # notes of their day
    names = re.findall(r"`((?:hub|server|training|benchmarks|deploy|tests|protos)/[\w./-]+)`", page.read_text("utf-8"))

    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_call_from_python_is_one_the_client_has(monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = fenced(README, "python")
    from server import client
    from server.client_request import generate_request
    from training.tasks import sentiment

    asked: list[inference_pb2.GenerateRequest] = []

    class Answered:
        text = "mixed"

    def generate(self: client.Client, prompt: client.Prompt, adapters: client.Adapters = None) -> Answered:
        asked.append(generate_request(prompt, adapters, {}))
        return Answered()

    monkeypatch.setattr(client.Client, "generate", generate)
    exec(compile(snippet, "README.md", "exec"), {})

    assert asked[0].adapters[0].ref == "team/sentiment:prod"
    system, user = asked[0].chat.messages
    assert (system.role, system.content, user.role) == ("system", sentiment.INSTRUCTION, "user")
    assert user.content.startswith("Text: ") and user.content.endswith("\nSentiment:")


def test_the_call_from_grpcurl_is_a_message_of_the_wire() -> None:
    (call,) = [block for block in fenced(README, "sh") if block.startswith("grpcurl")]
    words = shlex.split(call)

    message = json_format.ParseDict(json.loads(words[words.index("-d") + 1]), inference_pb2.GenerateRequest())

    assert [selection.ref for selection in message.adapters] == ["team/summary@1", "team/iam:prod"]
    service, _, method = words[-1].partition("/")
    assert method in inference_pb2.DESCRIPTOR.services_by_name[service.rpartition(".")[2]].methods_by_name


def test_every_alert_is_explained() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "rules" / "loraplex.yml").read_text(encoding="utf-8"))
    alerts = {rule["alert"] for each in rules["groups"] for rule in each["rules"] if "alert" in rule}

    explained = re.findall(
        r"^\| `(Loraplex\w+)` \|", (ROOT / "docs" / "deploy.md").read_text("utf-8"), flags=re.MULTILINE
    )

    assert set(explained) == alerts


def test_figures_beside_other_engines_are_those_of_the_results() -> None:
    results = (ROOT / "benchmarks" / "results" / "mix16.md").read_text(encoding="utf-8")
    guide = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (transformers|vLLM|Loraplex, bf16)[^|]*\|((?: [\d%]+ \|){6})$", results, flags=re.MULTILINE)
    rows = rows[:6]  # its first two tables: earlier runs follow
    assert [name for name, _ in rows] == 2 * ["transformers", "vLLM", "Loraplex, bf16"]
    assert [name for name, cells in rows if cells not in guide] == []
    mix16 = [cells.split("|")[3].strip() for _, cells in rows]
    for peft, vllm, ours in (mix16[:3], mix16[3:]):
        assert f"Loraplex {ours}, vLLM {vllm}, PEFT {peft}" in " ".join(README.split())
