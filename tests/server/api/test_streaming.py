"""Answers over a real gRPC connection, from a fake engine."""

import re
import subprocess
import sys
import threading
from typing import Any

import grpc
import pytest

from hub.errors import HubUnavailable, Unauthenticated
from protos.loraplex.v1 import inference_pb2, inference_pb2_grpc
from server.api.admission import INLINE_CHARS
from server.client import Client, GenerationError
from tests.server.api.fakes import FakeEngine, FakeHub, RunningServer


def test_first_chunk_names_the_adapters_before_any_token(
    server: RunningServer, engine: FakeEngine, fake_hub: FakeHub
) -> None:
    engine.gate.clear()
    with grpc.insecure_channel(server.address) as channel:
        request = inference_pb2.GenerateRequest(
            request_id="mine",
            text="x",
            max_new_tokens=3,
            adapters=[inference_pb2.AdapterSelection(ref="team/a:prod", weight=-0.5)],
        )
        call = inference_pb2_grpc.InferenceStub(channel).GenerateStream(request)
        first = next(call)  # arrives although the engine makes no step
        assert (first.request_id, first.text, list(first.token_ids)) == ("mine", "", [])
        assert [(each.version, each.weight) for each in first.adapters] == [("team/a@1", -0.5)]
        assert first.adapters[0].digest == fake_hub.versions["team/a"][0]
        engine.gate.set()
        chunks = list(call)
    assert "".join(chunk.text for chunk in chunks) == "abc"
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [0] * (len(chunks) - 1)
    last = chunks[-1]
    assert last.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert [each.version for each in last.adapters] == ["team/a@1"]
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (1, 3)
    assert 0 < last.timing.queue_seconds < last.timing.time_to_first_token_seconds < last.timing.total_seconds
    assert chunks[0].warnings == ["adapter team/a@1 is a fake"]


def test_a_whole_answer(client: Client) -> None:
    answer = client.generate("hello", adapters=["team/a", ("team/b", 2.0)], max_new_tokens=4, logprobs=2)
    assert answer.text == "abcd"
    assert answer.token_ids == tuple(b"abcd")
    assert [(each.version, each.weight) for each in answer.adapters] == [("team/a@2", 1.0), ("team/b@1", 2.0)]
    assert len(answer.logprobs) == 4 and len(answer.logprobs[0].top) == 2
    assert answer.warnings == ("adapter team/a@2 is a fake", "adapter team/b@1 is a fake")
    assert (answer.prompt_tokens, answer.completion_tokens, answer.finish_reason) == (5, 4, "length")


def test_unset_fields_get_the_documented_defaults(client: Client, engine: FakeEngine) -> None:
    client.generate("x")
    (request,) = engine.submitted
    assert request.stopping.max_new_tokens == client.model_info().default_max_new_tokens == 256
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 1.0, 0, 0.0)
    assert (sampling.repetition_penalty, request.logprobs, request.adapters) == (1.0, None, ())
    assert sampling.seed > 0  # drawn
    client.generate("x", seed=0)
    assert engine.submitted[-1].sampling.seed == 0


def test_names_of_one_version_are_summed(client: Client, engine: FakeEngine) -> None:
    client.generate("x", adapters=[("team/a:prod", 0.5), ("team/b", 1.0), ("team/a@1", 0.25)], max_new_tokens=1)
    assert [(use.version, use.weight) for use in engine.submitted[0].adapters] == [("team/a@1", 0.75), ("team/b@1", 1)]


