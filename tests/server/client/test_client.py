"""The Python client, sync and async, against a real gRPC server around a fake engine."""

import asyncio
import pickle
import re
import socket
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import server.client
from server.client import AsyncClient, Client, GenerationError, Options
from server.engine.request import Structure
from tests.hub.registry.cutting import CuttingProxy
from tests.server.api.fakes import FakeEngine, FakeHub, RunningServer

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def served(engine: FakeEngine) -> Iterator[RunningServer]:
    hub = FakeHub()
    hub.push("team/a")
    hub.push("team/b")
    running = RunningServer(engine, hub)
    running.serve()
    yield running
    running.close()


def test_plain_python_arguments_become_a_request(served: RunningServer, engine: FakeEngine) -> None:
    with Client(served.address) as client:
        client.generate(
            CHAT,
            ["team/a", ("team/b", -0.5)],
            max_new_tokens=5,
            min_new_tokens=2,
            temperature=0.7,
            top_p=0.9,
            top_k=40,
            min_p=0.05,
            seed=11,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=-0.3,
            logit_bias={7: -2.0},
            stop=["\n\n"],
            stop_token_ids=[3],
            ignore_eos=True,
            logprobs=4,
            request_id="mine",
        )
    (request,) = engine.submitted
    assert [(use.version, use.weight) for use in request.adapters] == [("team/a@1", 1.0), ("team/b@1", -0.5)]
    sampling, stopping = request.sampling, request.stopping
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 40, 0.05)
    assert (sampling.seed, sampling.repetition_penalty) == (11, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.2, -0.3)
    assert sampling.logit_bias == ((7, -2.0),)
    assert (stopping.max_new_tokens, stopping.min_new_tokens, stopping.ignore_eos) == (5, 2, True)
    assert (stopping.stop_strings, stopping.stop_token_ids) == (("\n\n",), (3,))
    assert request.logprobs == 4
    assert request.id.startswith("mine#")


def test_the_example_in_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    hub = FakeHub()
    for name in ("team/sentiment", "team/sentiment", "team/sentiment", "team/summary", "team/summary"):
        hub.push(name)
    hub.tag("team/sentiment", "prod", 3)
    running = RunningServer(FakeEngine(), hub)
    running.serve()
    try:
        assert server.client.__doc__ is not None
        example = textwrap.dedent(re.findall(r"\n((?: {4}.*\n|\n)+)", server.client.__doc__)[0])
        assert "client.generate(" in example and "client.stream(" in example
        exec(example.replace("127.0.0.1:50051", running.address))
    finally:
        running.close()
    printed = capsys.readouterr().out
    assert "team/sentiment@3" in printed and "tokens/s" in printed


def test_three_kinds_of_prompt(served: RunningServer, engine: FakeEngine) -> None:
    with Client(served.address) as client:
        for prompt in ("hi", [104, 105], CHAT):
            client.generate(prompt, max_new_tokens=1)  # type: ignore[arg-type]
    plain, ids, chat = (request.prompt for request in engine.submitted)
    assert plain == ids == (104, 105)
    assert "".join(map(chr, chat)) == "<user>hi"


def test_a_stream_knows_its_adapters_first_and_its_answer_last(served: RunningServer, engine: FakeEngine) -> None:
    engine.gate.clear()
    with Client(served.address) as client, client.stream(CHAT, "team/a", max_new_tokens=3) as stream:
        assert [each.version for each in stream.adapters] == ["team/a@1"]
        assert stream.answer is None
        engine.gate.set()
        text = "".join(chunk.text for chunk in stream)
        answer = stream.answer
    assert answer is not None
    assert text == answer.text == "abc"
    assert answer.token_ids == tuple(b"abc")
    assert answer.adapters == stream.adapters
    assert answer.completion_tokens == 3 and answer.tokens_per_second > 0
    assert list(stream) == []  # over


def test_leaving_the_block_cancels(served: RunningServer, engine: FakeEngine) -> None:
    engine.gate.clear()
    with Client(served.address) as client:
        with client.stream("x"):
            assert engine.wait_running(1)
        assert engine.wait_idle()


def test_errors_carry_status_reason_and_message(served: RunningServer) -> None:
    with Client(served.address) as client:
        for call in (client.generate, client.stream):
            with pytest.raises(GenerationError) as refused:
                call("x", "team/nobody")  # type: ignore[operator]
            error = refused.value
            assert (error.status, error.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
            assert str(error) == error.message == "no adapter team/nobody:latest"


def test_errors_come_out_of_worker_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(GenerationError("NOT_FOUND", "ADAPTER_NOT_FOUND", "no adapter team/x:latest")))
    assert (error.status, error.reason, str(error)) == ("NOT_FOUND", "ADAPTER_NOT_FOUND", "no adapter team/x:latest")


def test_no_server_is_said_plainly() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(GenerationError, match=r"no server answers at 127.0.0.1:1 \(start one with `hub serve`\)"):
            client.generate("x")


