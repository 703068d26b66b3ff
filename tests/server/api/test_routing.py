"""The adapter `auto` over gRPC: a real hub, a real engine on the tiny base, routers fitted by training's own code."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from click.testing import CliRunner

from hub.hub import Hub
from protos.loraplex.v1 import inference_pb2, inference_pb2_grpc
from server.adapters.directory import AdapterDirectory, hub_fetch
from server.api.serving import Parts, serve
from server.cli import serve as serve_command
from server.client import AsyncClient, Client, GenerationError
from server.client_cli import generate
from server.config import MIB, EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.errors import RouterInvalid, RouterMismatch, ServerError
from server.metrics import Metrics
from server.router import Router
from tests.hidden_states import embed
from tests.server.api.fakes import QUIET, RunningServer
from tests.server.api.test_metrics import samples
from tests.waiting import eventually
from training.continual.router import fit, write_router

MOODS = ("a fine film", "dull from start to end", "charming and odd", "the worst of the year", "never a slow minute")
PLACES = ("12 MAIN ST", "4711 HIGH RD", "99 ELM AVE", "1 KING SQ", "350 FIFTH AVE")
STRANGER = "\u00ff" * 30


def mood() -> str:
    return ", ".join(random.choices(MOODS, k=4))


def place() -> str:
    return "; ".join(random.choices(PLACES, k=5))


def reference(base: Path) -> tuple[Any, Callable[[str], list[int]]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model, lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)


@dataclass(frozen=True)
class World:
    base: Path
    hub: Hub
    server: RunningServer
    root: Path
    router: Router

    @property
    def client(self) -> Client:
        return Client(self.server.address)

    def idle(self) -> bool:
        engine = self.server.engine

        def quiet() -> bool:
            now = engine.snapshot()
            return (now.running, now.waiting, now.kv_pages_used, engine.adapters.leases()) == (0, 0, 0, 0)

        return eventually(quiet)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, make_adapter: Callable[..., Path]
) -> Iterator[World]:
    root = tmp_path_factory.mktemp("routing")
    model, encode = reference(tiny_base)
    with Hub.open(str(root / "hub")) as hub:
        for seed, name in enumerate(("team/moods", "team/places", "auto")):
            adapter = make_adapter(tiny_base, root / f"adapter-{seed}", seed=seed, r=8, b_std=0.3)
            hub.push(adapter, name, base=str(tiny_base))
        hub.tag("team/moods@1", "prod")
        metrics = Metrics(max_lora=64)
        engine = Engine.build(
            ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1),
            EngineLimits(kv_memory_bytes=8 * MIB, adapter_memory_bytes=2 * MIB, max_batch_tokens=64),
            hub_fetch(hub),
            metrics,
        )
        asked = {"team/moods:prod": mood, "team/places": place}
        rows = {name: embed(model, [encode(draw()) for _ in range(120)], 1) for name, draw in asked.items()}
        router = fit(rows, 1, engine.base.identity.fingerprint, miss=0.02)
        write_router(router, root / "six")
        server = RunningServer(engine, hub, replace(QUIET, routers=(("six", root / "six"),)), metrics)
        server.serve()
        yield World(tiny_base, hub, server, root, router)
        server.close()
        engine.check_integrity()


def routed_to(world: World, adapter: str, router: str = "six") -> float:
    return samples(world.server.metrics).get(("loraplex_routed_total", adapter, router), 0.0)


def test_each_kind_of_prompt_is_answered_by_its_own_version_and_a_stranger_by_the_base(world: World) -> None:
    model, encode = reference(world.base)
    before = {name: routed_to(world, name) for name in ("team/moods", "team/places", "base")}
    prompts = [*(mood() for _ in range(10)), *(place() for _ in range(10)), *([STRANGER] * 3)]
    seen = dict.fromkeys(before, 0)
    versions = {"team/moods:prod": "team/moods@1", "team/places": "team/places@1"}
    with world.client as client:
        for prompt in prompts:
            wanted = world.router.choose(embed(model, [encode(prompt)], 1)[0])
            answer = client.generate(prompt, "auto", max_new_tokens=8, ignore_eos=True)
            assert answer.routing is not None
            assert (answer.routing.router, answer.routing.chosen, answer.routing.nearest) == (
                "six",
                wanted.adapter or "",
                wanted.nearest,
            )
            assert answer.routing.distance == pytest.approx(wanted.distance, rel=1e-3)
            assert answer.routing.threshold == wanted.threshold
            version = None if wanted.adapter is None else versions[wanted.adapter]
            assert [each.version for each in answer.adapters] == ([version] if version else [])
            named = client.generate(prompt, version, max_new_tokens=8, ignore_eos=True)
            assert (answer.token_ids, named.routing) == (named.token_ids, None)
            assert answer.prompt_tokens == named.prompt_tokens
            seen["base" if version is None else version.partition("@")[0]] += 1
    assert seen["team/moods"] >= 5 and seen["team/places"] >= 5 and seen["base"] >= 3
    assert {name: routed_to(world, name) - n for name, n in before.items()} == seen
    assert world.idle()
    world.server.engine.check_integrity()


def test_a_stream_says_first_how_it_was_chosen_and_when_the_clock_began(world: World) -> None:
    prompt = next(text for text in iter(place, None) if chosen(world, text) == "team/places")
    request = inference_pb2.GenerateRequest(
        text=prompt, max_new_tokens=4, adapters=[inference_pb2.AdapterSelection(ref="auto:six", weight=0.5)]
    )
    with grpc.insecure_channel(world.server.address) as channel:
        first, *rest = inference_pb2_grpc.InferenceStub(channel).GenerateStream(request)
    assert (first.text, first.routing.router, first.routing.chosen) == ("", "six", "team/places")
    assert 0 <= first.routing.distance <= first.routing.threshold
    assert [(each.version, each.weight) for each in first.adapters] == [("team/places@1", 0.5)]
    assert all(not chunk.HasField("routing") for chunk in rest[:-1])
    assert rest[-1].routing == first.routing
    with world.client as client, client.stream(STRANGER, "auto", n=2, max_new_tokens=4) as stream:
        assert stream.routing is not None and not stream.routing.chosen and stream.adapters == ()
        list(stream)
    assert stream.answer is not None and stream.answer.routing == stream.routing
    assert len(stream.answer.candidates) == 2


def test_routing_counts_to_the_first_token(world: World) -> None:
    read, slow = world.server.engine._loop._read, 0.2

    def slowly(shares: Any) -> Any:
        time.sleep(slow)
        return read(shares)

    world.server.engine._loop._read = slowly
    try:
        with world.client as client:
            answer = client.generate("x" * 10, "auto", max_new_tokens=2)
            assert client.generate("x" * 10, max_new_tokens=2).timing.first_token < slow
    finally:
        world.server.engine._loop._read = read
    assert slow < answer.timing.queue < answer.timing.first_token


def test_an_alias_moves_without_a_restart(world: World, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    prompt = next(text for text in iter(mood, None) if chosen(world, text) == "team/moods:prod")
    with world.client as client:
        assert client.generate(prompt, "auto", max_new_tokens=1).adapters[0].version == "team/moods@1"
        world.hub.push(
            make_adapter(world.base, tmp_path / "new", seed=77, b_std=0.3), "team/moods", base=str(world.base)
        )
        assert client.generate(prompt, "auto", max_new_tokens=1).adapters[0].version == "team/moods@1"
        world.hub.tag("team/moods@2", "prod")
        try:
            assert eventually(
                lambda: client.generate(prompt, "auto", max_new_tokens=1).adapters[0].version == "team/moods@2"
            )
        finally:
            world.hub.tag("team/moods@1", "prod")


def chosen(world: World, prompt: str) -> str | None:
    with world.client as client:
        routing = client.generate(prompt, "auto", max_new_tokens=1).routing
    assert routing is not None
    return routing.chosen or None


def test_the_hubs_own_adapter_of_that_name_is_written_with_at(world: World) -> None:
    with world.client as client:
        answer = client.generate("x", "auto@1", max_new_tokens=1)
        assert (answer.adapters[0].version, answer.routing) == ("auto@1", None)
        digest = answer.adapters[0].digest
        assert client.generate("x", f"auto@{digest}", max_new_tokens=1).adapters[0].version == "auto@1"
        assert client.load("auto").version == "auto@1"  # nobody is routed by an administrator


@pytest.mark.parametrize(
    ("adapters", "status", "reason", "words"),
    [
        ("auto:seven", "NOT_FOUND", "ROUTER_NOT_FOUND", "there is no router auto:seven here, but auto:six"),
        ("auto:latest", "NOT_FOUND", "ROUTER_NOT_FOUND", "auto:six"),
        (["auto", "team/moods"], "INVALID_ARGUMENT", "INVALID_REQUEST", "auto stands alone"),
        (["team/moods", "auto:six"], "INVALID_ARGUMENT", "INVALID_REQUEST", "auto stands alone"),
        (["auto", "auto"], "INVALID_ARGUMENT", "INVALID_REQUEST", "auto stands alone"),
        ([("auto", float("nan"))], "INVALID_ARGUMENT", "INVALID_REQUEST", "weight"),
        ("auto:", "INVALID_ARGUMENT", "REF_INVALID", "alias"),
        ("Auto", "INVALID_ARGUMENT", "REF_INVALID", "name"),
        ("team/auto", "NOT_FOUND", "ADAPTER_NOT_FOUND", "team/auto"),
    ],
)
def test_what_is_no_way_to_ask(world: World, adapters: Any, status: str, reason: str, words: str) -> None:
    with world.client as client, pytest.raises(GenerationError) as refused:
        client.generate("x", adapters, max_new_tokens=1)
    assert (refused.value.status, refused.value.reason) == (status, reason)
    assert words in refused.value.message


def test_a_server_without_routers_does_not_take_auto_for_the_hubs(server: RunningServer, fake_hub: Any) -> None:
    fake_hub.push("auto")
    with Client(server.address) as client:
        for ref in ("auto", "auto:latest"):
            with pytest.raises(GenerationError) as refused:
                client.generate("x", ref, max_new_tokens=1)
            assert (refused.value.status, refused.value.reason) == ("NOT_FOUND", "ROUTER_NOT_FOUND")
            assert "auto@3" in refused.value.message
        assert client.generate("x", "auto@1", max_new_tokens=1).adapters[0].version == "auto@1"


def test_cancelled_calls_leave_nothing_behind(world: World) -> None:
    async def one(client: AsyncClient, number: int) -> None:
        call = asyncio.ensure_future(client.generate("word " * 90, "auto", max_new_tokens=3, ignore_eos=True))
        await asyncio.sleep(random.random() * 0.1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    async def storm() -> None:
        async with AsyncClient(world.server.address) as client:
            await asyncio.gather(*(one(client, number) for number in range(60)))

    asyncio.run(storm())
    assert world.idle()
    world.server.engine.check_integrity()
    assert not world.server.engine._door.inside()


def test_many_at_once_are_routed_as_each_alone(world: World) -> None:
    prompts = [random.choice((mood, place, lambda: STRANGER))() for _ in range(40)]
    alone = [chosen(world, prompt) for prompt in prompts]

    async def together() -> list[str | None]:
        async with AsyncClient(world.server.address) as client:
            answers = await asyncio.gather(*(client.generate(text, "auto", max_new_tokens=4) for text in prompts))
            return [answer.routing.chosen or None for answer in answers if answer.routing is not None]

    assert asyncio.run(together()) == alone


def test_the_terminal_shows_the_choice(world: World) -> None:
    def ask(prompt: str, *more: str) -> Any:
        arguments = ["--raw", prompt, "-a", "auto", "--max-new-tokens", "2", "--server", world.server.address, *more]
        result = CliRunner().invoke(generate, arguments)
        assert result.exit_code == 0, result.output
        return result

    prompt = next(text for text in iter(place, None) if chosen(world, text) == "team/places")
    assert ask(prompt).stderr.startswith("team/places@1 · nearest of six: ")
    assert ask(STRANGER).stderr.startswith("base · none of six, nearest team/")
    told = json.loads(ask(STRANGER, "--json").stdout)["routing"]
    assert (told["router"], told["chosen"]) == ("six", "") and told["distance"] > told["threshold"]


def test_several_routers_are_told_apart(world: World) -> None:
    other = replace(
        world.router, names=("team/places", "team/moods:prod"), thresholds=world.router.thresholds * 0 + 1e9
    )
    write_router(other, world.root / "swapped")
    prompt = next(text for text in iter(place, None) if chosen(world, text) == "team/places")
    routers = (("six", world.root / "six"), ("swapped", world.root / "swapped"))
    with serving(world, routers) as address, Client(address) as client:
        for ref, version in (("auto:six", "team/places@1"), ("auto:swapped", "team/moods@1")):
            answer = client.generate(prompt, ref, max_new_tokens=1)
            assert [each.version for each in answer.adapters] == [version]
            assert answer.routing is not None and answer.routing.router == ref.removeprefix("auto:")
        with pytest.raises(GenerationError) as refused:
            client.generate(prompt, "auto", max_new_tokens=1)
        assert (refused.value.status, refused.value.reason) == ("INVALID_ARGUMENT", "ROUTER_UNNAMED")
        assert "auto:six or auto:swapped" in refused.value.message


@contextmanager
def serving(world: World, routers: Any) -> Iterator[str]:
    """A second front before the world's engine; its address."""
    front = RunningServer(Shared(world.server.engine), world.hub, replace(QUIET, routers=routers))
    try:
        front.serve()
        yield front.address
    finally:
        front.close()


