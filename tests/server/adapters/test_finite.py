"""What is not a number is refused at load, whatever else the tensor holds; what is merely large is not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from benchmarks.workload import write_adapters
from server.adapters.base_weights import BaseWeights
from server.adapters.weights import AdapterFiles, LoraWeights, parse_adapter
from server.config import ModelConfig
from server.errors import AdapterUnservable
from server.model.base import BaseModel, load_base


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseModel:
    return load_base(ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1))


def parsed(base: BaseModel, directory: Path, values: dict[int, float], dtype: torch.dtype) -> LoraWeights:
    """An adapter one of whose tensors, as `dtype`, has these values at these places."""
    tensors = load_file(directory / "adapter_model.safetensors")
    key = sorted(tensors)[len(tensors) // 2]
    spoiled = tensors[key].to(dtype).clone()
    for at, value in values.items():
        spoiled.view(-1)[at] = value
    config = (directory / "adapter_config.json").read_bytes()
    files = AdapterFiles("d", config, save(tensors | {key: spoiled}), None, None)
    shapes = {site: (linear.out_features, linear.in_features) for site, linear in base.linears().items()}
    return parse_adapter(files, shapes, base.identity, base.dtype, 64, BaseWeights(base.model))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({3: math.nan}, torch.bfloat16),
        ({0: math.inf}, torch.bfloat16),
        ({5: -math.inf}, torch.float16),
        ({1: math.inf, 7: -math.inf}, torch.float32),
        ({2: math.inf, 4: 3e38, 6: -3e38}, torch.float32),
    ],
)
def test_not_a_number_is_refused(
    base: BaseModel, tiny_base: Path, tmp_path: Path, values: dict[int, float], dtype: torch.dtype
) -> None:
    (directory,) = write_adapters(tiny_base, tmp_path, 1)
    with pytest.raises(AdapterUnservable, match="holds NaN or infinite values"):
        parsed(base, directory, values, dtype)


def test_finite_numbers_whose_sum_overflows_are_taken(base: BaseModel, tiny_base: Path, tmp_path: Path) -> None:
    (directory,) = write_adapters(tiny_base, tmp_path, 1)
    huge = 3e38
    assert not math.isfinite(torch.tensor([huge, huge]).sum())
    taken = parsed(base, directory, {0: huge, 1: huge, 2: huge}, torch.float32)
    assert max(float(site.a.abs().max()) for site in taken.sites.values()) == pytest.approx(huge, rel=0.01)


def test_host_bytes_are_those_of_the_tensors(base: BaseModel, tiny_base: Path, tmp_path: Path) -> None:
    (directory,) = write_adapters(tiny_base, tmp_path, 1)
    taken = parsed(base, directory, {}, torch.bfloat16)
    assert taken.bytes == taken.bytes == sum(4 * (site.a.numel() + site.b.numel()) for site in taken.sites.values())
