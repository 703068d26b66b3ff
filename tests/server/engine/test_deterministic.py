"""--deterministic: a request's bits are its own, in the served precision, alone and in any company and order."""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.request import AdapterUse, Request, Sampling, Stopping, Structure
from server.errors import DeterminismUnavailable, NonFiniteLogits
from server.kernels import native
from server.model.attention import PagedKv
from tests.conftest import write_byte_tokenizer, write_tiny_llama
from tests.equivalence.kinds import ALONE, TOKENS, write_kinds
from tests.server.engine.pretend import Counts

pytestmark = [
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_ids = iter(range(10**9))
RANKS = {"a": 8, "b": 5, "c": 24, "d": 16}


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, make_adapter: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(tiny_base, root / name, seed=rank, r=rank) for name, rank in RANKS.items()}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base with biases, and adapters of all kinds for it."""
    root = tmp_path_factory.mktemp("many")
    write_tiny_llama(root / "base", attention_bias=True, mlp_bias=True)
    write_byte_tokenizer(root / "base")
    return root / "base", write_kinds(root / "base", root, biased=True)


LOGITS: dict[str, list[bytes]] = defaultdict(list)  # by request id: what every one of its tokens was chosen from


def build(
    base: str, fetch: Any, quantization: Any, dtype: str, threads: int = 1, told: Any = None, **limits: Any
) -> Engine:
    """An engine that fills LOGITS."""
    settings = {
        "adapter_memory_bytes": 4 << 20,
        "kv_memory_bytes": 4 << 20,
        "max_sequences": 24,
        "max_batch_tokens": 40,
        "deterministic": True,
        **limits,
    }
    model = ModelConfig(base=base, quantization=quantization, dtype=dtype, threads=threads)
    engine = Engine.build(model, EngineLimits(**settings), fetch, told)
    loop = engine._loop
    loop._forward = watched(loop._forward)
    if loop._resting is not None:  # the way of crowded steps, which the ordinary engine alone has
        loop._resting = watched(loop._resting)
    return engine


def watched(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which notes its logits."""

    def noting(*args: Any) -> Any:
        step, logits = forward(*args)
        for share, row in zip(step.sampling, logits, strict=True):
            LOGITS[share.sequence.request.id].append(row.numpy().tobytes())
        return step, logits

    return noting


def draw(
    rng: random.Random, names: list[str], vocabulary: int, longest: int = 90, counts: Seq[int] = (0, 1, 1, 2)
) -> Request:
    chosen = rng.sample(names, min(rng.choice(counts), len(names)))
    return Request(
        id=str(next(_ids)),
        prompt=tuple(rng.randrange(vocabulary) for _ in range(rng.randrange(1, longest))),
        stopping=Stopping(max_new_tokens=rng.randrange(1, 14), ignore_eos=True),
        sampling=Sampling(temperature=rng.choice([0.0, 0.9]), seed=rng.getrandbits(40)),
        adapters=tuple(
            AdapterUse(name, f"t/{name}@1", 1.0 if name in ALONE else rng.choice([1.0, 0.5, -1.25])) for name in chosen
        ),
        logprobs=3,
        structure=Structure("regex", "[a-z]{1,20}") if rng.random() < 0.2 else None,
    )


def again(request: Request) -> Request:
    fields = {name: getattr(request, name) for name in request.__dataclass_fields__ if name not in ("id", "arrival")}
    return Request(id=str(next(_ids)), **fields)


def run(engine: Engine, requests: Seq[Request]) -> list[tuple[Any, ...]]:
    """What each request, sent again, got: its tokens, their log-probabilities and all bits of all logits."""
    sent = [again(request) for request in requests]
    answers = engine.generate(sent)
    for request, answer in zip(requests, answers, strict=True):
        if answer.error is not None:
            answer.error.add_note(str(request.adapters))
            raise answer.error
    return [
        (answer.token_ids, [place for delta in answer.deltas for place in delta.logprobs], LOGITS.pop(request.id))
        for request, answer in zip(sent, answers, strict=True)
    ]


def check_invariant(engine: Engine, other: Engine, requests: list[Request], rng: random.Random) -> None:
    """Alone, all at once, in another order, and on an engine that cuts prompts elsewhere: the same bits."""
    alone = [run(engine, [request])[0] for request in requests]
    for runner in (engine, engine, other):
        order = list(range(len(requests)))
        rng.shuffle(order)
        for i, got in zip(order, run(runner, [requests[i] for i in order]), strict=True):
            assert got == alone[i], f"request {i} of {len(requests)} changed in company: {requests[i].adapters}"


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
        for one, two in zip(run(ours, requests), run(plain, requests), strict=True):
            assert one[0] == two[0]
            for a, b in zip(one[1], two[1], strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=2e-4)
    finally:
        ours.close()
        plain.close()