def test_a_name_that_no_machine_has_is_no_server() -> None:
    with Client("no-such-machine.invalid:1") as client:
        with pytest.raises(GenerationError, match=r"no server answers at no-such-machine\.invalid:1"):
            client.model_info()


def test_a_connection_that_breaks_midway_is_said_plainly(served: RunningServer, engine: FakeEngine) -> None:
    engine.gate.clear()
    proxy = CuttingProxy(served.address, "up", after=200, cuts=1, until=lambda: bool(engine.submitted))
    with Client(proxy.address) as client:
        with pytest.raises(GenerationError) as broken:
            client.generate("x" * 300, max_new_tokens=5)
    proxy.close()
    error = broken.value
    assert (error.status, error.reason) == ("UNAVAILABLE", "UNAVAILABLE")
    assert error.message == f"the connection to the server at {proxy.address} broke before the answer was complete"


def test_a_server_that_was_away_is_looked_for_often() -> None:
    """gRPC's own pauses grow to two minutes, in which a server that is back goes unseen."""
    seen = 0
    with socket.create_server(("127.0.0.1", 0)) as closing, Client(f"127.0.0.1:{closing.getsockname()[1]}") as client:
        closing.settimeout(0.05)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            with suppress(TimeoutError):
                closing.accept()[0].close()
                seen += 1
            with suppress(GenerationError):
                client.generate("x", timeout=0.05)
    assert seen >= 4


def test_values_that_no_message_can_hold_are_pythons_errors(served: RunningServer, engine: FakeEngine) -> None:
    with Client(served.address) as client:
        with pytest.raises(ValueError, match="-1"):
            client.generate("x", max_new_tokens=-1)
        wrong: dict[str, object] = {
            "temperature": "hot", "stop": [1], "stop_token_ids": ["a"], "logit_bias": {"a": 1}, "choice": [1],
            "regex": 1, "json_schema": object(), "request_id": 1,
        }  # fmt: skip
        for option, value in wrong.items():
            with pytest.raises(TypeError, match=f"^{option}: "):
                client.generate("x", **{option: value})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^seed: "):
            client.generate("x", seed=-1)
    assert engine.submitted == []


def test_none_is_as_left_out(served: RunningServer, engine: FakeEngine) -> None:
    """As wrappers hand on what they were not given themselves."""
    nothing: Options = dict.fromkeys(Options.__annotations__)  # type: ignore[assignment,misc]
    with Client(served.address) as client:
        client.generate("x", **{**nothing, "max_new_tokens": 1})
        client.generate("x", max_new_tokens=1)
        client.generate("x", **{**nothing, "max_new_tokens": 1, "regex": "a"})
    given, bare, structured = engine.submitted
    assert (given.stopping, given.logprobs, given.structure) == (bare.stopping, None, None)
    assert replace(given.sampling, seed=0) == replace(bare.sampling, seed=0)
    assert structured.structure == Structure("regex", "a")


def test_chat_messages_without_text_are_refused(served: RunningServer, engine: FakeEngine) -> None:
    """None and lists of parts are other services' ways; a message would take the former for no text."""
    with Client(served.address) as client:
        for call in (client.generate, client.tokenize):
            for content in (None, [{"type": "text", "text": "hi"}], b"hi"):
                with pytest.raises(TypeError, match="chat message 1: its content must be text, not "):
                    call([*CHAT, {"role": "assistant", "content": content}])  # type: ignore[operator]
            with pytest.raises(ValueError, match="chat message 0 has no 'content'"):
                call([{"role": "user"}])  # type: ignore[operator]
            with pytest.raises(TypeError, match="not NoneType"):
                call(None)  # type: ignore[operator]
        with pytest.raises(TypeError, match="a prompt of token ids: "):
            client.generate(["hi"])  # type: ignore[arg-type]
    assert engine.submitted == []


def test_an_array_is_a_prompt_of_token_ids(served: RunningServer, engine: FakeEngine) -> None:
    with Client(served.address) as client:
        client.generate(np.array([5, 6]), max_new_tokens=1)  # type: ignore[arg-type]
    assert engine.submitted[0].prompt == (5, 6)


def test_every_call_has_a_timeout(served: RunningServer) -> None:
    calls: list[Callable[[Any], Any]] = [
        lambda client: client.generate("x", timeout=-1),
        lambda client: client.tokenize("x", timeout=-1),
        lambda client: client.model_info(timeout=-1),
        lambda client: client.feedback("x", "good", timeout=-1),
        lambda client: client.adapters(timeout=-1),
        lambda client: client.load("team/a", timeout=-1),
        lambda client: client.unload("team/a", timeout=-1),
    ]

    async def ask(call: Callable[[Any], Any]) -> None:
        async with AsyncClient(served.address) as client:
            await call(client)

    with Client(served.address) as client:
        for call in calls:
            with pytest.raises(GenerationError, match="within the timeout"):
                call(client)
            with pytest.raises(GenerationError, match="within the timeout"):
                asyncio.run(ask(call))


