"""n > 1 and structures over the wire, against the fake engine; bounds before admission."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from protos.loraplex.v1 import inference_pb2, inference_pb2_grpc
from server.api.admission import SEED_STEP
from server.client import Client, GenerationError
from server.engine.request import Structure
from tests.server.api.fakes import FakeEngine, RunningServer


@pytest.fixture
def stub(server: RunningServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]


def test_n_requests_differ_in_seed_alone(client: Client, engine: FakeEngine) -> None:
    answer = client.generate("ab", n=3, seed=2**64 - 1, temperature=1.0, max_new_tokens=4, logprobs=1)
    assert [each.index for each in answer.candidates] == [0, 1, 2]
    assert [each.text for each in answer.candidates] == ["abcd"] * 3
    assert all(len(each.logprobs) == 4 and each.finish_reason == "length" for each in answer.candidates)
    assert (answer.text, answer.token_ids) == (answer.candidates[0].text, answer.candidates[0].token_ids)
    assert (answer.prompt_tokens, answer.completion_tokens) == (2, 12)
    seeds = [request.sampling.seed for request in engine.submitted]
    assert seeds == [2**64 - 1, SEED_STEP - 1, (2 * SEED_STEP - 1) % 2**64]
    assert len({request.id for request in engine.submitted}) == 3
    assert {request.prompt for request in engine.submitted} == {(97, 98)}


def test_one_answer_is_its_only_candidate(client: Client) -> None:
    answer = client.generate("ab", max_new_tokens=2)
    assert [(each.index, each.text) for each in answer.candidates] == [(0, "ab")]


def test_a_stream_says_whose_token_it_is(client: Client) -> None:
    with client.stream("ab", adapters="team/a", n=2, max_new_tokens=5) as stream:
        chunks = list(stream)
    answer = stream.answer
    assert answer is not None
    for index in range(2):
        text = "".join(chunk.text for chunk in chunks if chunk.index == index)
        assert text == answer.candidates[index].text == "abcde"
    assert answer.completion_tokens == 10
    assert len(answer.warnings) == 1  # said once, not by every candidate


def test_one_cancel_ends_all(client: Client, engine: FakeEngine) -> None:
    engine.gate.clear()
    stream = client.stream("ab", n=4, max_new_tokens=5)
    assert engine.wait_running(4)
    stream.cancel()
    assert engine.wait_idle()
    engine.gate.set()


def test_a_candidate_that_is_refused_takes_the_others_along(client: Client, engine: FakeEngine) -> None:
    from server.errors import QueueFull

    submit = engine.submit

    def full_after_two(request: Any, outbox: Any) -> None:
        if len(engine.submitted) == 2:
            raise QueueFull("2 requests wait already")
        submit(request, outbox)

    engine.gate.clear()
    engine.submit = full_after_two  # type: ignore[method-assign]
    with pytest.raises(GenerationError) as refused:
        client.generate("ab", n=4)
    assert refused.value.reason == "QUEUE_FULL"
    assert engine.wait_idle()
    assert len(engine.submitted) == 2


@pytest.mark.parametrize("n", [0, 17, 2**31, 2**32 - 1])
def test_n_is_bounded_before_anything_is_made(stub: Any, engine: FakeEngine, n: int) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.Generate(inference_pb2.GenerateRequest(text="a", n=n))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "n must be from 1 to 16" in refused.value.details()
    assert not engine.submitted


@pytest.mark.parametrize(
    ("options", "structure"),
    [
        ({"regex": "a|b"}, Structure("regex", "a|b")),
        ({"grammar": 'start: "a"'}, Structure("grammar", 'start: "a"')),
        ({"choice": ["a", "b"]}, Structure("choice", choices=("a", "b"))),
        ({"json_schema": {"type": "null"}}, Structure("json_schema", '{"type": "null"}')),
        ({"json_schema": '{"type":"null"}'}, Structure("json_schema", '{"type":"null"}')),
    ],
)
def test_a_structure_arrives_compiled_off_the_event_loop(
    client: Client, engine: FakeEngine, options: Any, structure: Structure
) -> None:
    client.generate("ab", max_new_tokens=2, **options)
    assert engine.submitted[-1].structure == structure
    assert all(name.startswith("loraplex-tokenize") for name in engine.structures.threads)
    assert engine.structures.threads


@pytest.mark.parametrize(
    "options",
    [
        {"regex": "invalid"},
        {"regex": ""},
        {"regex": "x" * (64 * 1024 + 1)},
        {"json_schema": json.dumps({"invalid": 1})},
        {"grammar": " " * 100_000},
        {"choice": []},
        {"choice": ["a"] * 1025},
        {"choice": ["a" * 70_000]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_invalid_structure_is_refused_before_admission(client: Client, engine: FakeEngine, options: Any) -> None:
    with pytest.raises(GenerationError) as refused:
        client.generate("ab", **options)
    assert (refused.value.status, refused.value.reason) == ("INVALID_ARGUMENT", "STRUCTURE_INVALID")
    assert not engine.submitted


def test_two_structures_are_refused_by_the_client(client: Client) -> None:
    with pytest.raises(ValueError, match="one structure"):
        client.generate("ab", regex="a", choice=["b"])
    with pytest.raises(TypeError, match="list"):
        client.generate("ab", choice="yes")
