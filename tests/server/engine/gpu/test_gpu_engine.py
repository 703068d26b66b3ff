"""The whole engine the GPU's way, in Triton's interpreter: its answers are those of generate() over PEFT in float32."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from server.engine.captured import CapturedSteps
from server.engine.engine import Completion
from server.engine.gpu import GpuSteps
from server.engine.request import Sampling
from server.kernels.gpu import lora
from tests.equivalence.kinds import KINDS
from tests.equivalence.reference import ask, assert_same, load, write_moved_adapter
from tests.equivalence.test_families import FAMILIES, LLAMA_LINEARS, write_family
from tests.server.engine.gpu.pretend import build
from tests.server.engine.gpu.tape import TapeGraphs

# The interpreter computes in numpy, which warns of what padding holds.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.timeout(180)]

NEW_TOKENS = 3
CAPTURE_ALL = CapturedSteps.capture_all
FIRST_PROMPTS = GpuSteps.first_prompts
MakeAdapter = Callable[..., Path]
Fetch = Callable[[dict[str, Path]], Any]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.equivalence.reference.NEW_TOKENS", NEW_TOKENS)


def random_prompt(*lengths: int) -> list[int]:
    return [random.randrange(256) for _ in range(random.choice(lengths))]


def of_ranks(make: MakeAdapter, base: Path, folder: Path, **ranks: int) -> dict[str, Path]:
    """Fresh random adapters of these ranks."""
    return {name: make(base, folder / name, seed=random.randrange(2**31), r=rank) for name, rank in ranks.items()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_a_family_equals_generate(
    name: str, pretend_gpu: TapeGraphs, tmp_path: Path, make_adapter: MakeAdapter, directory_fetch: Fetch
) -> None:
    """Base rows and adapters of different rank in one batch, a prompt of several pages in chunks. Gemma 2 has layers
    that are not Llama's: transformers' own, with our products and attention in them, and no captured steps."""
    base = tmp_path / "base"
    family = FAMILIES[name]
    write_family(base, replace(family, settings={**family.settings, "num_hidden_layers": 2}))
    adapters = {
        kind: make_adapter(base, tmp_path / kind, seed=random.randrange(2**31), r=rank, target_modules=targets)
        for kind, rank, targets in (("all", 12, list(LLAMA_LINEARS)), ("few", 4, ["q_proj", "v_proj"]))
    }
    models: dict[str | None, Any] = {None: load(base), **{kind: load(base, path) for kind, path in adapters.items()}}
    # Llama's batch is mixed further; a prompt in chunks beside an answer is in all of them.
    kinds = ["all", None, "few"] if name == "llama" else ["all", None]
    prompts = [random_prompt(*lengths) for lengths in ((18,), (1, 3), (8, 9))[: len(kinds)]]
    engine = build(base, directory_fetch(adapters))
    try:
        answers = engine.generate(
            [ask(prompt, *([kind] if kind else [])) for kind, prompt in zip(kinds, prompts, strict=True)]
        )
        engine.check_integrity()
    finally:
        engine.close()
    for kind, prompt, answer in zip(kinds, prompts, answers, strict=True):
        assert_same(answer, models[kind], prompt, kind)
    assert bool(pretend_gpu.replayed) is (name != "gemma2")


def dequantized(base: Path, adapter: Path | None) -> Any:
    """The float32 model whose linears hold what NF4 makes of their weights, with an adapter on top."""
    from bitsandbytes import functional

    model = load(base)
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            packed, state = functional.quantize_4bit(
                module.weight.data, quant_type="nf4", blocksize=64, compress_statistics=True
            )
            module.weight.data = functional.dequantize_4bit(packed, state).float()
    if adapter is None:
        return model
    import peft

    return peft.PeftModel.from_pretrained(model, adapter)


def test_an_nf4_base_is_read_as_bitsandbytes_packed_it(
    pretend_gpu: TapeGraphs, tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter, directory_fetch: Fetch
) -> None:
    adapters = {"a": make_adapter(tiny_base, tmp_path / "a", seed=random.randrange(2**31), r=8)}
    prompts = [random_prompt(9), random_prompt(2, 3)]
    engine = build(tiny_base, directory_fetch(adapters), quantization="nf4")
    try:
        answers = engine.generate([ask(prompts[0], "a"), ask(prompts[1])])
    finally:
        engine.close()
    for kind, prompt, answer in zip(("a", None), prompts, answers, strict=True):
        assert_same(answer, dequantized(tiny_base, adapters[kind] if kind else None), prompt, kind)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning")
def test_every_kind_of_adapter_on_an_nf4_base(
    pretend_gpu: TapeGraphs, tiny_base: Path, tmp_path: Path, directory_fetch: Fetch
) -> None:
    adapters = {
        kind: write_moved_adapter(
            tiny_base, tmp_path / kind, **{"lora_alpha": 16, "target_modules": list(LLAMA_LINEARS), **settings}
        )
        for kind, settings in KINDS.items()
    }
    prompts = {kind: random_prompt(3) for kind in adapters}
    engine = build(tiny_base, directory_fetch(adapters), quantization="nf4", adapter_memory_bytes=8 << 20)
    try:
        answers = engine.generate([ask(prompt, kind) for kind, prompt in prompts.items()])
        engine.check_integrity()
    finally:
        engine.close()
    for (kind, prompt), answer in zip(prompts.items(), answers, strict=True):
        assert_same(answer, dequantized(tiny_base, adapters[kind]), prompt, kind)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning")
def test_parts_run_through_the_single_modules(
    pretend_gpu: TapeGraphs, tiny_base: Path, tmp_path: Path, directory_fetch: Fetch
) -> None:
    """DoRA within the layers, an adapted head, weighted adapters: what captured steps do not do."""
    adapters = {
        kind: write_moved_adapter(tiny_base, tmp_path / kind, **{"r": 4, "lora_alpha": 8, **settings})
        for kind, settings in {
            "dora": {"use_dora": True, "target_modules": list(LLAMA_LINEARS)},
            "head": {"target_modules": ["o_proj", "lm_head"]},
            "plain": {"target_modules": list(LLAMA_LINEARS)},
        }.items()
    }
    prompts = {kind: random_prompt(3, 9) for kind in adapters}
    engine = build(tiny_base, directory_fetch(adapters))
    try:
        answers = engine.generate([ask(prompt, kind) for kind, prompt in prompts.items()])
    finally:
        engine.close()
    for (kind, prompt), answer in zip(prompts.items(), answers, strict=True):
        assert_same(answer, load(tiny_base, adapters[kind]), prompt, kind)


@pytest.mark.parametrize("shrink_first", [False, True])
def test_adapters_change_between_replays_and_graphs_change_nothing(
    shrink_first: bool,
    pretend_gpu: TapeGraphs,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Path,
    tmp_path: Path,
    make_adapter: MakeAdapter,
    directory_fetch: Fetch,
) -> None:
    """An arena for one adapter of two, which must therefore take turns in the same rows under the same captured
    steps; the answers are those of steps that are launched piece by piece."""
    monkeypatch.setattr(lora, "SHRINK_FIRST", shrink_first)
    adapters = of_ranks(make_adapter, tiny_base, tmp_path, a=16, b=5)
    asked = [(kind, random_prompt(3, 8)) for kind in adapters]

    def answers() -> list[Completion]:
        engine = build(tiny_base, directory_fetch(adapters), adapter_memory_bytes=16 * 8192)
        try:
            assert engine.adapters.rows_total == 16
            given = engine.generate([ask(prompt, kind) for kind, prompt in asked])
            engine.check_integrity()
        finally:
            engine.close()
        assert all(answer.error is None for answer in given)
        return given

    captured = answers()  # one after the other: each takes three steps of one row
    assert pretend_gpu.replayed > pretend_gpu.captured > 0
    monkeypatch.setattr(pretend_gpu, "capture", lambda run: run)
    assert [answer.token_ids for answer in answers()] == [answer.token_ids for answer in captured]
    for (kind, prompt), answer in zip(asked, captured, strict=True):
        assert_same(answer, load(tiny_base, adapters[kind]), prompt, kind)


def test_padding_and_other_peoples_pages_are_inert(
    pretend_gpu: TapeGraphs, tmp_path: Path, make_adapter: MakeAdapter, directory_fetch: Fetch
) -> None:
    """Three rows in a step captured for four: the fourth computes NaN, every page nobody owns holds NaN, and what the
    tape allocates begins as NaN; no answer changes."""
    base = tmp_path / "base"
    write_family(base, FAMILIES["llama"])
    adapters = {"a": make_adapter(base, tmp_path / "a", seed=random.randrange(2**31), r=8)}
    prompts = [[random.randrange(1, 256) for _ in range(count)] for count in (2, 7, 3)]
    given = []
    for poisoned in (False, True):
        engine = build(base, directory_fetch(adapters))
        if poisoned:
            # Padding is token 0; nobody may choose it below.
            engine.base.model.get_input_embeddings().weight.data[0] = float("nan")
            for cache in (*engine._computing.runner.kv.k, *engine._computing.runner.kv.v):
                cache.fill_(float("nan"))
        requests = [
            replace(ask(prompt, *uses), sampling=Sampling(logit_bias=((0, -100.0),)))
            for prompt, uses in zip(prompts, ((), ("a",), ("a",)), strict=True)
        ]
        try:
            answers = engine.generate(requests)
            engine.check_integrity()
        finally:
            engine.close()
        assert [answer.error for answer in answers] == [None] * 3
        given.append([answer.token_ids for answer in answers])
    assert given[0] == given[1]
    assert pretend_gpu.replayed > 0


def test_steps_launched_ahead_change_nothing(
    pretend_gpu: TapeGraphs,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Path,
    tmp_path: Path,
    make_adapter: MakeAdapter,
    directory_fetch: Fetch,
) -> None:
    """Answers that end at different times, drawn, penalized, with log-probabilities; a page's end is passed while a
    step is under way. Nearly all decode steps are launched ahead."""
    adapters = of_ranks(make_adapter, tiny_base, tmp_path, a=8, b=5)
    monkeypatch.setattr("tests.equivalence.reference.NEW_TOKENS", 7)
    requests = [
        replace(ask(random_prompt(3, 4), *uses), sampling=sampling, logprobs=logprobs)
        for uses, sampling, logprobs in (
            ((), Sampling(), 2),
            (("a",), Sampling(temperature=1.0, seed=random.randrange(2**31)), None),
            (("b",), Sampling(repetition_penalty=1.5, presence_penalty=0.5), None),
            (("a",), Sampling(), None),
        )
    ]
    requests[3] = replace(requests[3], stopping=replace(requests[3].stopping, max_new_tokens=3))
    given, ahead = [], 0
    for early in (False, True):
        engine = build(tiny_base, directory_fetch(adapters))
        steps: Any = engine._computing.gpu
        steps.early = early
        launched: list[bool] = []
        foresight: Any = engine._loop._foresight
        launch = foresight._launch
        foresight._launch = lambda *asked, to=launch, done=launched: (done.append(to(*asked)), done[-1])[1]
        try:
            # Loaded, and the steps of these sizes captured: what is not captured yet is not launched ahead.
            for _ in range(2):
                answers = engine.generate([replace(one, id=f"{one.id}-{len(launched)}") for one in requests])
                ahead = sum(launched)
                launched.clear()
            engine.check_integrity()
        finally:
            engine.close()
        assert [answer.error for answer in answers] == [None] * 4
        given.append([(a.token_ids, [one.logprob for d in a.deltas for one in d.logprobs]) for a in answers])
        assert ahead >= 4 if early else ahead == 0
    for (plain, logprobs), (early_plain, early_logprobs) in zip(*given, strict=True):
        assert plain == early_plain
        assert logprobs == pytest.approx(early_logprobs, abs=1e-5)


def test_what_a_sequence_cannot_fit_is_launched_piece_by_piece(
    pretend_gpu: TapeGraphs, monkeypatch: pytest.MonkeyPatch, tiny_base: Path, directory_fetch: Fetch
) -> None:
    """Past the longest context that steps are captured for, and back below it, with the same answers."""
    monkeypatch.setattr("server.engine.captured._CONTEXTS", (8, 12))
    prompts = [random_prompt(6), random_prompt(10)]
    engine = build(tiny_base, directory_fetch({}))
    try:
        answers = engine.generate([ask(prompt) for prompt in prompts])
    finally:
        engine.close()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_same(answer, load(tiny_base), prompt)


def test_prompts_are_tried_before_anybody_waits(
    pretend_gpu: TapeGraphs, monkeypatch: pytest.MonkeyPatch, tiny_base: Path, tmp_path: Path,
    make_adapter: MakeAdapter, directory_fetch: Fetch,
) -> None:  # fmt: skip
    """As long as there is room for, with adapters and without; requests after it are answered as ever."""
    adapter = make_adapter(tiny_base, tmp_path / "a", seed=random.randrange(2**31), r=8)
    engine = build(tiny_base, directory_fetch({"a": adapter}))
    steps: Any = engine._computing.gpu
    tried: list[int] = []
    forward = steps.forward
    monkeypatch.setattr(steps, "forward", lambda batch: (tried.append(len(batch.token_ids)), forward(batch))[1])
    prompt = random_prompt(3)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(steps._runner.kv, "pages", 1)
            FIRST_PROMPTS(steps)
            assert tried == []
        FIRST_PROMPTS(steps)
        assert sorted(tried) == [1, 1, 2, 2, 12, 12, 13, 13, 14, 14, 16, 16]  # the budget of a step is 16 tokens
        answers = engine.generate([ask(prompt, "a"), ask(prompt)])
        engine.check_integrity()
    finally:
        engine.close()
    assert_same(answers[0], load(tiny_base, adapter), prompt, "a")
    assert_same(answers[1], load(tiny_base), prompt)


def test_the_commonest_steps_are_captured_before_anybody_waits(
    pretend_gpu: TapeGraphs, monkeypatch: pytest.MonkeyPatch, tiny_base: Path, directory_fetch: Fetch
) -> None:
    """With and without adapters; a request then finds them."""
    monkeypatch.setattr(CapturedSteps, "capture_all", CAPTURE_ALL)
    engine = build(tiny_base, directory_fetch({}), max_sequences=1)
    assert pretend_gpu.captured == 2
    prompt = random_prompt(3)
    try:
        answer = engine.generate([ask(prompt)])[0]
    finally:
        engine.close()
    assert (pretend_gpu.captured, pretend_gpu.replayed) == (2, NEW_TOKENS - 1)
    assert_same(answer, load(tiny_base), prompt)
