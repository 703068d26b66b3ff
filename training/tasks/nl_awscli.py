"""`aws` commands from a sentence: the examples in the manual of the AWS command line.

An example there is a paragraph that says what the command does, and the command. The paragraph usually names the
operation ("The following ``get-host`` example shows …"), which would be the answer: that is taken out. Identifiers in
the command that the paragraph does not mention are added to the request as "Values", for nobody could guess them.
All examples of an operation are on one side of the split.
"""

from __future__ import annotations

import re
import shlex
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

from training.data import Example
from training.errors import DataInvalid, SourceUnavailable
from training.metrics import Measured, mean, micro_f1
from training.tasks import Answers, Built, Task
from training.tasks.awscli_command import Command, one_line, parse_command
from training.tasks.packages import source_archive
from training.tasks.split import split_by_group

INSTRUCTION: Final = "Write the AWS CLI command."
_VERSION: Final = "1.46.3"
_SHA256: Final = "9b1146f4159bdf98688d900e2ffd0ac05c18f7fb28641c6b0817e64574e3ce1f"
_MAX_PAGE_BYTES: Final = 1024 * 1024
_MAX_COMMAND_CHARS: Final = 200
_REQUEST_CHARS: Final = (20, 400)  # the least without the values, the most with them
_NOT_ONE_COMMAND: Final = re.compile(r"[|<>;^`&]|\$\(")  # pipes, redirections, placeholders, other shells
# "The following ``get-host`` example", "This command", "The following example of ``x`` command"
_OPENING: Final = re.compile(
    r"^(?:the following|this|the)\s+(?:(?:``[^`]+``|example|command|cli|aws|of|the)\s+)*", re.IGNORECASE
)
_SAYS_WHAT_IT_DOES: Final = re.compile(r"^[a-z]+s\b(?! is\b| are\b)", re.IGNORECASE)  # "shows …", "deletes …"


@dataclass(frozen=True)
class Documented:
    """One example of the manual."""

    request: str
    line: str  # the command as one line
    command: Command


class NlAwscli(Task):
    """Sentence → command."""

    name = "nl-awscli"
    title = "request in words → one AWS CLI command"
    max_new_tokens = 110
    headline = "operation_accuracy"
    answers: Answers = "short"

    def build(self, train: int, evaluation: int, seed: int) -> Built:
        """See `Task.build`; operations of the evaluation never occur in training."""
        sides = split_by_group(
            documented(),
            group=lambda one: f"{one.command.service} {one.command.operation}",
            identity=lambda one: f"{one.request}\n{one.line}",
            train=train,
            evaluation=evaluation,
            seed=seed,
        )
        training, held = (
            tuple(Example.of(system=INSTRUCTION, user=one.request, answer=one.line) for one in side) for side in sides
        )
        return Built(
            training,
            held,
            provenance=f"the manual's examples in the source archive of awscli {_VERSION}; names of the operation "
            "taken out of the descriptions, values that only the command has put in",
            licence="Apache-2.0",
        )

    def check(self, examples: Sequence[Example]) -> None:
        """See `Task.check`: a wanted answer that is no command."""
        for number, example in enumerate(examples, 1):
            if parse_command(example.answer) is None:
                raise DataInvalid(f"the answer of example {number} is no command of the AWS CLI")

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
        """Right service and operation, F1 of the arguments, all of it right, and answers that are a command."""
        wanted = [parse_command(example.answer) for example in examples]
        given = [parse_command(answer) for answer in answers]
        pairs = list(zip(wanted, given, strict=True))
        return {
            "operation_accuracy": mean([g is not None and _operation(w) == _operation(g) for w, g in pairs]),
            "argument_f1": micro_f1([_arguments(w) for w in wanted], [_arguments(g) for g in given]),
            "exact_command": mean([g is not None and w == g for w, g in pairs]),
            "parse_rate": mean([g is not None for g in given]),
        }


TASK = NlAwscli()


@lru_cache(maxsize=1)
def documented() -> tuple[Documented, ...]:
    """Every usable example of the manual, each request once. Raises `SourceUnavailable`."""
    found: dict[str, Documented] = {}
    for page in _pages():
        for one in examples_of(page):
            found.setdefault(one.request.lower(), one)
    return tuple(found.values())


def examples_of(page: str) -> Iterator[Documented]:
    """The examples on a page of the manual (reStructuredText) that are one sentence and one command."""
    blocks = [block.strip("\n") for block in re.split(r"\n[ \t]*\n", page.replace("\r\n", "\n"))]
    for said, block in pairwise(blocks):
        if not block.startswith((" ", "\t")) or not said.rstrip().endswith("::"):
            continue
        line = one_line(block)
        command = parse_command(line)
        if command is None or "\n" in line or len(line) > _MAX_COMMAND_CHARS or _NOT_ONE_COMMAND.search(line):
            continue
        request = _request(said, command, line)
        if request is not None:
            yield Documented(request, line, command)


def _request(said: str, command: Command, line: str) -> str | None:
    text = re.sub(r"\s+", " ", said).strip().removesuffix("::").rstrip(" :.")
    text = _OPENING.sub("", text)
    text = re.sub(r"``([^`]*)``|`([^`<]*?)(?: <[^>]*>)?`_*", lambda match: match.group(1) or match.group(2) or "", text)
    text = text.replace("**", "")
    name = re.escape(command.operation.split()[-1])
    if (
        not _SAYS_WHAT_IT_DOES.match(text)
        or len(text) < _REQUEST_CHARS[0]
        or re.search(rf"\b{name}\b", text, re.IGNORECASE)
        or "::" in text
    ):
        return None
    # The values that the text does not say; parse_command has split the line before.
    words = shlex.split(line)[2 + len(command.operation.split()) :]
    values = [word.partition("=")[2] if word.startswith("--") else word for word in words]
    unsaid = [value for value in dict.fromkeys(values) if value and value.lower() not in text.lower()]
    text = text[0].upper() + text[1:] + "." + (f" Values: {', '.join(unsaid)}." if unsaid else "")
    return text if len(text) <= _REQUEST_CHARS[1] else None


def _pages() -> Iterator[str]:
    with tarfile.open(source_archive("awscli", _VERSION, _SHA256), "r:gz") as archive:
        prefix = f"awscli-{_VERSION}/awscli/examples/"
        pages: dict[str, str] = {}
        for member in archive:  # in the archive's order, for seeking back in a compressed one is slow
            if not (member.isreg() and member.name.startswith(prefix) and member.name.endswith(".rst")):
                continue
            file = archive.extractfile(member)
            if file is None or member.size > _MAX_PAGE_BYTES:
                raise SourceUnavailable(f"{member.name} in the source archive of awscli is no page of bounded size")
            with file:
                pages[member.name] = file.read().decode("utf-8", errors="replace")
        if not pages:
            raise SourceUnavailable(f"the source archive of awscli {_VERSION} has no examples")
        yield from (pages[name] for name in sorted(pages))


def _operation(command: Command | None) -> tuple[str, str] | None:
    return (command.service, command.operation) if command is not None else None


def _arguments(command: Command | None) -> frozenset[tuple[str, str]]:
    return command.arguments if command is not None else frozenset()
