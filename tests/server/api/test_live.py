"""The whole server on a tiny random Llama: real hub, real engine, real gRPC."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hub.errors import VersionHeld
from hub.hub import Hub
from server.adapters.directory import hub_fetch
from server.client import AsyncClient, Client, GenerationError
from server.config import MIB, EngineLimits, ModelConfig
from server.metrics import Metrics
from tests.conftest import write_byte_tokenizer, write_tiny_llama
from tests.server.api.fakes import RunningServer
from tests.server.api.test_metrics import samples
from tests.waiting import eventually

LONG = 480  # tokens: about a second of this model, and with the prompts all of its context
PROMPT = "The quick brown fox"


@dataclass(frozen=True)
class World:
    base: Path
    hub_directory: Path
    hub: Hub
    server: RunningServer

    @property
    def client(self) -> Client:
        return Client(self.server.address)

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether the engine comes to rest with nothing held."""
        engine, pause = self.server.engine, threading.Event()
        for _ in range(int(seconds / 0.01)):
            now = engine.snapshot()
            if (now.running, now.waiting, now.kv_pages_used, engine.adapters.leases()) == (0, 0, 0, 0):
                return True
            pause.wait(0.01)
        return False


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, make_adapter: Callable[..., Path]
) -> Iterator[World]:
    from server.engine.engine import Engine

    root = tmp_path_factory.mktemp("live")
    with Hub.open(str(root / "hub")) as hub:
        for seed, (name, rank) in enumerate({"a": 4, "b": 8, "c": 24, "d": 64}.items()):
            adapter = make_adapter(tiny_base, root / name, seed=seed, r=rank, lora_alpha=2 * rank, b_std=0.3)
            hub.push(adapter, f"team/{name}", base=str(tiny_base))
        metrics = Metrics(max_lora=64)
        engine = Engine.build(
            ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1),
            EngineLimits(kv_memory_bytes=32 * MIB, adapter_memory_bytes=2 * MIB),
            hub_fetch(hub),
            metrics,
        )
        server = RunningServer(engine, hub, metrics=metrics)
        server.serve()
        yield World(tiny_base, root / "hub", hub, server)
        server.close()


def tokens(client: Client, adapters: object, count: int) -> tuple[int, ...]:
    answer = client.generate(PROMPT, adapters, max_new_tokens=count, ignore_eos=True)  # type: ignore[arg-type]
    return answer.token_ids


def test_a_mixed_batch_answers_as_each_alone(world: World) -> None:
    asked = [None, "team/a", "team/b@1", "team/c", "team/d", ["team/a", "team/b"], [("team/c", -0.5)]]
    with world.client as client:
        alone = [tokens(client, adapters, 48) for adapters in asked]

    async def together() -> list[tuple[int, ...]]:
        async with AsyncClient(world.server.address) as client:
            calls = (client.generate(PROMPT, adapters, max_new_tokens=48, ignore_eos=True) for adapters in asked)  # type: ignore[arg-type]
            return [answer.token_ids for answer in await asyncio.gather(*calls)]

    assert asyncio.run(together()) == alone
    assert len(set(alone)) == len(asked)  # every adapter changes the answer
    assert samples(world.server.metrics)[("loraplex_batch_adapters_max",)] >= 4


