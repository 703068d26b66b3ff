"""What is wrong with a chat JSONL file, with counts and examples, and the file without it.

The checks run one after the other, each on what the ones before it left, so that no example is counted twice: lines
that are no conversation, or none that the base takes, blank messages, answers of the wrong kind, duplicates,
contradictions, near duplicates, examples that the evaluation file has too. Whatever is a fault can be dropped; advice
is for a person to weigh.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from training.build import card_beside
from training.data import Example, decode_lines, digest_of, parse_line
from training.data_report import Finding, Line, Report, Sample
from training.errors import DataInvalid, TemplateUnsupported
from training.near_duplicates import Pair, near_copies, near_matches
from training.tasks import Answers
from training.tasks.policy import parse_json
from training.token_counter import CountTokens

Progress = Callable[[str, int, int], object]  # which check, examples done, of how many

SIMILARITY: Final = 0.9
LONG_FORM_TOKENS: Final = 20  # shorter answers of a long-form task teach the model to be curt
HOLD_OUT: Final = (0.05, 0.10)

_LABEL_ROWS: Final = 4  # that share an answer make it a label
_LABEL_SHARE: Final = 0.9  # of all rows have a label, where labels are wanted: the rest may be typing errors
_LABEL_WORDS: Final = 4
_RARE: Final = 0.1  # of another label's rows: one so rare that looks like it may be it, misspelled
_COMMONEST: Final = 200  # labels that rare ones are compared with, so that thousands of labels take seconds
_LONG_WORDS: Final = 60  # mean of a long-form task
_JSON_SHARE: Final = 0.5
_LARGEST_CLASS: Final = 0.8
_SMALLEST_BY_LARGEST: Final = 0.1


def kind_of(answers: Sequence[str]) -> Answers:
    """A guess at what kind of answers these are: JSON, one of few labels, long-form prose or short text."""
    if not answers:
        return "short"
    if sum(isinstance(parse_json(answer), dict | list) for answer in answers) >= _JSON_SHARE * len(answers):
        return "json"
    words = [len(answer.split()) for answer in answers]
    counts = Counter(answers)
    labels = {answer: count for answer, count in counts.items() if count >= _LABEL_ROWS}
    if len(counts) <= 2 and max(words) <= _LABEL_WORDS:
        return "label"
    if sum(labels.values()) >= _LABEL_SHARE * len(answers) and all(len(x.split()) <= _LABEL_WORDS for x in labels):
        return "label"
    return "long" if sum(words) / len(words) >= _LONG_WORDS else "short"


def check_file(
    path: Path,
    count_tokens: CountTokens,
    *,
    answers: Answers | None = None,
    evaluation: Sequence[Example] | None = None,
    similarity: float = SIMILARITY,
    max_length: int,
    samples: int = 3,
    data: bytes | None = None,
    progress: Progress = lambda check, done, total: None,
) -> Report:
    """Run every check on a file of training examples.

    `answers` None guesses the kind; `evaluation` are the examples that must not occur in the file; `max_length` is
    what the recipe trains on, in tokens; `data` is what the file will hold where it is not written yet; `progress` is
    told of the long checks. Raises `DataInvalid` only when the file cannot be read as text or has no line at all.
    """
    if data is None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataInvalid(f"cannot read {path}: {error.strerror}") from error
    raw = [(number, line) for number, line in enumerate(decode_lines(data, path), 1) if line.strip()]
    if not raw:
        raise DataInvalid(f"{path} holds no examples")
    checks = _Checks(samples)
    lines = checks.schema(raw)
    kind = answers or kind_of(list({line.example.messages: line.example.answer for line in lines}.values()))
    tokens, lines = checks.template(lines, count_tokens)
    kept = checks.blank(lines)
    if kind == "json":
        kept = checks.json(kept)
    if kind == "long":
        kept = checks.short(kept, tokens)
    kept = checks.duplicates(kept)
    kept = checks.contradictions(kept, decisive=kind in ("label", "json"))
    kept = checks.near(kept, similarity, progress)
    if evaluation is not None:
        kept = checks.leakage(kept, evaluation, similarity, progress)
    labels = Counter(line.example.answer for line in kept) if kind == "label" else Counter[str]()
    if kind == "label":
        checks.balance(labels)
        checks.spelling(kept, labels)
    checks.length([line for line in kept if tokens[line.number][0] > max_length], tokens, max_length)
    checks.hold_out(len(kept), len(evaluation) if evaluation is not None else None)
    return Report(
        file=str(path),
        digest=digest_of(data),
        lines=len(raw),
        answers=kind,
        faults=tuple(checks.faults),
        advice=tuple(checks.advice),
        passed=tuple(checks.passed),
        labels=dict(labels.most_common()),
        tokens=tuple(tokens.values()),
        kept=tuple(kept),
    )


class _Checks:
    """Each method is one check: it notes what it finds and returns what is left."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.faults: list[Finding] = []
        self.advice: list[Finding] = []
        self.passed: list[str] = []

    def schema(self, raw: Iterable[tuple[int, str]]) -> list[Line]:
        good, bad = [], []
        for number, text in raw:
            try:
                good.append(Line(number, text, parse_line(text, f"line {number}")))
            except DataInvalid as error:
                bad.append(Sample(number, text, str(error).partition(": ")[2]))
        self._fault("schema", bad, "are no conversation that ends with an answer", "lines")
        return good

    def template(self, lines: list[Line], count_tokens: CountTokens) -> tuple[dict[int, tuple[int, int]], list[Line]]:
        """The tokens of each line too, by its number."""
        tokens, bad, found = {}, [], []
        for line in lines:
            try:
                tokens[line.number] = count_tokens(line.example)
            except TemplateUnsupported as error:
                bad.append(line)
                found.append(Sample(line.number, line.raw, str(error)))
        self._fault("template", found, "are conversations that the base's chat template refuses")
        return tokens, _without(lines, bad)

    def blank(self, lines: list[Line]) -> list[Line]:
        bad = [line for line in lines if any(not message.content.strip() for message in line.example.messages)]
        self._fault("blank", map(_whole, bad), "have a message without any text")
        return _without(lines, bad)

    def json(self, lines: list[Line]) -> list[Line]:
        bad = [line for line in lines if not isinstance(parse_json(line.example.answer), dict | list)]
        found = [Sample(line.number, line.example.answer) for line in bad]
        self._fault("json", found, "have an answer that is no JSON object or list, in a task of JSON answers")
        return _without(lines, bad)

    def short(self, lines: list[Line], tokens: dict[int, tuple[int, int]]) -> list[Line]:
        bad = [line for line in lines if tokens[line.number][1] < LONG_FORM_TOKENS]
        found = [Sample(line.number, line.example.answer) for line in bad]
        self._fault("short", found, f"have an answer of fewer than {LONG_FORM_TOKENS} tokens, in a long-form task")
        return _without(lines, bad)

    def duplicates(self, lines: list[Line]) -> list[Line]:
        first: dict[object, Line] = {}
        bad, found = [], []
        for line in lines:
            seen = first.setdefault(line.example.messages, line)
            if seen is not line:
                bad.append(line)
                found.append(Sample(line.number, line.content, f"the same as line {seen.number}"))
        self._fault("duplicates", found, "are word for word an earlier one")
        return _without(lines, bad)

    def contradictions(self, lines: list[Line], decisive: bool) -> list[Line]:
        by_prompt = defaultdict(list)
        for line in lines:
            by_prompt[line.example.prompt].append(line)
        groups = [group for group in by_prompt.values() if len(group) > 1]
        found = [
            Sample(
                group[0].number,
                group[0].question,
                "answers: " + "; ".join(f"{_cut(line.example.answer, 60)} (line {line.number})" for line in group),
            )
            for group in groups
        ]
        bad = [line for group in groups for line in group]
        if not decisive:
            message = "examples have a question that others answer differently"
            self._advise("contradictions", len(bad), message, found)
            return lines
        self._fault("contradictions", found, "have a question that others answer differently", count=len(bad))
        return _without(lines, bad)

    def near(self, lines: list[Line], similarity: float, progress: Progress) -> list[Line]:
        texts = [line.question for line in lines]
        answers = [" ".join(line.example.answer.split()).casefold() for line in lines]
        instructions = [line.system for line in lines]
        pairs = near_copies(
            texts, similarity, answers, instructions, lambda done: progress("near duplicates", done, len(texts))
        )

        def told(pair: Pair) -> Sample:
            line, other = lines[pair.index], lines[pair.other]
            return Sample(line.number, line.content, f"{pair.similarity:.2f} like line {other.number}: {other.content}")

        same = [pair for pair in pairs if answers[pair.index] == answers[pair.other]]
        message = f"ask what is at least {similarity:g} similar to an earlier one, and have the same answer"
        self._fault("near_duplicates", map(told, same), message)
        # Another answer to nearly the same question is what teaches to tell the two apart, or is a mistake.
        unlike = [
            pair
            for pair in pairs
            if answers[pair.index] != answers[pair.other]
            and lines[pair.index].example.prompt != lines[pair.other].example.prompt
        ]
        message = f"examples ask what is at least {similarity:g} similar to an earlier one, and have another answer"
        self._advise("near_questions", len(unlike), message, map(told, unlike))
        return _without(lines, [lines[pair.index] for pair in same])

    def leakage(
        self, lines: list[Line], evaluation: Sequence[Example], similarity: float, progress: Progress
    ) -> list[Line]:
        others = [Line(number, "", example) for number, example in enumerate(evaluation, 1)]
        questions = {other.question: other for other in reversed(others)}
        # Every answer in a conversation is trained, so any question in it may be one that is evaluated.
        asked = [(line, [question for question in line.questions if question in questions]) for line in lines]
        exact = [line for line, leaked in asked if leaked]
        found = [
            Sample(line.number, leaked[0], f"example {questions[leaked[0]].number} of the evaluation")
            for line, leaked in asked
            if leaked
        ]
        self._fault("leakage", found, "ask word for word what the evaluation asks")
        turns = [(line, question) for line in _without(lines, exact) for question in line.questions]
        nearest: dict[int, tuple[Line, Pair]] = {}  # by line
        asked_all = [question for _, question in turns]
        held = [other.question for other in others]
        for pair in near_matches(asked_all, held, similarity, lambda done: progress("leakage", done, len(turns))):
            line = turns[pair.index][0]
            if line.number not in nearest or pair.similarity > nearest[line.number][1].similarity:
                nearest[line.number] = line, pair
        found = [
            Sample(
                line.number,
                turns[pair.index][1],
                f"{pair.similarity:.2f} like example {pair.other + 1} of the evaluation: {others[pair.other].question}",
            )
            for line, pair in nearest.values()
        ]
        self._fault("near_leakage", found, f"ask what is at least {similarity:g} similar to a question evaluated")
        return _without(lines, [*exact, *(line for line, _ in nearest.values())])

    def balance(self, labels: Counter[str]) -> None:
        ordered = labels.most_common()
        total = sum(labels.values())
        if not ordered:
            return
        (most, largest), (least, smallest) = ordered[0], ordered[-1]
        if len(ordered) == 1:
            self._advise("balance", total, f"examples, all answered {most!r}: there is nothing to tell apart")
        elif largest > _LARGEST_CLASS * total or smallest < _SMALLEST_BY_LARGEST * largest:
            message = (
                f"examples are {least!r} against {largest} of {most!r}: look at macro-F1, not accuracy, or add examples"
            )
            self._advise("balance", smallest, message)
        else:
            self.passed.append("balance")

    def spelling(self, lines: list[Line], labels: Counter[str]) -> None:
        by_letters: dict[str, str] = {}  # the most common label of those that differ in case and spaces alone
        alike: dict[str, str] = {}
        for label, _ in labels.most_common():
            letters = "".join(label.split()).casefold()
            if by_letters.setdefault(letters, label) != label:
                alike[label] = by_letters[letters]
        common = labels.most_common(_COMMONEST)
        for label, count in labels.items():
            if label not in alike:
                others = [other for other, rows in common if count <= _RARE * rows]
                alike.update((label, other) for other in get_close_matches(label, others, n=1, cutoff=0.8))
        found = [
            Sample(line.number, line.content, f"{answer!r} may be {other!r}, as {labels[other]} have it")
            for line in lines
            if (other := alike.get(answer := line.example.answer)) is not None
        ]
        self._advise("spelling", len(found), "examples have a label that looks like another one, misspelled", found)

    def length(self, long: list[Line], tokens: dict[int, tuple[int, int]], max_length: int) -> None:
        found = [Sample(line.number, line.question, f"{tokens[line.number][0]} tokens") for line in long]
        message = f"examples have more than {max_length} tokens, so training leaves them out; see --max-length"
        self._advise("length", len(long), message, found)

    def hold_out(self, train: int, evaluation: int | None) -> None:
        low, high = HOLD_OUT
        if train == 0:
            return
        if evaluation is None:
            few = max(1, round(low * train))
            many = round(high * train)
            message = (f"to {many} " if many > few else "") + (
                f"of {train} examples ({low:.0%} to {high:.0%}) should be held out, before "
                "anything is cleaned or balanced: name that file with --eval, or let `hub train --hold-out` do it"
            )
            self._advise("hold_out", few, message)
            return
        share = evaluation / max(1, train + evaluation)
        if low <= share <= high:
            self.passed.append("hold_out")
        else:
            message = f"examples evaluate, {share:.1%} of all; {low:.0%} to {high:.0%} is usual" + (
                ", and few questions make wide intervals" if share < low else ""
            )
            self._advise("hold_out", evaluation, message)

    def _fault(
        self, check: str, found: Iterable[Sample], message: str, what: str = "examples", count: int | None = None
    ) -> None:
        samples = tuple(found)
        if samples:
            self.faults.append(
                Finding(
                    check,
                    len(samples) if count is None else count,
                    f"{what} {message}",
                    samples[: self._samples],
                )
            )
        else:
            self.passed.append(check)

    def _advise(self, check: str, count: int, message: str, found: Iterable[Sample] = ()) -> None:
        if count:
            self.advice.append(Finding(check, count, message, tuple(found)[: self._samples]))
        else:
            self.passed.append(check)


def known_answers(path: Path) -> str | None:
    """The task that a dataset.json beside the file names for it; None without one."""
    task = card_beside(path).get("task")
    return task if isinstance(task, str) else None


def _without(lines: list[Line], bad: Sequence[Line]) -> list[Line]:
    dropped = {line.number for line in bad}
    return [line for line in lines if line.number not in dropped]


def _whole(line: Line) -> Sample:
    return Sample(line.number, line.raw)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