def test_adapters_come_alone_as_pairs_and_as_a_mapping(served: RunningServer, engine: FakeEngine) -> None:
    with Client(served.address) as client:
        for adapters in (("team/a", 0.5), [("team/a", 0.5)], {"team/a": 0.5}, [["team/a", 0.5]]):
            client.generate("x", adapters, max_new_tokens=1)  # type: ignore[arg-type]
        client.generate("x", ("team/a", "team/b"), max_new_tokens=1)
        client.generate("x", {"team/a": 0.25, "team/b": 2}, max_new_tokens=1)
        for nonsense in (["team/a", None], 3, [("team/a", "much")], [("team/a", 0.5, 1)]):
            with pytest.raises(TypeError):
                client.generate("x", nonsense)  # type: ignore[arg-type]
    asked = [[(use.version, use.weight) for use in request.adapters] for request in engine.submitted]
    assert asked[:4] == [[("team/a@1", 0.5)]] * 4
    assert asked[4:] == [[("team/a@1", 1), ("team/b@1", 1)], [("team/a@1", 0.25), ("team/b@1", 2)]]


def test_what_could_be_taken_for_something_else_is_refused(served: RunningServer, engine: FakeEngine) -> None:
    with Client(served.address) as client:
        with pytest.raises(TypeError, match=r"no option 'temprature'; did you mean 'temperature'\?"):
            client.generate("x", temprature=1.5)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="stop takes a list of texts"):
            client.stream("x", stop="END")
        for prompt in (b"hi", CHAT[0]):
            for call in (client.generate, client.tokenize):
                with pytest.raises(TypeError, match=f"not {type(prompt).__name__}"):
                    call(prompt)  # type: ignore[operator]
    assert engine.submitted == []


def test_the_async_client_does_the_same(served: RunningServer, engine: FakeEngine) -> None:
    async def story() -> None:
        async with AsyncClient(served.address) as client:
            answers = await asyncio.gather(
                *(client.generate(CHAT, ref, max_new_tokens=3) for ref in ("team/a", "team/b", None))
            )
            assert [[each.version for each in answer.adapters] for answer in answers] == [
                ["team/a@1"],
                ["team/b@1"],
                [],
            ]
            engine.gate.clear()
            async with await client.stream("x", [("team/b", 2.0)], max_new_tokens=3) as stream:
                assert [(each.version, each.weight) for each in stream.adapters] == [("team/b@1", 2.0)]
                engine.gate.set()
                text = "".join([chunk.text async for chunk in stream])
            assert stream.answer is not None and text == stream.answer.text == "abc"
            with pytest.raises(GenerationError) as refused:
                await client.stream("x", "../x")
            assert refused.value.reason == "REF_INVALID"
            assert [token.text for token in await client.tokenize("hi")] == ["h", "i"]
            assert (await client.model_info()).base == "fake-base"
            held = await client.load("team/a")
            assert await client.adapters() == [held]
            assert await client.unload("team/a") is True

    asyncio.run(story())


def test_a_cancelled_stream_says_so_in_both_clients(served: RunningServer, engine: FakeEngine) -> None:
    engine.gate.clear()
    with Client(served.address) as client, client.stream("x") as stream:
        stream.cancel()
        with pytest.raises(GenerationError, match="the stream was cancelled") as raised:
            next(stream)
    assert (raised.value.status, raised.value.reason) == ("CANCELLED", "CANCELLED")

    async def story() -> None:
        async with AsyncClient(served.address) as client:
            stream = await client.stream("x")
            waiting = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            stream.cancel()
            with pytest.raises(GenerationError, match="the stream was cancelled"):
                await waiting
            # A task that is cancelled itself ends as tasks do, also where it waits for a stream.
            other = await client.stream("x")
            waiting = asyncio.create_task(anext(other))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(story())


def test_leaving_an_async_stream_cancels(served: RunningServer, engine: FakeEngine) -> None:
    async def story() -> None:
        async with AsyncClient(served.address) as client:
            async with await client.stream("x"):
                assert await asyncio.to_thread(engine.wait_running, 1)
            assert await asyncio.to_thread(engine.wait_idle)

    engine.gate.clear()
    asyncio.run(story())


def test_letting_go_of_a_stream_cancels(served: RunningServer, engine: FakeEngine) -> None:
    async def story() -> None:
        async with AsyncClient(served.address) as client:
            stream = await client.stream("x")
            assert await asyncio.to_thread(engine.wait_running, 1)
            del stream
            assert await asyncio.to_thread(engine.wait_idle)

    engine.gate.clear()
    asyncio.run(story())
    with Client(served.address) as client:
        stream = client.stream("x")
        assert engine.wait_running(1)
        del stream
        assert engine.wait_idle()
