"""--deterministic: a request's bits are its own, in the served precision, alone and in any company and order."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import EngineLimits, ModelConfig
from server.engine.engine import Completion, Engine
from server.engine.request import AdapterUse, Request, Sampling, Stopping, Structure
from server.errors import DeterminismUnavailable, UnsupportedAdapter
from tests.conftest import write_byte_tokenizer, write_tiny_llama

_ids = iter(range(10**9))
RANKS = {"a": 8, "b": 5, "c": 24, "d": 16}


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, make_adapter: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(tiny_base, root / name, seed=rank, r=rank) for name, rank in RANKS.items()}


def build(base: str, fetch: Any, quantization: Any, dtype: str, **limits: Any) -> Engine:
    settings = {
        "adapter_memory_bytes": 4 << 20,
        "kv_memory_bytes": 4 << 20,
        "max_sequences": 24,
        "max_batch_tokens": 40,
        "deterministic": True,
        **limits,
    }
    return Engine.build(
        ModelConfig(base=base, quantization=quantization, dtype=dtype, threads=1), EngineLimits(**settings), fetch
    )


def draw(rng: random.Random, names: list[str], vocabulary: int, longest: int = 90) -> Request:
    chosen = rng.sample(names, min(rng.choice([0, 1, 1, 2]), len(names)))
    return Request(
        id=str(next(_ids)),
        prompt=tuple(rng.randrange(vocabulary) for _ in range(rng.randrange(1, longest))),
        stopping=Stopping(max_new_tokens=rng.randrange(1, 14), ignore_eos=True),
        sampling=Sampling(temperature=rng.choice([0.0, 0.9]), seed=rng.getrandbits(40)),
        adapters=tuple(AdapterUse(name, f"t/{name}@1", rng.choice([1.0, 0.5, -1.25])) for name in chosen),
        logprobs=3,
        structure=Structure("regex", "[a-z]{1,20}") if rng.random() < 0.2 else None,
    )


def again(request: Request) -> Request:
    fields = {name: getattr(request, name) for name in request.__dataclass_fields__ if name not in ("id", "arrival")}
    return Request(id=str(next(_ids)), **fields)


def bits(answer: Completion) -> tuple[Any, ...]:
    assert answer.error is None
    return answer.token_ids, [place for delta in answer.deltas for place in delta.logprobs]


def check_invariant(engine: Engine, other: Engine, requests: list[Request], rng: random.Random) -> None:
    """Alone, all at once, in another order, and on an engine that cuts prompts elsewhere: the same bits."""
    alone = [bits(engine.generate([again(request)])[0]) for request in requests]
    for runner in (engine, engine, other):
        order = list(range(len(requests)))
        rng.shuffle(order)
        answers = runner.generate([again(requests[i]) for i in order])
        for i, answer in zip(order, answers, strict=True):
            assert bits(answer) == alone[i], f"request {i} of {len(requests)} changed in company"


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", "bfloat16"), ("nf4", "bfloat16"), ("none", "float32"), ("int8", "bfloat16")]
)
def test_random_mixes_do_not_change_a_bit(
    tiny_base: Path,
    adapters: dict[str, Path],
    directory_fetch: Callable[..., Any],
    quantization: Any,
    dtype: str,
) -> None:
    rng = random.Random()
    engine = build(str(tiny_base), directory_fetch(adapters), quantization, dtype)
    # Other chunks, other batch sizes, another order of adapters in the arena.
    other = build(str(tiny_base), directory_fetch(adapters), quantization, dtype, max_batch_tokens=23, max_sequences=7)
    try:
        other.generate([draw(rng, [name], 256) for name in ("d", "b")])
        check_invariant(engine, other, [draw(rng, list(RANKS), 256) for _ in range(14)], rng)
    finally:
        engine.close()
        other.close()
        engine.check_integrity()


def test_the_answers_are_those_of_the_ordinary_engine(
    tiny_base: Path, adapters: dict[str, Path], directory_fetch: Callable[..., Any]
) -> None:
    """In float32 the two ways of computing differ by rounding alone."""
    rng = random.Random()
    requests = [draw(rng, list(RANKS), 256) for _ in range(10)]
    ours, plain = (
        build(str(tiny_base), directory_fetch(adapters), "none", "float32", deterministic=deterministic)
        for deterministic in (True, False)
    )
    try:
        pairs = zip(
            ours.generate([again(r) for r in requests]), plain.generate([again(r) for r in requests]), strict=True
        )
        for one, two in pairs:
            assert one.token_ids == two.token_ids
            for (_, left), (_, right) in zip([bits(one)], [bits(two)], strict=True):
                for a, b in zip(left, right, strict=True):
                    assert a.logprob == pytest.approx(b.logprob, abs=2e-4)
    finally:
        ours.close()
        plain.close()


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_rows_that_depend_on_neighbours_are_found_before_serving(tiny_base: Path, quantization: Any) -> None:
    """A module whose result depends on its company, as a library's kernel might: the engine refuses.

    Both schemes: layers in one native call, and layers of int8, which has none.
    """
    from server.engine import rows
    from server.model.base import load_base

    base = load_base(ModelConfig(base=str(tiny_base), quantization=quantization, dtype="bfloat16", threads=1))

    def coupled(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + out[:, -1:] * 2**-5

    base.model.model.embed_tokens.register_forward_hook(coupled)
    with pytest.raises(DeterminismUnavailable, match="neighbours"):
        Engine(base, EngineLimits(kv_memory_bytes=4 << 20, adapter_memory_bytes=1 << 20, deterministic=True), None)  # type: ignore[arg-type]
    assert rows.ROWS == 16  # part of what makes two servers agree


def test_models_that_couple_rows_by_design_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    write_tiny_llama(tmp_path, rope_parameters=rope)
    write_byte_tokenizer(tmp_path)
    with pytest.raises(DeterminismUnavailable, match="rotary"):
        build(str(tmp_path), None, "none", "float32")


@pytest.mark.real
@pytest.mark.timeout(120)
def test_smollm2_in_bfloat16(real_adapters: dict[str, Path], directory_fetch: Callable[..., Any]) -> None:
    rng = random.Random()
    names = ["r6", "r16", "r40"]
    fetch = directory_fetch(real_adapters)
    sizes = {"adapter_memory_bytes": 64 << 20, "kv_memory_bytes": 64 << 20}
    engine = build("smollm2-135m", fetch, "none", "bfloat16", **sizes)
    try:
        requests = [draw(rng, names, 49_000, longest=40) for _ in range(5)]
        check_invariant(engine, engine, requests, rng)
    finally:
        engine.close()


def test_an_adapter_that_is_more_than_rank_rows_is_refused_not_served_wrong(
    tiny_base: Path, tmp_path: Path, make_adapter: Any, directory_fetch: Callable[..., Any]
) -> None:
    dora = make_adapter(tiny_base, tmp_path / "dora", use_dora=True)
    engine = build(str(tiny_base), directory_fetch({"dora": dora}), "none", "float32")
    try:
        asked = Request(
            id="dora", prompt=(1, 2), stopping=Stopping(max_new_tokens=2), adapters=(AdapterUse("dora", "t/dora@1"),)
        )
        error = engine.generate([asked])[0].error
    finally:
        engine.close()
    assert isinstance(error, UnsupportedAdapter)
    assert "deterministic" in str(error)
