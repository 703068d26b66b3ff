"""Prompts that are only read, among others: they change nobody's answer, leave nothing behind and are found nowhere."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.outbox import BlockingOutbox, Outbox
from server.engine.request import AdapterUse, Request, Stopping
from server.errors import Cancelled, Draining, EngineFailed, NonFiniteLogits, QueueFull
from tests.server.engine.pretend import Counts, Reader

_ids = iter(range(10**9))
LAYER = 1


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, make_adapter: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "lora": make_adapter(tiny_base, root / "lora", seed=1, r=8, b_std=0.3),
        "norms": make_adapter(tiny_base, root / "norms", seed=2, r=8, b_std=0.3, modules_to_save=["input_layernorm"]),
        "dora": make_adapter(tiny_base, root / "dora", seed=3, r=8, b_std=0.3, use_dora=True),
    }


class World:
    """An engine whose steps the test makes."""

    def __init__(self, base: Path, fetch: Any, **limits: Any) -> None:
        self.counts = Counts()
        settings = {"adapter_memory_bytes": 4 << 20, "kv_memory_bytes": 2 << 20, "max_batch_tokens": 32, **limits}
        model = ModelConfig(base=str(base), quantization="none", dtype="float32", threads=1)
        self.engine = Engine.build(model, EngineLimits(**settings), fetch, self.counts)
        self.engine.reads(LAYER)

    def submit(self, asked: Request) -> Reader:
        reader = Reader()
        self.engine.submit(asked, reader)
        return reader

    def step(self) -> None:
        self.engine._loop.advance()

    def finish(self, *readers: Reader) -> None:
        while not all(reader.ended for reader in readers):
            self.step()

    def read(self, prompt: list[int]) -> torch.Tensor:
        reader = self.submit(reading(prompt))
        self.finish(reader)
        return embedding_of(reader)

    def check_empty(self) -> None:
        self.engine.check_integrity()
        assert self.engine._pages.used == 0
        assert self.engine.adapters.leases() == 0
        assert not self.engine._door.inside()


@pytest.fixture
def world(tiny_base: Path, adapters: dict[str, Path], directory_fetch: Callable[..., Any]) -> Iterator[World]:
    world = World(tiny_base, directory_fetch(adapters))
    yield world
    world.check_empty()
    world.engine.close()


def reading(prompt: list[int], tenant: str = "") -> Request:
    return Request(str(next(_ids)), tuple(prompt), Stopping(max_new_tokens=1), tenant=tenant, read_layer=LAYER)


def asking(prompt: list[int], *adapters: str, new: int = 24) -> Request:
    uses = tuple(AdapterUse(name, f"t/{name}@1") for name in adapters)
    return Request(str(next(_ids)), tuple(prompt), Stopping(new, ignore_eos=True), adapters=uses)


def embedding_of(reader: Reader) -> torch.Tensor:
    assert reader.error is None
    [delta] = reader.deltas
    assert delta.embedding is not None
    return delta.embedding


def draw(length: int) -> list[int]:
    return [random.randrange(256) for _ in range(length)]


def test_readings_beside_answers_change_nothing(world: World) -> None:
    """Answers of every kind of adapter, with prompts read in the same steps; each compared with itself alone."""
    asked = [asking(draw(random.randrange(1, 70)), *names) for names in ((), ("lora",), ("norms",), ("dora",), ())]
    prompts = [draw(length) for length in (1, 15, 16, 33, 100)]
    alone = []
    for one in asked:
        reader = world.submit(asking(list(one.prompt), *(use.digest for use in one.adapters)))
        world.finish(reader)
        alone.append(reader.token_ids)
    read_alone = [world.read(prompt) for prompt in prompts]
    answers, readings = [], []
    for one, prompt in zip(asked, prompts, strict=True):
        answers.append(world.submit(one))
        world.step()
        readings.append(world.submit(reading(prompt)))
        world.step()
    world.finish(*answers, *readings)
    assert [reader.token_ids for reader in answers] == alone
    for reader, wanted in zip(readings, read_alone, strict=True):
        torch.testing.assert_close(embedding_of(reader), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_prompt_is_read_while_a_crowded_step_rests(
    tiny_base: Path, adapters: dict[str, Path], directory_fetch: Callable[..., Any]
) -> None:
    world = World(tiny_base, directory_fetch(adapters), max_sequences=4)
    if world.engine._loop._resting is None:
        pytest.skip("no C compiler here: no step rests")
    prompt, flood = draw(20), [draw(6) for _ in range(8)]
    wanted = world.read(prompt)
    alone = []
    for one in flood:
        reader = world.submit(asking(one, "lora", new=8))
        world.finish(reader)
        alone.append(reader.token_ids)
    readers = [world.submit(asking(one, "lora", new=8)) for one in flood]
    world.step()
    world.step()
    loop, came = world.engine._loop, []
    rest = loop._at_rest

    def arrive() -> None:
        if not came:
            came.append(world.submit(reading(prompt, tenant="modest")))
        rest()

    loop._at_rest = arrive  # type: ignore[method-assign]
    world.step()
    assert came[0].ended and world.counts.interludes == 1
    torch.testing.assert_close(embedding_of(came[0]), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    world.finish(*readers)
    assert [reader.token_ids for reader in readers] == alone
    world.check_empty()
    world.engine.close()


def test_nothing_read_is_found_again(world: World) -> None:
    """Its pages hold the first layers alone: an answer that began with them would be another."""
    prompt = draw(80)
    first = world.submit(asking(prompt))
    world.finish(first)
    kept = world.engine._pages.cached
    assert kept == 6
    wanted = world.read(prompt)  # begins with nobody's pages: it needs every token's states
    assert world.counts.hit_tokens == 0
    assert world.engine._pages.cached == kept
    other = draw(80)
    assert torch.equal(world.read(other), world.read(other))
    assert world.engine._pages.cached == kept
    second, third = world.submit(asking(other)), world.submit(asking(prompt))
    world.finish(second, third)
    assert third.token_ids == first.token_ids
    assert world.counts.hit_tokens == 64  # the third's, of the first
    assert torch.equal(world.read(prompt), wanted)


def test_a_reading_thrown_out_between_two_chunks_begins_anew(world: World) -> None:
    prompt = draw(100)
    wanted = world.read(prompt)
    reader = world.submit(reading(prompt))
    world.step()
    [sequence] = world.engine._scheduler.running
    assert sequence.computed == 32
    world.engine._scheduler._preempt(sequence)
    world.engine.check_integrity()
    assert world.engine._pages.used == 0
    world.finish(reader)
    assert torch.equal(embedding_of(reader), wanted)


def test_pages_are_few(tiny_base: Path, directory_fetch: Callable[..., Any]) -> None:
    """Not enough for two readings, and less while answers grow: they take turns, and everybody has what is his."""
    world = World(tiny_base, directory_fetch({}), kv_memory_bytes=16 * 16 * 512, prefix_cache=False)
    assert world.engine._pages.pages == 16
    prompts = [draw(150) for _ in range(3)]
    wanted = [world.read(prompt) for prompt in prompts]
    answers = [world.submit(asking(draw(8), new=120)) for _ in range(2)]
    world.step()
    readings = [world.submit(reading(prompt, tenant=f"tenant {n}")) for n, prompt in enumerate(prompts)]
    world.finish(*answers, *readings)
    for reader, one in zip(readings, wanted, strict=True):
        torch.testing.assert_close(embedding_of(reader), one, rtol=0, atol=1e-5 * float(one.abs().max()))
    assert all(len(reader.token_ids) == 120 for reader in answers)
    world.check_empty()
    world.engine.close()


def test_cancelled_while_waiting_and_between_two_chunks(world: World) -> None:
    answer = world.submit(asking(draw(5), "lora", new=6))
    waits, runs = reading(draw(100)), reading(draw(100))
    readers = [world.submit(runs)]
    world.step()
    assert world.engine._pages.used > 0
    readers.append(world.submit(waits))
    for one in (waits, runs):
        world.engine.cancel(one.id)
    world.step()
    assert all(isinstance(reader.error, Cancelled) for reader in readers)
    world.finish(answer)
    assert len(answer.token_ids) == 6


def test_numbers_that_are_not_finite_harm_only_their_own_prompt(world: World) -> None:
    wanted = world.read(draw(40))

    def hurt(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill((args[0] == 7)[..., None], float("nan"))

    hook = world.engine.base.model.get_input_embeddings().register_forward_hook(hurt)
    prompt = [random.randrange(8, 256) for _ in range(40)]
    readers = [world.submit(reading(one)) for one in (prompt, [7, *prompt])]
    world.finish(*readers)
    hook.remove()
    assert torch.isfinite(embedding_of(readers[0])).all() and wanted.isfinite().all()
    assert isinstance(readers[1].error, NonFiniteLogits)
    assert all(
        cache.isfinite().all() for cache in (*world.engine._computing.runner.kv.k, *world.engine._computing.runner.kv.v)
    )


def test_a_step_of_readings_that_fails_ends_them_alone(world: World, caplog: pytest.LogCaptureFixture) -> None:
    answer = world.submit(asking(draw(5), new=4))

    def broken(shares: Any) -> Any:
        raise RuntimeError("a made-up failure")

    read, world.engine._loop._read = world.engine._loop._read, broken
    reader = world.submit(reading(draw(10)))
    world.finish(answer, reader)
    assert isinstance(reader.error, EngineFailed)
    assert len(answer.token_ids) == 4
    assert "made-up" in caplog.text
    world.engine._loop._read = read
    assert world.read(draw(10)).isfinite().all()


def test_readings_keep_to_the_bounds_of_a_step_and_of_the_queue(
    tiny_base: Path, directory_fetch: Callable[..., Any]
) -> None:
    world = World(tiny_base, directory_fetch({}), max_waiting=3)
    seen: list[int] = []
    read = world.engine._loop._read

    def watched(shares: Any) -> Any:
        seen.append(sum(share.tokens for share in shares))
        return read(shares)

    world.engine._loop._read = watched
    readers = [world.submit(reading(draw(100))) for _ in range(3)]
    with pytest.raises(QueueFull):
        world.submit(reading(draw(1)))
    world.finish(*readers)
    assert sum(seen) == 300 and max(seen) == 32
    assert world.counts.step_of_first_token == {}
    world.check_empty()
    world.engine.close()


def test_readings_by_threads_and_at_the_end(tiny_base: Path, directory_fetch: Callable[..., Any]) -> None:
    """The engine's own thread; who is inside when it closes hears of it."""
    world = World(tiny_base, directory_fetch({}))
    engine = world.engine
    engine.start()
    outboxes = []
    for _ in range(20):
        outbox = BlockingOutbox()
        engine.submit(reading(draw(50)), outbox)
        outboxes.append(outbox)
    assert all([delta.embedding is not None for delta in outbox] == [True] for outbox in outboxes)
    late: Outbox = BlockingOutbox()
    engine.submit(reading(draw(400)), late)
    engine.close()
    last = late.take()
    assert last is not None and (last.embedding is not None or isinstance(last.error, Draining))
    with pytest.raises(Draining):
        engine.submit(reading([1]), Outbox(lambda: None))
