"""Marks of answers over a real gRPC connection: who may give one, what is kept of it, and what it may cost."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import stat
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.loraplex.v1 import inference_pb2 as wire
from protos.loraplex.v1 import inference_pb2_grpc
from server.api import feedback as feedback_api
from server.client import AsyncClient, Client, GenerationError
from server.config import FeedbackConfig
from server.engine.request import FinishReason
from server.errors import FeedbackDirectoryUnusable
from server.feedback import store as store_module
from server.feedback.mark import Mark
from server.feedback.reading import read_marks
from server.feedback.recent import Answered, RecentAnswers
from server.feedback.store import tenant_directory
from tests.server.api.fakes import QUIET, FakeEngine, FakeHub, RunningServer
from tests.server.api.test_metrics import samples

HOSTILE = ("../../x", "..", "/etc/passwd", ".", "a/b", "-rf", "con", "X" * 128, "x", "X", " ", "%2e%2e%2f", "*?[a]")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def start(
    engine: FakeEngine, fake_hub: FakeHub, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., RunningServer]]:
    """start(**fields of FeedbackConfig) → a server that keeps feedback and tells tenants apart."""
    started = []

    def run(**fields: Any) -> RunningServer:
        config = replace(QUIET, tenant_header="x-tenant", feedback=FeedbackConfig(kept, **fields))
        running = RunningServer(engine, fake_hub, config)
        started.append(running)
        running.serve()
        return running

    yield run
    for running in started:
        running.close()


@contextmanager
def stub_of(server: RunningServer) -> Iterator[inference_pb2_grpc.InferenceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]


def refusal(call: Callable[[], object]) -> tuple[str, str, str]:
    """(status, reason, message)."""
    with pytest.raises(GenerationError) as raised:
        call()
    return raised.value.status, raised.value.reason, raised.value.message


def refused(stub: Any, tenant: str, **fields: Any) -> tuple[str, str, str]:
    with pytest.raises(grpc.RpcError) as raised:
        stub.Feedback(wire.FeedbackRequest(**fields), metadata=[("x-tenant", tenant)])
    call: Any = raised.value
    return call.code().name, dict(call.trailing_metadata())["loraplex-reason"], call.details()


def marks(kept: Path, **wanted: Any) -> tuple[Mark, ...]:
    return read_marks(kept, **wanted).marks


def files(kept: Path) -> list[Path]:
    return sorted(path for path in kept.rglob("*") if path.is_file())


def test_off_by_default(client: Client, engine: FakeEngine) -> None:
    answer = client.generate("x", max_new_tokens=1)
    assert refusal(lambda: client.feedback(answer.request_id, "good"))[:2] == ("FAILED_PRECONDITION", "FEEDBACK_OFF")
    assert refusal(lambda: client.feedback("nosuch", "good"))[:2] == ("FAILED_PRECONDITION", "FEEDBACK_OFF")


def test_a_mark_holds_what_a_later_stage_needs(start: Callable[..., RunningServer], kept: Path) -> None:
    server = start()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wie geht's? 🙂\n\u2028"}]
    with Client(server.address) as client:
        answer = client.generate(chat, [("team/a:prod", 0.5), "team/b"], max_new_tokens=3)
        assert files(kept) == []  # nothing is stored that was not marked
        assert client.feedback(answer.request_id, "bad", "Gut, \x00 danke.", comment="German, please") is False
    (mark,) = marks(kept)
    assert mark.prompt == tuple((each["role"], each["content"]) for each in chat)
    assert (mark.answer, mark.finish.value, mark.correction) == ("abc", "length", "Gut, \x00 danke.")
    assert (mark.rating, mark.comment, mark.request_id) == ("bad", "German, please", answer.request_id)
    assert [(use.version, use.weight) for use in mark.adapters] == [("team/a@1", 0.5), ("team/b@1", 1.0)]
    assert [use.digest for use in mark.adapters] == [each.digest for each in answer.adapters]
    assert (mark.base, mark.tenant, mark.index) == ("fake-base", "", 0)
    assert mark.answered <= mark.marked
    assert samples(server.metrics)[("loraplex_feedback_total", "bad")] == 1


def test_a_streamed_answer_can_be_marked_as_soon_as_its_last_chunk_is_there(
    start: Callable[..., RunningServer], kept: Path
) -> None:
    with Client(start().address) as client:
        for _ in range(20):
            with client.stream("go on", max_new_tokens=2) as stream:
                list(stream)
                assert stream.answer is not None
                client.feedback(stream.answer.request_id, "good")
    assert [(mark.prompt, mark.answer) for mark in marks(kept)] == [("go on", "ab")] * 20


def test_an_answer_that_did_not_end_cannot_be_marked(start: Callable[..., RunningServer], engine: FakeEngine) -> None:
    with Client(start().address) as client:
        engine.gate.clear()
        with client.stream("x", max_new_tokens=200, request_id="left"):
            assert engine.wait_running(1)
        assert engine.wait_idle()
        engine.gate.set()
        engine.failures["team/a@1"] = RuntimeError("a fault")
        refusal(lambda: client.generate("x", "team/a@1", request_id="failed"))
        for request_id in ("left", "failed"):
            assert refusal(lambda each=request_id: client.feedback(each, "good"))[1] == "REQUEST_NOT_FOUND"  # type: ignore[misc]


def test_a_later_mark_replaces_the_first_and_candidates_are_marked_apart(
    start: Callable[..., RunningServer], kept: Path
) -> None:
    with Client(start().address) as client:
        answer = client.generate("x", n=3, max_new_tokens=2)
        assert client.feedback(answer.request_id, "good", candidate=1) is False
        assert client.feedback(answer.request_id, "bad", candidate=2) is False
        assert client.feedback(answer.request_id, correction="better", candidate=1) is True
        beyond = refusal(lambda: client.feedback(answer.request_id, "good", candidate=3))
    assert beyond == ("INVALID_ARGUMENT", "INVALID_REQUEST", "index must be below 3, the number of answers")
    read = read_marks(kept)
    assert [(mark.index, mark.rating, mark.correction) for mark in read.marks] == [
        (1, None, "better"),
        (2, "bad", None),
    ]
    assert (read.replaced, read.unreadable) == (1, 0)


def test_an_id_used_again_means_the_later_answer_and_loses_no_mark(
    start: Callable[..., RunningServer], kept: Path
) -> None:
    with Client(start().address) as client:
        for prompt in ("first", "second"):
            client.generate(prompt, request_id="mine", max_new_tokens=1)
            client.feedback("mine", "good")
    assert [mark.prompt for mark in marks(kept)] == ["first", "second"]


def test_only_the_tenant_that_was_answered_may_mark(start: Callable[..., RunningServer], kept: Path) -> None:
    with stub_of(start()) as stub:
        asked = wire.GenerateRequest(text="blue's secret", request_id="r", max_new_tokens=1)
        stub.Generate(asked, metadata=[("x-tenant", "blue")])
        others = refused(stub, "red", request_id="r", rating=wire.RATING_GOOD)
        unknown = refused(stub, "red", request_id="nosuch", rating=wire.RATING_GOOD)
        nobodys = refused(stub, "green", request_id="r", rating=wire.RATING_GOOD)
        assert others == unknown == nobodys  # word for word: whether another tenant has it is not told
        assert others[:2] == ("NOT_FOUND", "REQUEST_NOT_FOUND")
        assert files(kept) == []
        # The same id in two tenants is two requests.
        red = wire.GenerateRequest(text="red's", request_id="r", max_new_tokens=1)
        stub.Generate(red, metadata=[("x-tenant", "red")])
        for tenant in ("red", "blue"):
            stub.Feedback(
                wire.FeedbackRequest(request_id="r", rating=wire.RATING_GOOD), metadata=[("x-tenant", tenant)]
            )
    assert [mark.prompt for mark in marks(kept, tenant="blue")] == ["blue's secret"]
    assert [mark.prompt for mark in marks(kept, tenant="red")] == ["red's"]


def test_hostile_tenant_names_stay_inside_and_apart(start: Callable[..., RunningServer], kept: Path) -> None:
    with stub_of(start()) as stub:
        for tenant in HOSTILE:
            metadata = [("x-tenant", tenant)]
            stub.Generate(wire.GenerateRequest(text=tenant, request_id="r", max_new_tokens=1), metadata=metadata)
            stub.Feedback(wire.FeedbackRequest(request_id="r", rating=wire.RATING_BAD), metadata=metadata)
    assert len(files(kept)) == len(HOSTILE) == len({tenant_directory(tenant) for tenant in HOSTILE})
    assert all(path.parent.parent == kept and path.resolve() == path for path in files(kept))
    for tenant in HOSTILE:
        assert [(mark.tenant, mark.prompt) for mark in marks(kept, tenant=tenant)] == [(tenant, tenant)]
    assert files(kept.parent) == files(kept)


def test_files_are_private(start: Callable[..., RunningServer], kept: Path) -> None:
    before = os.umask(0)
    try:
        with Client(start().address) as client:
            client.feedback(client.generate("x", max_new_tokens=1).request_id, "good")
    finally:
        os.umask(before)
    (path,) = files(kept)
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (kept, path.parent, path)]
    assert modes == [0o700, 0o700, 0o600]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "rating"),
        ({"rating": 7}, "rating 7"),
        ({"correction": ""}, "blank"),
        ({"correction": " \n\t"}, "blank"),
        ({"correction": "x" * 65537}, "65537 characters"),
        ({"rating": wire.RATING_GOOD, "comment": "x" * 1001}, "comment"),
        ({"rating": wire.RATING_GOOD, "request_id": ""}, "request_id"),
        ({"rating": wire.RATING_GOOD, "index": 2**32 - 1}, "index"),
    ],
)
def test_marks_that_are_none_are_refused(
    start: Callable[..., RunningServer], kept: Path, fields: dict[str, Any], word: str
) -> None:
    with stub_of(start()) as stub:
        metadata = [("x-tenant", "blue")]
        stub.Generate(wire.GenerateRequest(text="x", request_id="r", max_new_tokens=1), metadata=metadata)
        status, reason, message = refused(stub, "blue", **{"request_id": "r", **fields})
    assert (status, reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert word in message and len(message) < 200
    assert files(kept) == []


def test_a_correction_larger_than_a_call_ends_that_call_alone(start: Callable[..., RunningServer], kept: Path) -> None:
    with Client(start().address) as client:
        answer = client.generate("x", max_new_tokens=1)
        huge = refusal(lambda: client.feedback(answer.request_id, correction="x" * 5_000_000))
        assert huge[0] == "RESOURCE_EXHAUSTED"
        client.feedback(answer.request_id, correction="x" * 65536)
    assert [len(mark.correction or "") for mark in marks(kept)] == [65536]


def test_token_ids_are_kept_as_text_or_not_at_all(start: Callable[..., RunningServer], kept: Path) -> None:
    with Client(start().address) as client:
        plain = client.generate([ord(char) for char in "as text"], max_new_tokens=1)
        special = client.generate([0, 97], max_new_tokens=1)  # 0 is no text's token
        client.feedback(plain.request_id, "good")
        told = refusal(lambda: client.feedback(special.request_id, "good"))
    assert told[:2] == ("FAILED_PRECONDITION", "PROMPT_NOT_TEXT")
    assert [mark.prompt for mark in marks(kept)] == ["as text"]


def test_too_long_ago_is_not_found(start: Callable[..., RunningServer], kept: Path) -> None:
    server = start(window_seconds=0.1)
    with Client(server.address) as client:
        answer = client.generate("x", max_new_tokens=1)
        time.sleep(0.15)
        assert refusal(lambda: client.feedback(answer.request_id, "good"))[:2] == ("NOT_FOUND", "REQUEST_NOT_FOUND")


def test_a_flood_is_forgotten_before_a_modest_tenant_is(start: Callable[..., RunningServer]) -> None:
    with stub_of(start(max_answers=10)) as stub:

        def ask(tenant: str, request_id: str) -> None:
            message = wire.GenerateRequest(text="x", request_id=request_id, max_new_tokens=1)
            stub.Generate(message, metadata=[("x-tenant", tenant)])

        ask("modest", "mine")
        for number in range(30):
            ask("flood", str(number))
        good = wire.FeedbackRequest(request_id="mine", rating=wire.RATING_GOOD)
        stub.Feedback(good, metadata=[("x-tenant", "modest")])
        assert refused(stub, "flood", request_id="0", rating=wire.RATING_GOOD)[1] == "REQUEST_NOT_FOUND"
        last = wire.FeedbackRequest(request_id="29", rating=wire.RATING_GOOD)
        stub.Feedback(last, metadata=[("x-tenant", "flood")])


def test_a_tenant_has_so_many_bytes_and_others_their_own(start: Callable[..., RunningServer], kept: Path) -> None:
    with stub_of(start(max_tenant_bytes=4000)) as stub:
        for tenant in ("greedy", "other"):
            message = wire.GenerateRequest(text="x", request_id="r", max_new_tokens=1)
            stub.Generate(message, metadata=[("x-tenant", tenant)])
        long = wire.FeedbackRequest(request_id="r", correction="x" * 3000)
        stub.Feedback(long, metadata=[("x-tenant", "greedy")])
        status, reason, message = refused(stub, "greedy", request_id="r", correction="y" * 3000)
        assert (status, reason) == ("RESOURCE_EXHAUSTED", "FEEDBACK_FULL")
        assert "of 3.9 KiB" in message
        stub.Feedback(long, metadata=[("x-tenant", "other")])
    assert [mark.correction for mark in marks(kept, tenant="greedy")] == ["x" * 3000]


@pytest.mark.parametrize("step", ["write_all", "fsync"])
def test_a_full_disk_fails_the_mark_and_nothing_else(
    start: Callable[..., RunningServer], kept: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    server = start()
    with Client(server.address) as client:
        first, second = (client.generate(prompt, max_new_tokens=1) for prompt in ("first", "second"))
        client.feedback(first.request_id, "good")

        def full(file: Any, data: bytes = b"") -> None:
            if data:
                file.write(data[: len(data) // 2])  # as much as there was room for
            raise OSError(errno.ENOSPC, "No space left on device", str(kept))

        with monkeypatch.context() as patched:
            patched.setattr(store_module if step == "write_all" else os, step, full)
            status, reason, message = refusal(lambda: client.feedback(second.request_id, "good"))
            assert (status, reason) == ("UNAVAILABLE", "FEEDBACK_NOT_STORED")
            assert message == "the mark was not stored: No space left on device"  # and no path of the server
            assert client.generate("still there", max_new_tokens=2).text == "ab"
        assert [mark.prompt for mark in marks(kept)] == ["first"]
        assert client.feedback(second.request_id, "good") is False
    read = read_marks(kept)
    assert ([mark.prompt for mark in read.marks], read.unreadable) == (["first", "second"], 0)


def test_a_torn_last_line_costs_itself_alone(start: Callable[..., RunningServer], kept: Path) -> None:
    with Client(start().address) as client:
        answers = [client.generate(str(number), max_new_tokens=1) for number in range(3)]
        client.feedback(answers[0].request_id, "good")
        client.feedback(answers[1].request_id, "good")
        (path,) = files(kept)
        path.write_bytes(path.read_bytes()[:-20])  # the power went
        read = read_marks(kept)
        assert ([mark.prompt for mark in read.marks], read.unreadable) == (["0"], 1)
        client.feedback(answers[2].request_id, "bad")
    read = read_marks(kept)
    assert ([mark.prompt for mark in read.marks], read.unreadable) == (["0", "2"], 1)


def test_marks_at_once_are_all_whole(start: Callable[..., RunningServer], kept: Path) -> None:
    server = start()
    with Client(server.address) as client:
        answers = [client.generate(str(number), max_new_tokens=1) for number in range(40)]
        with ThreadPoolExecutor(16) as pool:
            replaced = list(
                pool.map(lambda n: client.feedback(answers[n % 40].request_id, correction=f"{n} " * 500), range(80))
            )
    assert replaced.count(True) == 40
    read = read_marks(kept)
    assert (len(read.marks), read.replaced, read.unreadable) == (40, 40, 0)
    assert samples(server.metrics)[("loraplex_feedback_total", "none")] == 80


def test_a_slow_disk_delays_no_answer_and_marks_queue_up_only_so_far(
    start: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, stuck = start(max_pending=2), threading.Event()
    before = store_module._append

    def slow(path: Path, line: bytes) -> bool:
        assert threading.current_thread().name.startswith("loraplex-feedback")
        assert stuck.wait(20)
        return before(path, line)

    monkeypatch.setattr(store_module, "_append", slow)

    async def marking() -> None:
        async with AsyncClient(server.address) as client:
            answer = await client.generate("x", max_new_tokens=1)
            waiting = [asyncio.ensure_future(client.feedback(answer.request_id, "good")) for _ in range(2)]
            await asyncio.sleep(0.1)
            assert (await client.generate("x", max_new_tokens=3)).text == "abc"
            with pytest.raises(GenerationError) as refused:
                await client.feedback(answer.request_id, "bad")
            assert (refused.value.status, refused.value.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
            stuck.set()
            assert await asyncio.gather(*waiting) == [False, True]

    asyncio.run(marking())


def test_bytes_that_are_no_mark_are_refused(start: Callable[..., RunningServer], kept: Path) -> None:
    with grpc.insecure_channel(start().address) as channel:
        call = channel.unary_unary("/loraplex.v1.Inference/Feedback")
        for raw in (b"\xff" * 50, b"\x0a\x02\xc3\x28", b"\x1a\x02\xc3\x28", b"\x0b" * 100_000):
            with pytest.raises(grpc.RpcError) as raised:
                call(raw)
            told: Any = raised.value
            assert dict(told.trailing_metadata())["loraplex-reason"] == "MESSAGE_MALFORMED"
    assert files(kept) == []


def test_what_is_remembered_stays_within_its_bounds() -> None:
    now, chance = [0.0], random.Random(5)
    recent = RecentAnswers(seconds=10, max_answers=20, max_bytes=60_000, clock=lambda: now[0])
    for number in range(3000):
        now[0] += chance.random()
        tenant, request_id = chance.choice("abcde"), str(chance.randrange(12))
        prompt: Any = chance.choice(["x" * chance.randrange(9000), (("user", "é" * 50),), array("L", range(40))])
        answered = Answered(tenant, request_id, prompt, ("y" * chance.randrange(20),), (FinishReason.STOP,), (), 0.0)
        recent.add(answered)
        assert recent.find(tenant, request_id) is answered
        if number % 7 == 0:
            recent.forget_old()
        recent.check_integrity()
    huge = Answered("a", "huge", "x" * 60_000, ("",), (FinishReason.STOP,), (), 0.0)
    before = len(recent)
    recent.add(huge)
    assert (recent.find("a", "huge"), len(recent)) == (None, before)  # and nothing was forgotten for it
    now[0] += 11
    recent.forget_old()
    assert len(recent) == 0
    recent.check_integrity()


def day_file(kept: Path, tenant: str, day: str) -> Path:
    path = kept / tenant_directory(tenant) / f"{day}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}\n")
    return path


def days_ago(count: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(time.time() - 86400 * count))


def test_retention_is_kept_at_start_and_afterwards(
    start: Callable[..., RunningServer], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback_api, "REMOVE_SECONDS", 0.05)
    monkeypatch.setattr(feedback_api, "FORGET_SECONDS", 0.05)
    old, gone, young = (day_file(kept, *pair) for pair in (("a", days_ago(9)), ("b", days_ago(40)), ("a", days_ago(6))))
    strange = day_file(kept, "a", "2026-99-99")
    start(retention_seconds=7 * 86400)
    assert files(kept) == sorted([young, strange]) and not gone.parent.exists() and not old.exists()
    later = day_file(kept, "c", days_ago(30))
    for _ in range(200):
        if not later.exists():
            break
        time.sleep(0.02)
    assert files(kept) == sorted([young, strange])


def test_a_directory_that_cannot_be_used_is_found_out_at_start(start: Callable[..., RunningServer], kept: Path) -> None:
    kept.write_text("a file")
    with pytest.raises(FeedbackDirectoryUnusable, match="cannot store feedback"):
        start()


def test_what_is_stored_is_json_a_line(start: Callable[..., RunningServer], kept: Path) -> None:
    with Client(start().address) as client:
        client.feedback(client.generate("two\nlines", max_new_tokens=1).request_id, "good")
    (path,) = files(kept)
    assert path.name == f"{days_ago(0)}.jsonl"
    (line,) = path.read_text("utf-8").splitlines()
    assert json.loads(line)["prompt"] == {"text": "two\nlines"}
