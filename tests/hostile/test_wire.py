"""Hostile calls: each gets its status and reason, no word about this machine, and the server serves on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import grpc
import pytest

from protos.loraplex.v1 import inference_pb2 as wire
from protos.loraplex.v1 import inference_pb2_grpc
from server.config import RequestLimits
from tests.server.api.fakes import CONTEXT, VOCABULARY, FakeEngine, FakeHub, RunningServer

Code = grpc.StatusCode
LIMITS = RequestLimits()
INF, NAN = math.inf, math.nan


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[RunningServer, FakeEngine]]:
    engine, hub = FakeEngine(), FakeHub()
    hub.push("team/a")
    hub.push("other-tenant/secret")
    server = RunningServer(engine, hub)
    server.serve()
    yield server, engine
    server.close()


@pytest.fixture
def stub(world: tuple[RunningServer, FakeEngine]) -> Iterator[inference_pb2_grpc.InferenceStub]:
    server, engine = world
    engine.submitted.clear()
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        yield stub
        # Whatever was sent: the next request is answered.
        answer = stub.Generate(wire.GenerateRequest(text="x", max_new_tokens=2, adapters=[_ref("team/a")]))
        assert answer.text == "ab"


def _ref(ref: str) -> wire.AdapterSelection:
    return wire.AdapterSelection(ref=ref)


def ask(**fields: object) -> wire.GenerateRequest:
    return wire.GenerateRequest(**{"text": "x", **fields})  # type: ignore[arg-type]


def sampled(**fields: object) -> wire.GenerateRequest:
    return ask(sampling=wire.Sampling(**fields))  # type: ignore[arg-type]


def prompted(*ids: int) -> wire.GenerateRequest:
    return wire.GenerateRequest(token_ids=wire.TokenIds(ids=ids))


def chat(*messages: tuple[str, str]) -> wire.GenerateRequest:
    return wire.GenerateRequest(
        chat=wire.Chat(messages=[wire.ChatMessage(role=role, content=content) for role, content in messages])
    )


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    error = raised.value
    reason = dict(error.trailing_metadata() or ()).get("loraplex-reason", "")  # type: ignore[attr-defined]
    details = error.details() or ""  # type: ignore[attr-defined]
    assert "/work" not in details and ".py" not in details and "Traceback" not in details
    return error.code(), reason, details  # type: ignore[attr-defined]


def test_row_1_too_large_a_message(stub: inference_pb2_grpc.InferenceStub) -> None:
    code, _, _ = refused(lambda: stub.Generate(ask(text="x" * (LIMITS.max_message_bytes + 1))))
    assert code is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("many", [ask(text="é" * (4 * CONTEXT + 1)), chat(*[("user", "x" * CONTEXT)] * 5)])
def test_row_4_megabytes_are_not_tokenized_to_be_refused(
    many: wire.GenerateRequest, stub: inference_pb2_grpc.InferenceStub
) -> None:
    code, reason, details = refused(lambda: stub.Generate(many))
    assert (code, reason) == (Code.INVALID_ARGUMENT, "CONTEXT_EXCEEDED")
    assert f"characters are at least {CONTEXT + (1 if many.text else CONTEXT // 4)} tokens" in details
    if many.text:
        again = refused(lambda: stub.Tokenize(wire.TokenizeRequest(text=many.text)))
        assert again == (code, reason, details)
        assert len(stub.Tokenize(wire.TokenizeRequest(text=many.text[:-1])).token_ids) == 4 * CONTEXT


def test_row_1_too_much_metadata(stub: inference_pb2_grpc.InferenceStub) -> None:
    padding = (("padding", "x" * (LIMITS.max_metadata_bytes + 1)),)
    code, _, _ = refused(lambda: stub.Generate(ask(max_new_tokens=1), metadata=padding))
    assert code is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("request_message", "reason"),
    [
        # Row 2: nothing to continue.
        (wire.GenerateRequest(), "PROMPT_EMPTY"),
        (wire.GenerateRequest(text=""), "PROMPT_EMPTY"),
        (prompted(), "PROMPT_EMPTY"),
        (chat(), "PROMPT_EMPTY"),
        (wire.GenerateRequest(text="\u200b"), "PROMPT_EMPTY"),  # a text that has no tokens
        (chat(("tool", "x")), "INVALID_REQUEST"),
        (chat(("", "x")), "INVALID_REQUEST"),
        # Row 4: longer than the context, never cut to fit.
        (ask(text="x" * CONTEXT, max_new_tokens=1), "CONTEXT_EXCEEDED"),
        (ask(text="x" * (CONTEXT - 255)), "CONTEXT_EXCEEDED"),  # with the default of 256 new tokens
        (prompted(*[1] * (CONTEXT + 1)), "CONTEXT_EXCEEDED"),
        (chat(*[("user", "")] * (CONTEXT + 1)), "CONTEXT_EXCEEDED"),
        (ask(max_new_tokens=CONTEXT), "CONTEXT_EXCEEDED"),
        # Row 5: numbers to allocate by.
        (ask(max_new_tokens=2**31), "CONTEXT_EXCEEDED"),
        (ask(max_new_tokens=2**32 - 1), "CONTEXT_EXCEEDED"),
        (ask(max_new_tokens=0), "INVALID_REQUEST"),
        (ask(max_new_tokens=5, min_new_tokens=6), "INVALID_REQUEST"),
        (ask(min_new_tokens=2**31), "INVALID_REQUEST"),
        # Row 6: sampling outside its ranges.
        *[(sampled(temperature=value), "INVALID_REQUEST") for value in (NAN, INF, -INF, -1.0, 1e-300, 1e300)],
        *[(sampled(top_p=value), "INVALID_REQUEST") for value in (NAN, 2.0, 0.0, -0.5, INF)],
        *[(sampled(min_p=value), "INVALID_REQUEST") for value in (NAN, 1.0, -0.1)],
        *[(sampled(repetition_penalty=value), "INVALID_REQUEST") for value in (NAN, 0.0, -1.0, INF, 1e-300)],
        *[(sampled(presence_penalty=value), "INVALID_REQUEST") for value in (NAN, 2.5, -2.5)],
        *[(sampled(frequency_penalty=value), "INVALID_REQUEST") for value in (NAN, 2.5, -2.5)],
        *[(sampled(logit_bias={1: value}), "INVALID_REQUEST") for value in (NAN, INF, 101.0, -101.0)],
        (sampled(logit_bias=dict.fromkeys(range(301), 1.0)), "INVALID_REQUEST"),
        # Row 7: no such token.
        (prompted(1, VOCABULARY), "INVALID_REQUEST"),
        (prompted(2**32 - 1), "INVALID_REQUEST"),
        (ask(stop_token_ids=[VOCABULARY]), "INVALID_REQUEST"),
        (sampled(logit_bias={VOCABULARY: 1.0}), "INVALID_REQUEST"),
        # Row 8: −1 travels as 2³²−1.
        (ask(logprobs=2**32 - 1), "INVALID_REQUEST"),
        (ask(logprobs=LIMITS.max_logprobs + 1), "INVALID_REQUEST"),
        # Row 9: too many, too long, empty.
        (ask(stop_strings=["x"] * 10_000), "INVALID_REQUEST"),
        (ask(stop_strings=["x" * 129]), "INVALID_REQUEST"),
        (ask(stop_strings=["ok", ""]), "INVALID_REQUEST"),
        (ask(stop_token_ids=[1] * 65), "INVALID_REQUEST"),
        # Row 10 and 12: a ref is a name, never a path, a URL or something that looks like another name.
        *[
            (ask(adapters=[_ref(ref)]), "REF_INVALID")
            for ref in (
                "",
                "../x",
                "team/../x",
                "/etc/passwd",
                "https://evil.example/x",
                "file:///etc/passwd",
                "hf://org/model",
                "team/%2e%2e",
                "team/a\x00",
                "team/\u0430",  # Cyrillic
                "TEAM/a",
                "team/a/b",
                "team/a@0",
                "team/a@-1",
                "team/a@\u0663",  # Arabic-Indic three
                "team/a:",
                "team/a@sha256:../..",
                "sha256:../..",
                "team/a@sha256:" + "g" * 64,
                "team/a@sha256:" + "0" * 63,
                "x" * 100_000,
                "team/a\n",
                "team/a,team/b",
            )
        ],
        # Weights and how many adapters.
        *[
            (ask(adapters=[wire.AdapterSelection(ref="team/a", weight=value)]), "INVALID_REQUEST")
            for value in (NAN, INF, -INF, 1e300)
        ],
        (ask(adapters=[_ref("team/a")] * 9), "INVALID_REQUEST"),
        # Ids end in logs.
        *[(ask(request_id=value), "INVALID_REQUEST") for value in ("x" * 129, "a\nb", "é", "\x1b[2J")],
    ],
    ids=lambda value: value if isinstance(value, str) else str(value).replace("\n", " ")[:60],
)
def test_rows_2_to_12_invalid_arguments(
    stub: inference_pb2_grpc.InferenceStub,
    world: tuple[RunningServer, FakeEngine],
    request_message: wire.GenerateRequest,
    reason: str,
) -> None:
    for call in (lambda: stub.Generate(request_message), lambda: next(stub.GenerateStream(request_message))):
        code, given, details = refused(call)
        assert (code, given) == (Code.INVALID_ARGUMENT, reason)
        assert 0 < len(details) < 500
    assert world[1].submitted == []  # nothing reached the engine


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Tokenize"])
@pytest.mark.parametrize(
    "raw",
    [
        b"\xff" * 50,
        b"\x12\xff\xff\xff\xff\x0f",  # a length of 2³²−1 with nothing behind it
        b"\x12\x02\xc3\x28",  # bad UTF-8 in the text
        b"\x0a\x02\xc3\x28",
        b"\x0b" * 100_000,  # groups in groups in groups
    ],
    ids=["noise", "lying length", "bad text", "bad id", "deep nesting"],
)
def test_row_3_malformed_messages(world: tuple[RunningServer, FakeEngine], method: str, raw: bytes) -> None:
    with grpc.insecure_channel(world[0].address) as channel:
        code, reason, _ = refused(lambda: channel.unary_unary(f"/loraplex.v1.Inference/{method}")(raw))
    assert (code, reason) == (Code.INVALID_ARGUMENT, "MESSAGE_MALFORMED")


def test_row_3_random_bytes_never_reach_further_than_an_answer(
    stub: inference_pb2_grpc.InferenceStub, world: tuple[RunningServer, FakeEngine]
) -> None:
    chance = random.Random(7)
    valid = ask(adapters=[_ref("team/a")], max_new_tokens=2, stop_strings=["x"]).SerializeToString()
    allowed = {Code.INVALID_ARGUMENT, Code.NOT_FOUND}
    with grpc.insecure_channel(world[0].address) as channel:
        call = channel.unary_unary("/loraplex.v1.Inference/Generate")
        for _ in range(300):
            mutated = bytearray(valid)
            for _ in range(chance.randint(1, 4)):
                mutated[chance.randrange(len(mutated))] = chance.randrange(256)
            try:
                call(bytes(mutated), timeout=10)
            except grpc.RpcError as error:
                assert error.code() in allowed, bytes(mutated)  # type: ignore[attr-defined]


def test_row_11_unknown_and_foreign_adapters_sound_the_same(stub: inference_pb2_grpc.InferenceStub) -> None:
    asked = ["team/nobody", "nobody/at-all", "team/a@7", "team/a:nope", "other-tenant/secret@9"]
    asked.append("team/a@sha256:" + "0" * 64)
    for ref in asked:
        shown = ref if "@" in ref or ":" in ref else f"{ref}:latest"
        message = ask(adapters=[_ref(ref)])
        assert refused(lambda message=message: stub.Generate(message)) == (  # type: ignore[misc]
            Code.NOT_FOUND,
            "ADAPTER_NOT_FOUND",
            f"no adapter {shown}",
        )


@pytest.mark.parametrize("fields", [{}, {"text": ""}, {"chat": wire.Chat()}])
def test_tokenize_refuses_empty_prompts(stub: inference_pb2_grpc.InferenceStub, fields: dict[str, object]) -> None:
    message = wire.TokenizeRequest(**fields)  # type: ignore[arg-type]
    assert refused(lambda: stub.Tokenize(message))[:2] == (Code.INVALID_ARGUMENT, "PROMPT_EMPTY")