class Shared:
    """An engine that somebody else starts and closes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def start(self) -> None:
        """Started already."""

    def close(self) -> None:
        """Goes on."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize(
    ("harm", "error", "words"),
    [
        ("fingerprint", RouterMismatch, "fitted for another base"),
        ("width", RouterMismatch, "of 32 numbers; those of tiny have 64"),
        ("layer", RouterMismatch, "after 3 layers, of which tiny has 2"),
        ("negative", RouterMismatch, "after -1 layers"),
        ("name", RouterInvalid, "no adapter reference"),
        ("nothing", RouterInvalid, "there is no router.json in .*router: `hub continual router` writes"),
    ],
)
def test_a_router_for_another_base_is_refused_at_start(
    world: World, tmp_path: Path, harm: str, error: type[ServerError], words: str
) -> None:
    router = world.router
    harmed = {
        "fingerprint": replace(router, base="sha256:" + "0" * 64),
        "width": replace(router, mean=router.mean[:32], projection=router.projection[:32].contiguous()),
        "layer": replace(router, layer=3),
        "negative": replace(router, layer=-1),
        "name": replace(router, names=("team/moods", "Team Places")),
    }
    if harm in harmed:
        write_router(harmed[harm], tmp_path / "router")
    else:
        (tmp_path / "router").mkdir()
    with pytest.raises(error, match=words), serving(world, (("x", tmp_path / "router"),)):
        pass