@pytest.mark.parametrize("weight", [3.4e38, -3.4e38])
def test_names_of_one_version_whose_weights_sum_to_no_finite_number_are_refused(
    client: Client, engine: FakeEngine, weight: float
) -> None:
    with pytest.raises(GenerationError, match="team/a:prod and team/a@1 name the same version") as refused:
        client.generate("x", adapters=[("team/a:prod", weight), ("team/a@1", weight)], max_new_tokens=1)
    assert (refused.value.status, refused.value.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert engine.submitted == []
    client.generate("x", adapters=[("team/a:prod", weight), ("team/b", weight), ("team/a@1", -weight)])
    assert [use.weight for use in engine.submitted[0].adapters] == [0, pytest.approx(weight)]


def test_chat_goes_through_the_template(client: Client, engine: FakeEngine) -> None:
    client.generate([{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], max_new_tokens=1)
    assert "".join(map(chr, engine.submitted[0].prompt)) == "<system>S<user>Q"
    with pytest.raises(GenerationError, match="the user speaks first") as refused:
        client.generate([{"role": "assistant", "content": "I begin"}])
    assert (refused.value.status, refused.value.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")


def test_long_texts_are_tokenized_off_the_event_loop(client: Client, engine: FakeEngine) -> None:
    with pytest.raises(GenerationError) as refused:
        client.generate("x" * (INLINE_CHARS + 1))
    assert refused.value.reason == "CONTEXT_EXCEEDED"
    assert all(name.startswith("loraplex-tokenize") for name in engine.text.threads)


def test_one_id_chosen_twice_is_two_requests(client: Client, engine: FakeEngine) -> None:
    engine.gate.clear()
    with client.stream("x", request_id="same") as kept:
        with client.stream("y", request_id="same"):
            assert engine.wait_running(2)
        assert engine.wait_running(1)  # only the second was cancelled
        engine.gate.set()
        assert "".join(chunk.text for chunk in kept).startswith("abc")
        assert kept.answer is not None and kept.answer.request_id == "same"


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
def test_an_abandoned_call_is_cancelled_in_the_engine(server: RunningServer, engine: FakeEngine, how: str) -> None:
    engine.gate.clear()
    client = Client(server.address)
    stream = client.stream("x", **({"timeout": 0.3} if how == "deadline" else {}))
    assert engine.wait_running(1)
    match how:
        case "cancel":
            stream.cancel()
        case "disconnect":
            client.close()
        case "deadline":
            with pytest.raises(GenerationError) as late:
                list(stream)
            assert late.value.status == "DEADLINE_EXCEEDED"
    assert engine.wait_idle()
    client.close()


def test_a_killed_client_frees_what_it_held(server: RunningServer, engine: FakeEngine) -> None:
    engine.gate.clear()
    script = f"from server.client import Client; list(Client({server.address!r}).stream('x'))"
    with subprocess.Popen([sys.executable, "-c", script]) as killed:
        assert engine.wait_running(1, seconds=20)
        killed.kill()
    assert engine.wait_idle()


def test_an_abandoned_unary_call_is_cancelled_too(client: Client, engine: FakeEngine) -> None:
    engine.gate.clear()
    with pytest.raises(GenerationError) as late:
        client.generate("x", timeout=0.2)
    assert late.value.status == "DEADLINE_EXCEEDED"
    assert engine.wait_idle()


def test_an_error_in_the_middle_of_a_stream_keeps_what_came_before(client: Client, engine: FakeEngine) -> None:
    from server.errors import NonFiniteLogits

    engine.gate.clear()
    with client.stream("x", adapters="team/b") as stream:
        engine.failures["team/b@1"] = NonFiniteLogits("the model's output for this request is not a number")
        engine.gate.set()
        with pytest.raises(GenerationError, match="not a number") as failed:
            list(stream)
    assert (failed.value.status, failed.value.reason) == ("INTERNAL", "NON_FINITE_OUTPUT")
    assert [each.version for each in stream.adapters] == ["team/b@1"]


def test_an_unknown_exception_says_nothing_of_itself(
    client: Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refuse = KeyError("/secret/path")
    with pytest.raises(GenerationError) as failed:
        client.generate("x", request_id="order 7")
    assert (failed.value.status, failed.value.reason, failed.value.message) == (
        "INTERNAL",
        "INTERNAL",
        "internal error",
    )
    assert "/secret/path" in caplog.text  # for us
    assert "loraplex.v1.Inference/Generate (request 'order 7') failed" in caplog.text


@pytest.mark.parametrize(
    ("raised", "status", "reason"),
    [
        (Unauthenticated("the token caf49 of srv was revoked"), "FAILED_PRECONDITION", "HUB_REFUSES"),
        (HubUnavailable("the hub cannot be used", "caf49 is no database of srv"), "UNAVAILABLE", "HUB_UNAVAILABLE"),
    ],
    ids=["own token", "database"],
)
def test_how_the_server_stands_with_its_hub_is_told_to_its_log_alone(
    client: Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture, raised: Exception, status: str, reason: str
) -> None:
    engine.refuse = raised
    with pytest.raises(GenerationError) as failed:
        client.generate("x")
    assert (failed.value.status, failed.value.reason) == (status, reason)
    assert "caf49" not in failed.value.message
    assert f"loraplex.v1.Inference/Generate: {raised}" in caplog.text


def test_tokenize_and_model_info(client: Client) -> None:
    tokens = client.tokenize("hi")
    assert [(token.id, token.text) for token in tokens] == [(104, "h"), (105, "i")]
    info = client.model_info()
    assert (info.base, info.quantization, info.dtype, info.context_tokens) == ("fake-base", "nf4", "bfloat16", 400)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info.server_version)


def test_many_streams_at_once_keep_their_order(client: Client) -> None:
    results: dict[int, Any] = {}

    def read(index: int) -> None:
        with client.stream(f"prompt {index}", max_new_tokens=20 + index) as stream:
            results[index] = "".join(chunk.text for chunk in stream)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    letters = "abcdefghijklmnopqrstuvwxyz" * 3
    assert results == {index: letters[: 20 + index] for index in range(32)}
