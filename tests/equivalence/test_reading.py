"""What the engine reads of a prompt against transformers' hidden states, and what is chosen.

A router is fitted by the reference's embeddings of two kinds of prompts; then both see prompts of either kind and of
none.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.outbox import BlockingOutbox
from server.engine.request import Request, Stopping
from server.errors import RouterUnavailable
from server.model.base import _quantization
from server.router import Router
from tests.conftest import write_byte_tokenizer, write_tiny_llama
from tests.equivalence.test_families import FAMILIES, write_family
from tests.hidden_states import embed
from training.continual.router import fit

# Shorter than a page, a page's end, past a window of 16, past longrope's switch at 64, several chunks of 48.
LENGTHS = (1, 16, 17, 49, 65, 110)

_ids = iter(range(10**9))


def read(engine: Engine, prompts: Sequence[Sequence[int]], layer: int) -> list[Tensor]:
    """All at once, so that they share steps."""
    engine.reads(layer)
    outboxes = [BlockingOutbox() for _ in prompts]
    for prompt, outbox in zip(prompts, outboxes, strict=True):
        asked = Request(str(next(_ids)), tuple(prompt), Stopping(max_new_tokens=1), read_layer=layer)
        engine.submit(asked, outbox)
    embeddings = []
    for outbox in outboxes:
        [delta] = list(outbox)
        assert delta.error is None
        assert delta.embedding is not None and not delta.token_ids and delta.finish is None
        embeddings.append(delta.embedding)
    return embeddings


def build(base: Path, quantization: Any = "none", dtype: str = "float32", **limits: Any) -> Engine:
    settings = {"adapter_memory_bytes": 1 << 20, "kv_memory_bytes": 4 << 20, "max_batch_tokens": 48, **limits}
    model = ModelConfig(base=str(base), quantization=quantization, dtype=dtype, threads=1)
    return Engine.build(model, EngineLimits(**settings), lambda digest: pytest.fail(f"{digest} was asked for"))


def close(engine: Engine) -> None:
    engine.close()
    engine.check_integrity()
    assert engine._pages.used == engine._pages.cached == 0


def kinds(count: int) -> dict[str, list[list[int]]]:
    """Prompts of two kinds: letters, and digits."""
    drawn = {"t/letters": range(97, 123), "t/digits": range(48, 58)}
    return {
        name: [random.choices(alphabet, k=random.choice(LENGTHS[1:])) for _ in range(count)]
        for name, alphabet in drawn.items()
    }


def strangers() -> list[list[int]]:
    """Prompts of no kind: one token over and over."""
    return [[random.randrange(128, 256)] * length for length in LENGTHS[::2]]


def assert_chooses_alike(router: Router, ours: Sequence[Tensor], theirs: Sequence[Tensor], rtol: float) -> None:
    """The same choice, but where the reference stands on the very line between two; distances within `rtol`."""
    chosen = set()
    for mine, reference in zip(ours, theirs, strict=True):
        got, wanted = router.choose(mine), router.choose(reference)
        if abs(wanted.distance - wanted.threshold) > rtol * wanted.distance:
            assert (got.adapter, got.nearest) == (wanted.adapter, wanted.nearest)
        assert got.distance == pytest.approx(wanted.distance, rel=rtol)
        chosen.add(got.adapter)
    assert None in chosen and len(chosen) > 1, "adapters have to be chosen, and the base"


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "native") for name in FAMILIES),
        *((name, "blocks") for name in ("llama", "gemma3")),
        *((name, "torch") for name in ("llama", "phi3-longrope")),
        *((name, "deterministic") for name in ("olmo2", "gemma2")),
    ],
)
def test_a_family_is_read_as_transformers_reads_it(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After no layer, one, and all of them. Sums of 64 and 96 float32 products, two to four layers deep, differ in
    their order alone: 1e-5 of the largest number is some hundred units in its last place."""
    if way == "blocks":
        monkeypatch.setattr("server.engine.computing.LISTED_TOKENS", 45)
    elif way == "torch":
        monkeypatch.setattr("server.engine.computing.native.load", lambda dtype: None)
        monkeypatch.setattr("server.model.packed.library", lambda: None)
    write_family(tmp_path / "base", FAMILIES[name])
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    engine = build(tmp_path / "base", deterministic=way == "deterministic")
    engine.start()
    prompts = [random.choices(range(256), k=length) for length in LENGTHS]
    for layer in (0, 1, engine.base.layers):
        for mine, wanted in zip(read(engine, prompts, layer), embed(reference, prompts, layer), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    router = fit({kind: embed(reference, rows, 1) for kind, rows in kinds(20).items()}, 1)
    asked = [*strangers(), *(row for rows in kinds(5).values() for row in rows)]
    assert_chooses_alike(router, read(engine, asked, 1), list(embed(reference, asked, 1)), 1e-3)
    close(engine)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("quantization", ["nf4", "none", "int8"])
def test_quantized_and_bfloat16_bases(quantization: Literal["nf4", "int8", "none"], tmp_path: Path) -> None:
    """Against transformers with the same weights in the same precision. bfloat16 has 8 bits: every product's input is
    off by up to 0.4 %, at random; after one layer and a prompt's mean, 2 % of the states' norm is far above that."""
    write_family(tmp_path / "base", FAMILIES["llama"])
    reference: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16, quantization_config=_quantization(quantization, torch.bfloat16)
    )
    for module in reference.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its repacking takes rows of whole blocks of 64 only
    engine = build(tmp_path / "base", quantization, "bfloat16")
    engine.start()
    router = fit({kind: embed(reference, rows, 1) for kind, rows in kinds(20).items()}, 1)
    asked = [*strangers(), *(row for rows in kinds(5).values() for row in rows)]
    ours, theirs = read(engine, asked, 1), list(embed(reference, asked, 1))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert float((mine - wanted).norm()) < 0.02 * float(wanted.norm())
    assert_chooses_alike(router, ours, theirs, 0.2)
    close(engine)


def test_deterministic_readings_are_the_same_bits_in_any_company(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    write_byte_tokenizer(tmp_path)
    prompts = [random.choices(range(256), k=length) for length in LENGTHS]
    engine = build(tmp_path, dtype="bfloat16", deterministic=True)
    other = build(tmp_path, dtype="bfloat16", deterministic=True, max_batch_tokens=17)  # cut elsewhere
    for one in (engine, other):
        one.start()
    alone = [read(engine, [prompt], 1)[0] for prompt in prompts]
    for together in (read(engine, prompts, 1), read(other, prompts, 1)):
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    close(engine)
    close(other)


def test_models_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    write_byte_tokenizer(tmp_path)
    engine = build(tmp_path)
    for layer in (-1, 3):
        with pytest.raises(RouterUnavailable, match="has 2 layers"):
            engine.reads(layer)
    engine.base.model.model.layers, kept = torch.nn.Linear(1, 1), engine.base.model.model.layers
    with pytest.raises(RouterUnavailable, match="built like Llama"):
        engine.reads(1)
    engine.base.model.model.layers = kept
    engine._computing.gpu = object()  # type: ignore[assignment]
    with pytest.raises(RouterUnavailable, match="GPU"):
        engine.reads(1)
    engine._computing.gpu = None
    close(engine)
