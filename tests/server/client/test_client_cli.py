"""`hub generate` and `hub adapters` as a person or a script sees them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from server.client_cli import adapters, feedback, generate
from server.config import FeedbackConfig
from server.engine.request import Structure
from server.feedback.reading import read_marks
from tests.server.api.fakes import QUIET, FakeEngine, FakeHub, RunningServer


@pytest.fixture
def server() -> Iterator[RunningServer]:
    hub = FakeHub()
    hub.push("team/a")
    hub.push("team/b")
    running = RunningServer(FakeEngine(), hub)
    running.serve()
    yield running
    running.close()


def ask(server: RunningServer, *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(generate, [*arguments, "--server", server.address], input=stdin)


def test_the_answer_goes_to_stdout_and_the_rest_to_stderr(server: RunningServer) -> None:
    result = ask(server, "hello", "-a", "team/a=0.5", "-a", "team/b", "--max-new-tokens", "3")
    assert result.exit_code == 0
    assert result.stdout == "abc\n"
    warnings, footer = result.stderr.splitlines()[:2], result.stderr.splitlines()[-1]
    assert warnings == ["warning: adapter team/a@1 is a fake", "warning: adapter team/b@1 is a fake"]
    assert footer.startswith("team/a@1 × 0.5 + team/b@1 · 3 tokens (length) · first after ")


def test_chat_raw_and_standard_input(server: RunningServer) -> None:
    ask(server, "-", "--max-new-tokens", "1", stdin="from a pipe")
    ask(server, "--raw", "as it is", "--max-new-tokens", "1")
    prompts = ["".join(map(chr, request.prompt)) for request in server.engine.submitted]
    assert prompts == ["<user>from a pipe", "as it is"]


def test_json(server: RunningServer) -> None:
    result = ask(server, "x", "--json", "--max-new-tokens", "2", "-a", "team/a")
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["adapters"][0]["version"]) == ("ab", "team/a@1")
    assert result.stderr == ""


def test_structures_reach_the_engine(server: RunningServer, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "g.lark"
    schema.write_text('{"type": "null"}')
    grammar.write_text('start: "a"')
    for arguments, structure in [
        (("--json-schema", str(schema)), Structure("json_schema", '{"type": "null"}')),
        (("--regex", "a|b"), Structure("regex", "a|b")),
        (("--grammar", str(grammar)), Structure("grammar", 'start: "a"')),
        (("--choice", "a,b c"), Structure("choice", choices=("a", "b c"))),
    ]:
        assert ask(server, "x", "--max-new-tokens", "1", *arguments).exit_code == 0
        assert server.engine.submitted[-1].structure == structure
    both = ask(server, "x", "--regex", "a", "--choice", "a")
    assert both.exit_code == 2
    assert "give one of" in both.stderr


def test_several_answers_are_shown_one_after_the_other(server: RunningServer) -> None:
    result = ask(server, "x", "--n", "2", "--max-new-tokens", "3")
    assert result.stdout == "[0] abc\n[1] abc\n"
    answer = json.loads(ask(server, "x", "--n", "2", "--max-new-tokens", "3", "--json").stdout)
    assert [each["text"] for each in answer["candidates"]] == ["abc", "abc"]


def test_a_weight_that_is_no_number_is_wrong_usage(server: RunningServer) -> None:
    result = ask(server, "x", "-a", "team/a=much")
    assert result.exit_code == 2
    assert "'much' is no weight: write REF=0.5" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--seed", str(2**64)),
        ("--max-new-tokens", "99999999999"),
        ("--n", "99999999999"),
        ("--top-k", "99999999999"),
        ("--regex", "\udcff"),
        ("--system", "\udcff"),
        ("--stop", "\udcff"),
        ("-a", "\udcff"),
        ("--logprobs", "1"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_no_message_can_hold_is_wrong_usage(server: RunningServer, arguments: tuple[str, ...]) -> None:
    assert ask(server, "x", *arguments).exit_code == 2


def test_prompts_that_are_no_text_are_wrong_usage(server: RunningServer) -> None:
    shell = ask(server, "\udcff")
    assert (shell.exit_code, "not UTF-8 text" in shell.stderr) == (2, True)
    pipe = CliRunner().invoke(generate, ["-", "--server", server.address], input=b"\xff\xfe")
    assert (pipe.exit_code, "standard input is not UTF-8 text" in pipe.stderr) == (2, True)


def test_standard_input_is_read_for_one_thing(server: RunningServer) -> None:
    assert ask(server, "x", "--json-schema", "-", "--max-new-tokens", "1", stdin='{"type": "null"}').exit_code == 0
    assert server.engine.submitted[-1].structure == Structure("json_schema", '{"type": "null"}')
    both = ask(server, "-", "--json-schema", "-", stdin="{}")
    assert (both.exit_code, "either PROMPT or the schema" in both.stderr) == (2, True)


def test_how_to_draw_reaches_the_engine(server: RunningServer) -> None:
    ask(server, "x", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--min-p", "0.1", "--seed", "3",
        "--stop", "b", "--stop", "END", "--max-new-tokens", "2")  # fmt: skip
    (request,) = server.engine.submitted
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.seed, request.stopping.stop_strings) == (3, ("b", "END"))
    answer = json.loads(ask(server, "x", "--json", "--logprobs", "2", "--max-new-tokens", "2").stdout)
    assert server.engine.submitted[-1].logprobs == 2
    assert "logprobs" in answer


def test_an_error_midway_stands_on_a_line_of_its_own(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.client import AnswerStream, Chunk, GenerationError

    def breaks_off(stream: AnswerStream) -> Chunk:
        if stream._so_far._texts[0][-1]:
            raise GenerationError("INTERNAL", "ENGINE_FAILED", "the step failed")
        return stream._so_far.add(stream._next_message())

    monkeypatch.setattr(AnswerStream, "__next__", breaks_off)
    result = ask(server, "x", "--max-new-tokens", "3")
    assert isinstance(result.exception, GenerationError)
    assert result.stdout in ("a\n", "ab\n", "abc\n")  # chunks may join


def test_adapters(server: RunningServer) -> None:
    empty = CliRunner().invoke(adapters, ["--server", server.address])
    assert empty.stdout == "no adapters yet: the first request that names one loads it\n"
    server.engine.adapters.load("sha256:0123456789abcdef", "team/a@1")
    header, row = CliRunner().invoke(adapters, ["--server", server.address]).stdout.splitlines()
    assert header.split()[:3] == ["ADAPTER", "TIER", "RANK"]
    assert row.split() == ["team/a@1", "device", "8", "2.0", "KiB", "1000", "B", "0", "0123456789ab"]
    listed = json.loads(CliRunner().invoke(adapters, ["--server", server.address, "--json"]).stdout)
    assert listed[0]["version"] == "team/a@1"


def test_feedback_takes_the_id_under_the_answer(tmp_path: Path) -> None:
    server = RunningServer(FakeEngine(), FakeHub(), replace(QUIET, feedback=FeedbackConfig(tmp_path / "kept")))
    server.serve()
    try:

        def tell(*arguments: str, stdin: str | None = None) -> Result:
            return CliRunner().invoke(feedback, [*arguments, "--server", server.address], input=stdin)

        request_id = ask(server, "hello", "--max-new-tokens", "2").stderr.split()[-1]
        assert tell(request_id, "--good").output == "kept\n"
        assert tell(request_id, "--bad", "--comment", "why").output == "kept, in place of an earlier mark\n"
        piped = tell(request_id, "--correction", "-", "--json", stdin="better\n")
        assert json.loads(piped.output) == {"request_id": request_id, "replaced": True}
        assert tell(request_id).exit_code == tell(request_id, "--good", "--bad").exit_code == 2
        assert CliRunner().invoke(feedback, [request_id, "--correction", "-"], input=b"\xff").exit_code == 2
        assert getattr(tell("nosuch", "--good").exception, "reason", None) == "REQUEST_NOT_FOUND"
    finally:
        server.close()
    (mark,) = read_marks(tmp_path / "kept").marks
    assert (mark.prompt, mark.answer, mark.correction) == ((("user", "hello"),), "ab", "better\n")