def test_an_alias_moves_while_a_stream_runs(world: World, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    second = make_adapter(world.base, tmp_path / "second", seed=99, r=16, b_std=0.3)
    world.hub.tag("team/a@1", "prod")
    with world.client as client:
        old = tokens(client, "team/a@1", LONG)
        with client.stream(PROMPT, "team/a:prod", max_new_tokens=LONG, ignore_eos=True) as stream:
            next(stream)
            world.hub.push(second, "team/a:prod", base=str(world.base))
            while (answer := client.generate("x", "team/a:prod", max_new_tokens=1)).adapters[0].version != "team/a@2":
                assert answer.adapters[0].version == "team/a@1"
            # The next call answers from @2 while the stream is still on @1 …
            assert "team/a@1" in world.server.engine.snapshot().running_adapters
            list(stream)
        assert stream.answer is not None
        # … which it keeps to the last token.
        assert [each.version for each in stream.answer.adapters] == ["team/a@1"]
        assert stream.answer.token_ids == old
        assert tokens(client, "team/a:prod", 16) == tokens(client, "team/a@2", 16) != old[:16]


def test_unloading_in_use_waits_for_the_last_request(world: World) -> None:
    with world.client as client:
        before = tokens(client, "team/b", LONG)
        with client.stream(PROMPT, "team/b", max_new_tokens=LONG, ignore_eos=True) as stream:
            next(stream)
            assert client.unload("team/b") is False
            assert [each.draining for each in client.adapters() if each.version == "team/b@1"] == [True]
            list(stream)
        assert stream.answer is not None and stream.answer.token_ids == before
        assert world.idle()
        assert "team/b@1" not in {each.version for each in client.adapters()}
        held = client.load("team/b")
        assert (held.tier, held.rank) == ("device", 8)
        assert [each.requests_in_flight for each in client.adapters() if each.digest == held.digest] == [0]
        assert client.unload("team/b") is True
        assert tokens(client, "team/b", 16) == before[:16]


def test_a_storm_of_cancels_leaves_nothing_behind(world: World) -> None:
    chance = random.Random(3)

    async def one(client: AsyncClient, index: int) -> None:
        adapter = chance.choice([None, "team/a", "team/b", "team/c", "team/d"])
        read = chance.randrange(4)
        async with await client.stream(f"{index} " * chance.randint(1, 20), adapter, max_new_tokens=100) as stream:
            async for _ in stream:
                if not (read := read - 1) > 0:
                    break

    async def storm() -> None:
        async with AsyncClient(world.server.address) as client:
            for _ in range(5):
                await asyncio.gather(*(one(client, index) for index in range(60)))

    asyncio.run(storm())
    assert world.idle()
    world.server.engine.check_integrity()
    with world.client as client:
        assert client.generate(PROMPT, max_new_tokens=4).completion_tokens > 0


def test_newcomers_beside_a_flood_are_answered_between_layers(world: World) -> None:
    """Twice as many as run at once ask for one adapter; meanwhile another caller comes back again and again."""

    async def flood_and_newcomer() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        async with AsyncClient(world.server.address) as client:
            crowd = [
                asyncio.ensure_future(client.generate(PROMPT, "team/b", max_new_tokens=60, ignore_eos=True))
                for _ in range(128)
            ]
            answers = []
            while not all(each.done() for each in crowd):
                answer = await client.generate(PROMPT, "team/c", max_new_tokens=2, ignore_eos=True)
                answers.append(answer.token_ids)
            return [(await each).token_ids for each in crowd], answers

    with world.client as client:
        alone = tokens(client, "team/b", 60), tokens(client, "team/c", 2)
    before = samples(world.server.metrics)[("loraplex_interlude_seconds_total",)]
    crowd, answers = asyncio.run(flood_and_newcomer())
    assert samples(world.server.metrics)[("loraplex_interlude_seconds_total",)] > before
    assert len(answers) > 1
    assert (set(crowd), set(answers)) == ({alone[0]}, {alone[1]})
    assert world.idle()
    world.server.engine.check_integrity()


def test_errors_that_show_only_when_an_adapter_is_loaded(
    world: World, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write_tiny_llama(other, seed=5)
    write_byte_tokenizer(other)
    world.hub.push(make_adapter(other, tmp_path / "stranger", seed=5), "team/stranger", base=str(other))
    digest = world.hub.push(make_adapter(world.base, tmp_path / "hurt", seed=6), "team/hurt").version
    entry = digest.manifest.files["adapter_model.safetensors"]
    (blob,) = [path for path in world.hub_directory.rglob("*") if path.name.endswith(entry.sha256.hex[4:])]
    blob.chmod(0o600)
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    with world.client as client, client.stream(PROMPT, "team/a", max_new_tokens=LONG, ignore_eos=True) as neighbour:
        for ref, status, reason in (
            ("team/stranger", "FAILED_PRECONDITION", "BASE_MISMATCH"),
            ("team/hurt", "DATA_LOSS", "BLOB_CORRUPT"),
        ):
            with pytest.raises(GenerationError) as refused:
                client.generate("x", ref)
            assert (refused.value.status, refused.value.reason) == (status, reason)
            assert str(tmp_path) not in refused.value.message
            with pytest.raises(GenerationError):
                client.load(ref)
        list(neighbour)
        assert neighbour.answer is not None and neighbour.answer.completion_tokens == LONG


@pytest.fixture
def process(world: World) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`hub serve` as a process, and its gRPC address."""
    command = [sys.executable, "-c", "from hub.cli import main; main()", "serve", "--base", str(world.base)]
    command += ["--quantize", "none", "--dtype", "float32", "--listen", "127.0.0.1:0", "--metrics-port", "0"]
    command += ["--hub", str(world.hub_directory), "--kv-memory", "32MiB", "--adapter-memory", "2MiB", "--threads", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONWARNINGS": "error"}
    ) as served:
        try:
            assert served.stdout is not None
            line = served.stdout.readline()
            facts = dict(pair.split("=", 1) for pair in line.split()[1:])
            assert line.startswith("ready "), served.stderr and served.stderr.read()
            assert facts["base"] == world.base.name and facts["quantization"] == "none"
            assert facts["metrics"].startswith("http://127.0.0.1:") and facts["metrics"].endswith("/metrics")
            yield served, facts["grpc"]
        finally:
            served.kill()


def test_sigterm_lets_streams_end(process: tuple[subprocess.Popen[str], str]) -> None:
    served, address = process
    with Client(address) as client:
        with client.stream(PROMPT, "team/d", max_new_tokens=LONG, ignore_eos=True) as stream:
            next(stream)
            served.send_signal(signal.SIGTERM)
            list(stream)
        assert stream.answer is not None and stream.answer.completion_tokens == LONG
    _, errors = served.communicate(timeout=20)
    assert served.returncode == 0, errors
    assert errors.splitlines()[-1] == "stopped"
    assert "Traceback" not in errors


def test_a_second_signal_stops_at_once(process: tuple[subprocess.Popen[str], str]) -> None:
    served, address = process
    with Client(address) as client:
        streams = [client.stream(PROMPT, max_new_tokens=LONG, ignore_eos=True) for _ in range(32)]
        next(streams[0])
        served.send_signal(signal.SIGTERM)
        assert served.stderr is not None
        while "draining" not in served.stderr.readline():
            pass
        served.send_signal(signal.SIGTERM)
        ends = []
        for stream in streams:
            try:
                list(stream)
            except GenerationError as error:
                ends.append(error.reason)
        assert set(ends) == {"DRAINING"}
    _, errors = served.communicate(timeout=20)
    assert served.returncode == 1, errors
    assert errors.splitlines()[-1] == "stopped; calls still running were cut off"


def test_a_canary_is_sticky_by_key_and_each_version_answers_as_itself(
    world: World, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Split, widened and ended while requests run: the hub's own resolution and the server's agree on every key."""
    for seed in (201, 202):
        made = make_adapter(world.base, tmp_path / str(seed), seed=seed, r=8, b_std=0.3)
        world.hub.push(made, "team/canary", base=str(world.base))
    keys = [f"user-{number}" for number in range(40)]
    with world.client as client:
        alone = {f"team/canary@{n}": tokens(client, f"team/canary@{n}", 12) for n in (1, 2)}
        assert alone["team/canary@1"] != alone["team/canary@2"]
        before: set[str] = set()
        for weights in ((90, 10), (60, 40), (10, 90)):
            world.hub.split([("team/canary@1", weights[0]), ("team/canary@2", weights[1])], "prod")
            wanted = {key: world.hub.resolve("team/canary:prod", key).text for key in keys}

            def answer(key: str) -> tuple[str, tuple[int, ...]]:
                got = client.generate(PROMPT, "team/canary:prod", max_new_tokens=12, ignore_eos=True, routing_key=key)
                return got.adapters[0].version, got.token_ids

            for _ in range(200):  # the server follows the hub's events
                if all(answer(key)[0] == wanted[key] for key in keys[:8]):
                    break
            got = {key: answer(key) for key in keys}
            assert {key: version for key, (version, _) in got.items()} == wanted
            assert all(token_ids == alone[version] for version, token_ids in got.values())
            newer = {key for key, version in wanted.items() if version == "team/canary@2"}
            assert before <= newer, "a key that had the growing version lost it"
            before = newer
            heaviest = client.generate(PROMPT, "team/canary:prod", max_new_tokens=1).adapters[0].version
            assert heaviest == world.hub.resolve("team/canary:prod").text
        assert 0 < len(before) < len(keys)
        for bad in ("", "x" * 257):
            with pytest.raises(GenerationError) as refused:
                client.generate("x", "team/canary:prod", routing_key=bad)
            assert refused.value.status == "INVALID_ARGUMENT"
    seen = samples(world.server.metrics)
    for version in alone:
        assert seen[("loraplex_version_requests_total", "ok", version)] > 40


def test_a_server_leases_what_it_holds_and_its_leases_end_with_it(
    world: World, process: tuple[subprocess.Popen[str], str]
) -> None:
    served, address = process
    with Client(address) as client:
        version = client.generate(PROMPT, "team/c", max_new_tokens=2).adapters[0].version
        world.hub.untag("team/c", "latest")
        try:
            assert eventually(lambda: [lease.version for lease in world.hub.leases("team/c")] == [1])
            with pytest.raises(VersionHeld, match="hub serve on"):
                world.hub.remove(version)
            client.unload(version)
            assert eventually(lambda: world.hub.leases("team/c") == [])
            client.generate(PROMPT, version, max_new_tokens=2)
            assert eventually(lambda: len(world.hub.leases("team/c")) == 1)
        finally:
            world.hub.tag(version, "latest")
    served.send_signal(signal.SIGTERM)
    served.communicate(timeout=20)
    assert world.hub.leases("team/c") == []