@pytest.mark.parametrize(("fitted", "held"), [("none", "nf4"), ("nf4", "int8"), ("int8", "none")])
def test_a_router_for_another_precision_is_refused_with_what_to_do(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitted: Any, held: Any
) -> None:
    """Prompts lie elsewhere than those the router was fitted on."""
    write_router(replace(world.router, quantization=fitted), tmp_path / "router")
    monkeypatch.setattr(world.server.engine, "base", replace(world.server.engine.base, quantization=held))
    with pytest.raises(RouterMismatch) as refused, serving(world, (("x", tmp_path / "router"),)):
        pass
    for words in (f"in the precision {fitted}", f"serve with --quantize {fitted}", f"PLAN RUN --quantize {held} --out"):
        assert words in str(refused.value)


def test_hub_serve_ends_with_the_reason_and_is_never_ready(world: World, tmp_path: Path) -> None:
    write_router(replace(world.router, base="sha256:" + "0" * 64), tmp_path / "router")
    config = replace(QUIET, listen="127.0.0.1:0", routers=(("six", tmp_path / "router"),))
    parts = Parts(lambda: AdapterDirectory(world.hub), lambda metrics: Shared(world.server.engine))  # type: ignore[return-value,arg-type]
    said: list[str] = []
    with pytest.raises(RouterMismatch, match="another base") as refused:
        asyncio.run(serve(config, parts, announce=said.append, progress=lambda line: None))
    assert (refused.value.reason, said) == ("ROUTER_MISMATCH", [])


@pytest.mark.parametrize("options", [("six",), ("Six=x",), ("=x",), ("six=",), ("six=a", "--router", "six=b")])
def test_wrong_usage_of_router_is_2(options: tuple[str, ...]) -> None:
    assert CliRunner().invoke(serve_command, ["--router", *options]).exit_code == 2
