"""A LoRA out of the difference of two models: exact where the difference has that rank, else as numpy's SVD says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from hub.adapter_dir import parse_adapter
from hub.cli import group
from training.errors import ExtractionImpossible
from training.extract import extract, low_rank


def fine_tune(base: Path, target: Path, rank: int | None, seed: int) -> dict[str, torch.Tensor]:
    """A copy of `base` with every decoder linear changed by a matrix of `rank` (None: of full rank); the changes."""
    shutil.copytree(base, target)
    generator = torch.Generator().manual_seed(seed)
    tensors, changes = load_file(base / "model.safetensors"), {}
    for name, weight in tensors.items():
        if weight.ndim == 2 and "embed" not in name:
            rows, columns = weight.shape
            if rank is None:
                delta = torch.randn(rows, columns, generator=generator) * 0.01
            else:
                delta = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
                delta *= 0.01
            changes[name] = delta
            tensors[name] = weight + delta
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return changes


@pytest.mark.parametrize("rank", [1, 4])
def test_a_planted_low_rank_change_is_found_exactly(tiny_base: Path, tmp_path: Path, rank: int) -> None:
    changes = fine_tune(tiny_base, tmp_path / "full", rank, seed=rank)
    made = extract(tiny_base, tmp_path / "full", rank)
    assert {layer.module for layer in made.layers} == {name.removesuffix(".weight") for name in changes}
    assert len(made.layers) == 14
    assert made.error < 1e-4 and max(layer.error for layer in made.layers) < 1e-4
    for name, delta in changes.items():
        a, b = made.factors[name.removesuffix(".weight")]
        assert torch.allclose(b @ a, delta, atol=2e-6)
    if rank > 1:  # with less it cannot be exact
        assert extract(tiny_base, tmp_path / "full", rank - 1).error > 0.1


def test_errors_are_those_of_numpys_svd(tiny_base: Path, tmp_path: Path) -> None:
    changes = fine_tune(tiny_base, tmp_path / "full", None, seed=7)
    made = extract(tiny_base, tmp_path / "full", 8)
    lost, whole = 0.0, 0.0
    base, full = (load_file(where / "model.safetensors") for where in (tiny_base, tmp_path / "full"))
    for layer in made.layers:
        name = f"{layer.module}.weight"
        delta = (full[name] - base[name]).double().numpy()
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        wanted = np.sqrt((s[8:] ** 2).sum() / (s**2).sum())
        assert layer.error == pytest.approx(wanted, rel=1e-4)
        a, b = made.factors[layer.module]
        best = (u[:, :8] * s[:8]) @ vt[:8]
        assert np.abs((b @ a).numpy() - best).max() < 1e-5
        lost, whole = lost + (s[8:] ** 2).sum(), whole + (s**2).sum()
    assert made.error == pytest.approx(np.sqrt(lost / whole), rel=1e-4)
    assert len(changes) == len(made.layers)


def test_what_has_no_lora_is_counted_as_lost(tiny_base: Path, tmp_path: Path) -> None:
    fine_tune(tiny_base, tmp_path / "full", 2, seed=3)
    tensors = load_file(tmp_path / "full" / "model.safetensors")
    moved = torch.full_like(tensors["model.norm.weight"], 0.5)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + moved
    save_file(tensors, tmp_path / "full" / "model.safetensors", metadata={"format": "pt"})
    made = extract(tiny_base, tmp_path / "full", 2)
    assert made.linear_error < 1e-4
    squares = sum(layer.delta_norm**2 for layer in made.layers)
    norm = float(moved.norm())
    assert made.left_out_norm == pytest.approx(norm, rel=1e-5)
    assert made.error == pytest.approx(np.sqrt(norm**2 / (squares + norm**2)), rel=1e-3)


def test_the_factors_share_the_scale() -> None:
    delta = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    a, b = low_rank(delta, 3)
    assert a.shape == (3, 9) and b.shape == (12, 3)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)


def test_what_cannot_be_extracted_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ExtractionImpossible, match="same linear layers"):
        extract(tiny_base, tiny_base, 2)
    fine_tune(tiny_base, tmp_path / "full", 2, seed=3)
    with pytest.raises(ExtractionImpossible, match="rank 33"):
        extract(tiny_base, tmp_path / "full", 33)  # the keys' projection is [32, 64]
    tensors = load_file(tmp_path / "full" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "full" / "model.safetensors")
    with pytest.raises(ExtractionImpossible, match="up_proj"):
        extract(tiny_base, tmp_path / "full", 2)


def test_peft_loads_the_adapter_and_it_answers_as_the_full_model(tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fine_tune(tiny_base, tmp_path / "full", 3, seed=11)
    command = [
        "extract",
        str(tmp_path / "full"),
        "--base",
        str(tiny_base),
        "--rank",
        "3",
        "--out",
        str(tmp_path / "lora"),
    ]
    result = CliRunner().invoke(group, [*command, "--threads", "1"], catch_exceptions=False)
    assert result.exit_code == 0 and "rank 3: 0.0 %" in result.stderr
    parsed = parse_adapter(tmp_path / "lora")
    assert len(parsed.ranks) == 14 and parsed.facts.base is not None and parsed.facts.base.fingerprint
    assert len(parsed.facts.recipe["extracted"]["relative_error_by_module"]) == 14

    def logits(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(torch.arange(20)[None]).logits
        return found

    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    assert torch.allclose(logits(adapted.eval()), logits(full.eval()), atol=1e-3)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 3
