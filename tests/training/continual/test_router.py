"""The router: right where tasks are apart, the base where a prompt is nobody's, the same after a round trip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hub.base import fingerprint_directory
from server.config import Quantization
from server.errors import RouterInvalid
from server.model.base import _quantization
from server.router import Router
from tests.hidden_states import embed
from training.continual.embedding import EngineEmbed
from training.continual.router import fit, write_router
from training.data import Example

WIDE = 48


def cloud(centre: torch.Tensor, count: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    stretch = torch.linspace(0.2, 3.0, WIDE)  # some directions say more than others
    return centre + spread * stretch * torch.randn(count, WIDE, generator=generator)


@pytest.fixture(scope="module")
def seed() -> int:
    return int(np.random.default_rng().integers(1 << 20))


@pytest.fixture(scope="module")
def centres(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"team/t{n}@1": 4 * torch.randn(WIDE, generator=generator) for n in range(4)}


@pytest.fixture(scope="module")
def router(centres: dict[str, torch.Tensor], seed: int) -> Router:
    return fit({name: cloud(at, 400, seed + n) for n, (name, at) in enumerate(centres.items())}, layer=1)


def test_new_prompts_of_a_task_go_to_it(router: Router, centres: dict[str, torch.Tensor], seed: int) -> None:
    for n, (name, at) in enumerate(centres.items()):
        choices = [router.choose(row) for row in cloud(at, 400, seed + 100 + n)]
        assert all(choice.nearest == name for choice in choices), seed
        to_base = sum(choice.adapter is None for choice in choices) / 400
        assert to_base < 0.15, seed  # 0.05 is asked for; 100 held-out prompts and 400 new ones leave it so much room


def test_a_prompt_like_none_goes_to_the_base(router: Router, seed: int) -> None:
    far = 4 * torch.randn(WIDE, generator=torch.Generator().manual_seed(seed + 999))
    choices = [router.choose(row) for row in cloud(far, 200, seed + 7)]
    assert sum(choice.adapter is None for choice in choices) >= 190, seed
    assert all(choice.distance > choice.threshold for choice in choices if choice.adapter is None)


def test_between_two_tasks_the_nearer_wins_by_the_tasks_own_spread() -> None:
    """Where the tasks differ in a quiet direction, a loud one must not decide."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(200, 2, generator=generator) * torch.tensor([10.0, 0.1])  # noqa: E731
    router = fit({"a": noise() + torch.tensor([0.0, 0.0]), "b": noise() + torch.tensor([3.0, 2.0])}, layer=0)
    assert router.choose(torch.tensor([12.0, 0.05])).adapter == "a"
    assert router.choose(torch.tensor([-12.0, 1.95])).adapter == "b"


def test_a_router_survives_its_files(router: Router, centres: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_router(router, tmp_path / "router")
    read = Router.read(tmp_path / "router")
    for at in centres.values():
        assert read.choose(at) == router.choose(at)
    assert sum(file.stat().st_size for file in (tmp_path / "router").iterdir()) < 32_000
    with pytest.raises(ValueError, match="48 finite numbers"):
        read.choose(torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        read.choose(torch.full((WIDE,), float("nan")))


def test_a_router_without_a_precision_is_the_unquantized_bases(router: Router, tmp_path: Path) -> None:
    """Routers written before precisions were: all were fitted on the base as its files have it."""
    write_router(replace(router, quantization="nf4"), tmp_path / "router")
    assert Router.read(tmp_path / "router").quantization == "nf4"
    settings = json.loads((tmp_path / "router" / "router.json").read_text())
    assert settings.pop("quantization") == "nf4"
    (tmp_path / "router" / "router.json").write_text(json.dumps(settings))
    assert Router.read(tmp_path / "router").quantization == "none"


@pytest.mark.parametrize("harm", ["schema", "missing", "shape", "nan", "twice", "precision"])
def test_files_that_are_no_router_are_refused(router: Router, tmp_path: Path, harm: str) -> None:
    place = tmp_path / "router"
    write_router(router, place)
    settings: dict[str, Any] = json.loads((place / "router.json").read_text())
    tensors = load_file(place / "router.safetensors")
    if harm == "schema":
        settings["schema"] = "other/1"
    elif harm == "precision":
        settings["quantization"] = "int2"
    elif harm == "missing":
        del tensors["thresholds"]
    elif harm == "shape":
        tensors["centroids"] = tensors["centroids"][:, :3].contiguous()
    elif harm == "nan":
        tensors["mean"][0] = float("nan")
    else:
        settings["names"][0] = settings["names"][1]
    (place / "router.json").write_text(json.dumps(settings))
    save_file(tensors, place / "router.safetensors")
    with pytest.raises(RouterInvalid):
        Router.read(place)


def test_too_little_to_fit_is_refused() -> None:
    rows = torch.randn(40, 8)
    with pytest.raises(RouterInvalid, match="two tasks"):
        fit({"a": rows}, 1)
    with pytest.raises(RouterInvalid, match="b has fewer"):
        fit({"a": rows, "b": rows[:5]}, 1)
    with pytest.raises(RouterInvalid, match="miss"):
        fit({"a": rows, "b": rows}, 1, miss=0.0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_embeddings_are_the_states_of_the_base_as_it_is_served(
    quantization: Quantization, tiny_base: Path, byte_tokenizer: Any
) -> None:
    """On the tiny base: prompts of two tasks as its template renders them, one longer than its context, told apart.

    bfloat16 has 8 bits: every product's input is off by up to 0.4 %, at random; 2 % of a mean's norm is far above that.
    """
    asked = {
        "a": [Example.of(system="Say the mood.", user=f"It was dull {n * 7919 % 1000}", answer="-") for n in range(40)],
        "b": [Example.of(system="Write JSON.", user=f"12 Main St {n * 7919 % 1000}", answer="-") for n in range(40)],
    }
    asked["b"].append(Example.of(user="12 Main St " * 100, answer="-"))
    read = EngineEmbed(str(tiny_base), quantization, threads=1)(list(asked.values()))
    assert (read.layer, read.quantization, [len(rows) for rows in read.groups]) == (1, quantization, [40, 41])
    assert read.base == fingerprint_directory(tiny_base).fingerprint
    model: Any = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.bfloat16, quantization_config=_quantization(quantization, torch.bfloat16)
    )

    def ids(one: Example) -> list[int]:
        messages = [message.as_dict() for message in one.prompt]
        text = byte_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(byte_tokenizer(text, add_special_tokens=False).input_ids)[:511]

    for rows, examples in zip(read.groups, asked.values(), strict=True):
        for mine, wanted in zip(rows, embed(model, [ids(one) for one in examples], 1), strict=True):
            assert float((mine - wanted).norm()) < 0.02 * float(wanted.norm())
    router = fit({name: rows[:30] for name, rows in zip(asked, read.groups, strict=True)}, 1, miss=0.1)
    for name, rows in zip(asked, read.groups, strict=True):
        assert all(router.choose(row).nearest == name for row in rows[30:40])