@pytest.mark.parametrize(("dtype", "weight"), [("bfloat16", 3.4e38), ("float16", 1e5)])
def test_a_weight_that_the_precision_cannot_say_fails_its_own_request_alone(
    tiny_base: Path,
    adapters: dict[str, Path],
    directory_fetch: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    weight: float,
) -> None:
    monkeypatch.setattr(native, "load", lambda dtype: None)
    engine = build(str(tiny_base), directory_fetch(adapters), "none", dtype)
    stopping = Stopping(max_new_tokens=40, ignore_eos=True)
    base, other, heavy = (
        Request(id=str(next(_ids)), prompt=(1, 2, 3), stopping=stopping, adapters=uses)
        for uses in ((), (AdapterUse("b", "t/b@1"),), (AdapterUse("a", "t/a@1", weight),))
    )
    try:
        engine.adapters.load("a", "t/a@1")  # or the others might be through before it is there
        alone = [run(engine, [one])[0] for one in (base, other)]
        sent = [again(one) for one in (base, other, heavy)]
        *answers, failed = engine.generate(sent)
        assert isinstance(failed.error, NonFiniteLogits)
        assert [(answer.error, answer.token_ids) for answer in answers] == [(None, one[0]) for one in alone]
        assert [LOGITS.pop(one.id) for one in sent[:2]] == [one[2] for one in alone]
    finally:
        engine.close()


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


def all_kinds(rng: random.Random, names: Seq[str]) -> list[Request]:
    """Each kind once by itself, mixes of those that mix, with trained tokens in the prompts, and some structure."""
    mixed = [name for name in names if name not in ALONE]
    requests = [draw(rng, [name], 256, longest=50, counts=[1]) for name in names]
    requests += [draw(rng, mixed, 256, longest=50, counts=[0, 2, 3]) for _ in range(8)]
    structure = Structure("regex", "[a-z]{1,20}")
    return [
        replace(
            request,
            prompt=(*request.prompt, *rng.sample(TOKENS, 3)),
            structure=structure if i % 4 == 0 else request.structure,
        )
        for i, request in enumerate(requests)
    ]


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Layers in one native call, or as on a machine without a C compiler."""
    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda dtype: None)
    return str(request.param)


@pytest.mark.parametrize(
    ("quantization", "dtype", "threads"),
    [("none", "bfloat16", 2), ("none", "float32", 1), ("nf4", "bfloat16", 1)],
)
def test_every_kind_of_adapter_keeps_its_bits(
    many: tuple[Path, dict[str, Path]], directory_fetch: Any, way: str, quantization: Any, dtype: str, threads: int
) -> None:
    """DoRA, biases, replaced modules, adapted heads and embeddings, trained tokens, mixes of them, and structure."""
    rng = random.Random()
    base, adapters = many
    given = (str(base), directory_fetch(adapters), quantization, dtype, threads)
    engine, other = build(*given), build(*given, max_batch_tokens=23, max_sequences=7)
    try:
        check_invariant(engine, other, all_kinds(rng, list(adapters)), rng)
    finally:
        engine.close()
        other.close()
        engine.check_integrity()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_cached_or_computed_anew_has_the_same_bits(
    many: tuple[Path, dict[str, Path]], directory_fetch: Any, way: str, dtype: str
) -> None:
    """Pages found in the prefix cache, and sequences that gave their pages up and came back."""
    rng = random.Random()
    base, adapters = many
    requests = [  # of two pages at first and four or five in the end: two of them fill the six below
        replace(
            request,
            prompt=(*rng.choices(range(256), k=rng.randrange(14, 18)), *rng.sample(TOKENS, 3)),
            stopping=Stopping(max_new_tokens=45, ignore_eos=True),
            structure=None,
        )
        for request in rng.sample(all_kinds(rng, list(adapters)), 5)
    ]
    page = PagedKv.page_bytes(2, 2, 16, 16, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    counts = Counts()
    given = (str(base), directory_fetch(adapters), "none", dtype)
    fresh, tight = build(*given, prefix_cache=False), build(*given, told=counts, kv_memory_bytes=6 * page)
    cached = build(*given, told=(hits := Counts()))
    try:
        expected = run(fresh, requests)
        for engine in (cached, cached, tight):
            assert run(engine, requests) == expected
        assert hits.hit_tokens > 0
        assert counts.preemptions > 0
    finally:
        for engine in (fresh, cached, tight):
            engine.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_order_of_a_mix_does_not_count(
    many: tuple[Path, dict[str, Path]], directory_fetch: Any, way: str, dtype: str
) -> None:
    """Both orders find the same pages in the prefix cache, so both must compute the same bits."""
    base, adapters = many
    uses = [
        AdapterUse(name, f"t/{name}@1", weight) for name, weight in (("plain-24", 0.7), ("dora", -0.4), ("plain", 1))
    ]
    asked = Request(
        id="", prompt=tuple(range(50)), stopping=Stopping(max_new_tokens=8, ignore_eos=True), adapters=tuple(uses)
    )
    engine = build(str(base), directory_fetch(adapters), "none", dtype, prefix_cache=False)
    try:
        first, *others = (
            run(engine, [replace(asked, adapters=tuple(order))])[0] for order in itertools.permutations(uses)
        )
        assert all(other == first for other in others)
    finally:
        engine.close()
