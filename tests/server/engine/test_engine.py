"""The engine's life beyond tokens: cancelling, queues, leases, drains, failures."""

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import EngineLimits, ModelConfig, Quantization
from server.engine.engine import Engine
from server.engine.outbox import BlockingOutbox
from server.engine.request import AdapterUse, Delta, FinishReason, Request, Sampling, Stopping
from server.errors import (
    AdapterUnservable,
    BaseMismatch,
    Cancelled,
    Draining,
    EngineFailed,
    NonFiniteLogits,
    QueueFull,
    RankTooLarge,
    RequestTooLarge,
    TensorUnbound,
    UnsupportedAdapter,
)

_ids = iter(range(10**9))


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, make_adapter: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = {f"a{i}": make_adapter(tiny_base, root / f"a{i}", seed=i, r=8) for i in range(6)}
    made["zero"] = make_adapter(tiny_base, root / "zero", b_std=0.0)
    made["alora"] = make_adapter(tiny_base, root / "alora", alora_invocation_tokens=[5, 6])
    made["big"] = make_adapter(tiny_base, root / "big", r=300)
    return made


@pytest.fixture
def engine(tiny_base: Path, adapters: dict[str, Path], directory_fetch: Callable[..., Any]) -> Iterator[Engine]:
    engine = build(tiny_base, directory_fetch(adapters))
    engine.start()
    yield engine
    engine.close()
    engine.check_integrity()
    assert engine.adapters.leases() == 0
    assert engine.snapshot().running == 0 or not engine._scheduler.running


def build(base: Path, fetch: Any, quantization: Quantization = "none", **limits: int) -> Engine:
    settings = {"adapter_memory_bytes": 4 << 20, "kv_memory_bytes": 2 << 20, "max_sequences": 16, **limits}
    return Engine.build(
        ModelConfig(base=str(base), quantization=quantization, dtype="float32", threads=1),
        EngineLimits(**settings),
        fetch,
    )


def request(
    *adapters: str, prompt: tuple[int, ...] = (1, 2, 3), new: int = 8, sampling: Sampling | None = None, **stopping: Any
) -> Request:
    return Request(
        id=str(next(_ids)),
        prompt=prompt,
        stopping=Stopping(max_new_tokens=new, **{"ignore_eos": True, **stopping}),
        sampling=sampling or Sampling(),
        adapters=tuple(AdapterUse(digest=name, version=f"t/{name}@1") for name in adapters),
    )


def error_of(engine: Engine, name: str) -> Exception | None:
    return engine.generate([request(name)])[0].error


def test_a_cancelled_request_frees_everything_within_two_steps(engine: Engine) -> None:
    steps: list[int] = []
    engine._loop.observer = StepCounter(steps)
    outbox = BlockingOutbox()
    asked = request("a0", new=400)
    engine.submit(asked, outbox)
    stream = iter(outbox)
    next(stream)
    engine.cancel(asked.id)
    before = len(steps)
    last = list(stream)[-1]
    assert isinstance(last.error, Cancelled)
    assert len(steps) - before <= 2
    assert engine.adapters.leases() == 0


class StepCounter:
    """An observer that counts steps."""

    def __init__(self, steps: list[int]) -> None:
        self._steps = steps

    def step(self, *, seconds: float, sequences: int, adapters: int, tokens: int) -> None:
        self._steps.append(sequences)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def test_a_storm_of_cancels_leaks_nothing(engine: Engine) -> None:
    rng = random.Random()
    outboxes = []
    for _ in range(300):
        asked = request(*rng.sample(["a0", "a1", "a2", "a3"], rng.randrange(3)), new=rng.randrange(1, 60))
        outbox = BlockingOutbox()
        engine.submit(asked, outbox)
        outboxes.append(outbox)
        if rng.random() < 0.7:
            threading.Timer(rng.random() * 0.05, engine.cancel, (asked.id,)).start()
    ends = [list(outbox)[-1] for outbox in outboxes]
    assert all(end.finish or isinstance(end.error, Cancelled) for end in ends)
    assert sum(isinstance(end.error, Cancelled) for end in ends) > 10
    assert engine.adapters.leases() == 0
    assert engine._pages.used == 0


