"""What an engine tries when it starts is all that traffic asks of the kernels later: nobody waits for a compiler."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

from server.config import EngineLimits
from server.engine.captured import CapturedSteps
from server.engine.gpu import GpuSteps
from server.engine.gpu_trials import _share, trials
from tests.conftest import write_byte_tokenizer, write_tiny_llama
from tests.server.engine.gpu.pretend import build
from tests.server.engine.gpu.tape import TapeGraphs

CAPTURE_ALL = CapturedSteps.capture_all
FIRST_PROMPTS = GpuSteps.first_prompts
TOKENS, CONTEXT, PAGE = 256, 4096, 8
_LAUNCH = {"num_warps", "num_stages", "maxnreg", "launch_pdl"}


Variant = tuple[str, tuple[tuple[str, object], ...]]


def variant(function: Any, arguments: dict[str, Any]) -> Variant:
    """What Triton compiles a kernel for: constants, types, and of integers whether they are 1 or divisible by 16."""
    parts: list[tuple[str, object]] = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            parts.append((name, (value.dtype, value.data_ptr() % 16 == 0)))
        elif name.isupper() or name in _LAUNCH or value is None or isinstance(value, bool | str):
            parts.append((name, value))
        elif isinstance(value, int) and name not in (function.kwargs["do_not_specialize"] or ()):
            parts.append((name, "1" if value == 1 else value % 16 == 0))
    return function.__name__, tuple(sorted(parts, key=str))


def random_rows(limit: int) -> tuple[tuple[int, int, float], ...]:
    start = random.randrange(limit)
    return random.choice([(), ((start, random.randint(start + 1, min(limit, start + 40)), 0.5),)])


def random_step(sequences: int, pages: int, adapter_rows: int) -> list[Any]:
    """Up to all sequences: some with one token, some with a stretch of a prompt, as a scheduler might put together."""
    prompts = random.choice([0, 1, 1, 2, 3])
    answers = random.choice([0 if prompts else 1, 1, 2, random.randint(1, sequences - prompts)])
    shares, left = [], TOKENS - answers
    for place in range(answers + prompts):
        computed = random.choice([0, 1, 7, 100, random.randrange(CONTEXT - TOKENS)])
        tokens = 1
        if place >= answers:
            most = min(left - 2 * (answers + prompts - place - 1), CONTEXT - computed)
            tokens = random.choice([2, 7, 15, 16, 17, 40, 64, random.randint(2, max(2, most))])
            tokens = min(tokens, most)
            left -= tokens
        own = [random.randrange(pages) for _ in range(-(-(computed + tokens) // PAGE))]
        shares.append(_share(tokens, computed, own, random_rows(adapter_rows)))
    return shares


@pytest.mark.parametrize("sequences", [5, 70])
def test_a_mix_of_traffic_asks_for_nothing_that_was_not_compiled(
    sequences: int,
    pretend_gpu: TapeGraphs,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    directory_fetch: Callable[[dict[str, Path]], Any],
) -> None:
    asked: dict[Variant, list[int]] = {}
    base = tmp_path / "base"
    write_tiny_llama(base, num_hidden_layers=1, max_position_embeddings=CONTEXT)
    write_byte_tokenizer(base)
    engine = build(
        base, directory_fetch({}), quantization="nf4", max_sequences=sequences, max_batch_tokens=TOKENS,
        page_tokens=PAGE, kv_memory_bytes=2 << 20,
    )  # fmt: skip

    def noted(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        asked.setdefault(variant(self, dict(zip(self.arg_names, given, strict=False)) | named), step)

    steps: Any = engine._computing.gpu
    kv, step = steps._runner.kv, []
    assert kv.pages * kv.page_tokens >= CONTEXT
    monkeypatch.setattr(InterpretedFunction, "run", noted)  # what kernels would compute does not matter
    try:
        CAPTURE_ALL(steps._captured, adapters=True)
        FIRST_PROMPTS(steps)
        known = set(asked)
        with torch.inference_mode():
            for _ in range(60):
                shares = random_step(sequences, kv.pages, engine.adapters.rows_total)
                step = [share.tokens for share in shares]
                batch = steps._lay_out(shares)
                steps.active.use(batch.segments, batch.decodes)
                steps.forward(batch.packed)
                kv.finite(random.sample(range(kv.pages), random.randint(1, 9)))
            step = []
            for context in steps._captured.contexts:
                steps._captured._captured_for(random.choice(steps._captured.buckets), context, True)
    finally:
        engine.close()
    kernels = {kernel for kernel, _ in known}
    assert kernels >= {"_prefill", "decode_rows", "_matmul", "_dequantize", "_shrink", "_finite"}
    for kernel, parts in asked.keys() - known:
        nearest = min((set(parts) - set(other) for name, other in known if name == kernel), key=len, default=parts)
        pytest.fail(f"{kernel} with {nearest} was not compiled before a step of {asked[kernel, parts]} tokens")


@pytest.mark.parametrize(
    ("sequences", "budget", "pages", "context"),
    [(1, 1, 2, 16), (1, 16, 9, 512), (4, 16, 9, 512), (3, 2, 9, 512), (300, 400, 600, 8192), (2, 4096, 600, 8192)],
)
def test_trials_are_steps_that_could_come(sequences: int, budget: int, pages: int, context: int) -> None:
    limits = EngineLimits(max_sequences=sequences, max_batch_tokens=budget)
    for shares in trials(limits, pages, PAGE, context, adapter_rows=5):
        assert 0 < len(shares) <= sequences and sum(share.tokens for share in shares) <= budget
        for share in shares:
            sequence: Any = share.sequence
            assert share.samples and len(sequence.tokens) <= context
            assert len(sequence.pages) * PAGE >= len(sequence.tokens) and max(sequence.pages) < pages
            assert all(0 <= start < stop <= 5 for start, stop, _ in sequence.adapter_rows)


def test_without_a_page_to_spare_nothing_is_tried() -> None:
    assert not list(trials(EngineLimits(), 1, PAGE, 512, adapter_rows=5))