def test_what_cannot_be_served_fails_its_request_alone(engine: Engine) -> None:
    good, alora, big, unknown = engine.generate([request("a0"), request("alora"), request("big"), request("missing")])
    assert good.error is None
    assert isinstance(alora.error, UnsupportedAdapter)
    assert "alora" in str(alora.error)
    assert isinstance(big.error, RankTooLarge)
    assert isinstance(unknown.error, KeyError)  # whatever the fetch raised


def test_a_zero_adapter_answers_with_a_warning(engine: Engine) -> None:
    base, zero = engine.generate([request(), request("zero")])
    assert zero.token_ids == base.token_ids
    assert [w for delta in zero.deltas for w in delta.warnings] == [
        "t/zero@1: the adapter changes nothing: its delta is zero everywhere"
    ]


def test_a_tensor_that_binds_to_nothing_is_named(
    tiny_base: Path, adapters: dict[str, Path], tmp_path: Path, directory_fetch: Callable[..., Any]
) -> None:
    from safetensors.torch import load_file, save_file

    def variant(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        target = tmp_path / name
        target.mkdir()
        (target / "adapter_config.json").write_bytes((adapters["a0"] / "adapter_config.json").read_bytes())
        tensors = load_file(adapters["a0"] / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, target / "adapter_model.safetensors")
        return target

    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def extra(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key.replace("layers.0", "layers.7")] = torch.zeros(8, 64)

    def half(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    def wide(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = torch.zeros(8, 65)

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][0, 0] = float("inf")

    made = {change.__name__: variant(change.__name__, change) for change in (extra, half, wide, poison)}
    engine = build(tiny_base, directory_fetch(made))
    try:
        for name, error, named in [
            ("extra", TensorUnbound, "layers.7"),
            ("half", TensorUnbound, "q_proj"),
            ("wide", TensorUnbound, "q_proj"),
            ("poison", AdapterUnservable, "q_proj"),
        ]:
            got = error_of(engine, name)
            assert isinstance(got, error), name
            assert named in str(got)
    finally:
        engine.close()


@pytest.mark.parametrize(("quantization", "held"), [("none", "full precision"), ("int8", "int8"), ("nf4", "")])
def test_what_corrects_nf4_needs_the_base_in_nf4(
    quantization: Quantization, held: str, tiny_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """As `hub eval` reads it from a directory; how the server reads it from a hub: test_directory.py."""
    from hub.facts import Facts
    from training.engine_generator import find_adapters

    shutil.copytree(adapters["a0"], tmp_path / "a")
    Facts(recipe={"method": "qlora", "init": "qera"}).write(tmp_path / "a")
    found = find_adapters([str(tmp_path / "a")], None)
    digest = found.uses[str(tmp_path / "a")].digest
    engine = build(tiny_base, found.fetch, quantization)
    try:
        got = error_of(engine, digest)
        if quantization == "nf4":
            assert got is None
        else:
            assert isinstance(got, BaseMismatch) and f"held in {held} here" in str(got)
    finally:
        engine.close()


def test_another_base_is_refused(tiny_base: Path, adapters: dict[str, Path]) -> None:
    from server.adapters.weights import AdapterFiles

    def fetch(digest: str) -> AdapterFiles:
        directory = adapters["a0"]
        return AdapterFiles(
            digest,
            (directory / "adapter_config.json").read_bytes(),
            (directory / "adapter_model.safetensors").read_bytes(),
            base_name="someone/else",
            base_fingerprint="sha256:" + "0" * 64,
        )

    engine = build(tiny_base, fetch)
    try:
        error = error_of(engine, "a0")
        assert isinstance(error, BaseMismatch)
        assert "someone/else" in str(error)
    finally:
        engine.close()


def test_limits_refuse_before_anything_is_held(
    tiny_base: Path, adapters: dict[str, Path], directory_fetch: Callable[..., Any]
) -> None:
    engine = build(tiny_base, directory_fetch(adapters), max_waiting=2, kv_memory_bytes=64 * 1024)
    try:
        with pytest.raises(RequestTooLarge, match="KV pages"):
            engine.submit(request(new=10_000), BlockingOutbox())
        for _ in range(2):  # the loop does not run yet, so these stay waiting
            engine.submit(request(), BlockingOutbox())
        with pytest.raises(QueueFull):
            engine.submit(request(), BlockingOutbox())
        engine.start()
    finally:
        engine.close()
    with pytest.raises(Draining):
        engine.submit(request(), BlockingOutbox())


def test_drain_lets_the_running_finish_and_takes_no_more(engine: Engine) -> None:
    outbox = BlockingOutbox()
    engine.submit(request("a1", new=40), outbox)
    assert engine.drain(30)
    with pytest.raises(Draining):
        engine.submit(request(), BlockingOutbox())
    assert list(outbox)[-1].finish is not None


def test_closing_ends_what_still_runs(tiny_base: Path, adapters: dict[str, Path], directory_fetch: Any) -> None:
    engine = build(tiny_base, directory_fetch(adapters))
    engine.start()
    outbox = BlockingOutbox()
    engine.submit(request("a0", new=500), outbox)
    engine.close()
    assert isinstance(list(outbox)[-1].error, Draining)


def test_unload_waits_for_the_last_request_then_frees(engine: Engine) -> None:
    outbox = BlockingOutbox()
    engine.submit(request("a0", new=200), outbox)
    stream = iter(outbox)
    next(stream)
    assert engine.adapters.unload("a0") is False
    [status] = engine.adapters.list()
    assert status.draining
    assert list(stream)[-1].finish is not None
    assert engine.adapters.list() == []
    assert engine.adapters.unload("a0") is True


def test_load_is_idempotent_and_needs_no_request(engine: Engine) -> None:
    first = engine.adapters.load("a2", "t/a2@1")
    again = engine.adapters.load("a2", "t/a2@1")
    assert first == again
    assert first.device_bytes > 0
    with pytest.raises(UnsupportedAdapter):
        engine.adapters.load("alora", "t/dora@1")


def test_nan_ends_its_own_row_and_leaves_no_trace(
    tiny_base: Path, adapters: dict[str, Path], directory_fetch: Callable[..., Any]
) -> None:
    """A request whose keys and values become NaN; its pages go to the next requests, whose answers must be clean."""
    engine = build(tiny_base, directory_fetch(adapters), kv_memory_bytes=64 * 1024)
    try:
        clean = engine.generate([request(new=16), request("a1", new=16)])
        arena = engine.adapters._arena
        engine.adapters.load("a0", "t/a0@1")
        start, stop = engine.adapters.rows("a0")
        for site in arena.b:
            arena.b[site][start:stop] = 1e38
        poisoned, *others = engine.generate([request("a0", new=16), request(new=16), request("a1", new=16)])
        assert isinstance(poisoned.error, NonFiniteLogits)
        assert [other.token_ids for other in others] == [c.token_ids for c in clean]
        after = engine.generate([request(new=16), request("a1", new=16)])
        assert [a.token_ids for a in after] == [c.token_ids for c in clean]
    finally:
        engine.close()


def test_a_stop_string_in_the_last_piece_of_text_is_the_reason(engine: Engine) -> None:
    """Half a character comes out as U+FFFD at the very end, where it may be, or complete, a stop string."""
    half = engine.text._tokenizer.convert_tokens_to_ids("\u00c3")  # the byte C3
    for stop, text, reason in (
        ("\ufffd", "", FinishReason.STOP_STRING),
        ("\ufffdz", "\ufffd", FinishReason.LENGTH),
    ):
        sampling = Sampling(logit_bias=((half, 1e6),))
        [answer] = engine.generate([request(new=1, sampling=sampling, stop_strings=(stop,))])
        assert (answer.text, answer.finish_reason) == (text, reason)


def test_a_loop_that_fails_ends_everybody_and_refuses_more(
    tiny_base: Path, adapters: dict[str, Path], directory_fetch: Callable[..., Any], monkeypatch: Any
) -> None:
    engine = build(tiny_base, directory_fetch(adapters))

    def fail() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(engine._scheduler, "schedule", fail)
    outboxes = [BlockingOutbox() for _ in range(3)]
    for outbox in outboxes:
        engine.submit(request("a0"), outbox)
    engine.start()
    for outbox in outboxes:
        assert isinstance([*outbox][-1].error, EngineFailed)
    assert engine.ended.wait(10)
    with pytest.raises(EngineFailed, match="its server ends"):
        engine.submit(request(), BlockingOutbox())
    assert engine.drain(0)  # nobody is inside
    engine.close()


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(engine: Engine, monkeypatch: Any) -> None:
    run = engine._computing.runner.run
    failures = iter([True])

    def fail_once(batch: Any) -> torch.Tensor:
        if next(failures, False):
            raise RuntimeError("a kernel went wrong")
        return run(batch)

    monkeypatch.setattr(engine._computing.runner, "run", fail_once)
    failed = engine.generate([request("a0")])[0]
    assert isinstance(failed.error, EngineFailed)
    assert "kernel" not in str(failed.error)
    assert engine.generate([request("a0")])[0].error is None


def test_stop_reasons(engine: Engine) -> None:
    free = engine.generate([request("a3", new=12)])[0]
    third = free.token_ids[2]
    stopped, cut = engine.generate(
        [
            request("a3", new=12, stop_token_ids=(third,)),
            request("a3", new=12, stop_strings=(free.text[1:3],)),
        ]
    )
    assert free.finish_reason is FinishReason.LENGTH
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(third) + 1]
    assert cut.finish_reason is FinishReason.STOP_STRING
    assert cut.text == free.text[: free.text.find(free.text[1:3])]


def test_a_stop_string_that_begins_before_the_fewest_tokens_ends_the_answer_once_it_is_whole(engine: Engine) -> None:
    letters = sorted(engine.text.encode("abcdefgh"))
    sampling = Sampling(temperature=1.0, seed=5, logit_bias=tuple((token, 100.0) for token in letters))
    [free] = engine.generate([request(new=20, sampling=sampling)])
    stop = free.text[8:12]
    assert free.text.find(stop) == 8 and free.text.count(stop) == 1
    fewest = [0, 8, 9, 10, 11, 12, 13]
    answers = engine.generate(
        [request(new=20, sampling=sampling, stop_strings=(stop,), min_new_tokens=count) for count in fewest]
    )
    for count, answer in zip(fewest, answers, strict=True):
        got = (answer.text, answer.finish_reason, len(answer.token_ids))
        if count <= 12:
            assert got == (free.text[:8], FinishReason.STOP_STRING, 12), count
        else:
            assert got == (free.text, FinishReason.LENGTH, 20), count


def test_a_seed_gives_the_same_answer_in_any_company(engine: Engine) -> None:
    def seeded() -> Request:
        return request("a4", new=20, sampling=Sampling(temperature=1.2, seed=7))

    def other(seed: int) -> Request:
        return request("a5", new=20, sampling=Sampling(temperature=1.0, seed=seed))

    alone = engine.generate([seeded()])[0]
    crowded = engine.generate([other(1), other(2), seeded(), other(3)])
    assert crowded[2].token_ids == alone.token_ids
    assert crowded[0].token_ids != crowded[1].token_ids


def test_an_outbox_joins_what_nobody_takes() -> None:
    wakes: list[int] = []
    from server.engine.outbox import Outbox

    outbox = Outbox(lambda: wakes.append(1))
    for token in range(5):
        outbox.put(Delta(text=str(token), token_ids=[token]))
    joined = outbox.take()
    assert joined is not None
    assert (joined.text, joined.token_ids) == ("01234", [0, 1, 2, 3, 4])
    assert wakes == [1]
    assert outbox.take() is None


def test_an_outbox_keeps_the_end_that_came_first() -> None:
    from server.engine.outbox import Outbox
    from server.engine.request import Finish, Timing, Usage

    outbox = Outbox(lambda: None)
    finish = Finish(FinishReason.LENGTH, Usage(3, 1), Timing(0, 0, 0))
    outbox.put(Delta(text="whole", finish=finish))
    outbox.put(Delta(error=EngineFailed("the step failed")))
    kept = outbox.take()
    assert kept is not None
    assert (kept.text, kept.finish, kept.error) == ("whole", finish, None)
