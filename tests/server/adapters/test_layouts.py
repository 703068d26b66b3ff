"""Adapters of a known layout: the same weights and the same refusals as of one never seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from server.adapters import weights as weights_module
from server.adapters.base_weights import BaseWeights
from server.adapters.layouts import MOST, Layouts
from server.adapters.weights import AdapterFiles, LoraWeights, parse_adapter
from server.config import ModelConfig
from server.errors import AdapterUnservable, BaseMismatch
from server.kernels.native.library import library
from server.model.base import BaseModel, load_base

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler on this machine: layouts are not kept")


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseModel:
    return load_base(ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1))


class World:
    """One base's layouts; counts the files whose tensors were looked at one by one."""

    def __init__(self, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.layouts = Layouts()
        self.read = 0
        tensors_in = weights_module.tensors_in

        def counted(data: bytes) -> dict[str, torch.Tensor]:
            self.read += 1
            return tensors_in(data)

        monkeypatch.setattr(weights_module, "tensors_in", counted)

    def parse(self, config: bytes, data: bytes, layouts: Layouts | None) -> LoraWeights:
        shapes = {site: (linear.out_features, linear.in_features) for site, linear in self.base.linears().items()}
        files = AdapterFiles("d", config, data, None, None)
        base = self.base
        return parse_adapter(files, shapes, base.identity, torch.bfloat16, 64, BaseWeights(base.model), layouts)

    def known(self, config: bytes, data: bytes) -> LoraWeights:
        """Of a layout met before, for the parser does not look at the tensors."""
        before = self.read
        parsed = self.parse(config, data, self.layouts)
        assert self.read == before
        return parsed


@pytest.fixture
def world(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(base, monkeypatch)


def files(directory: Path) -> tuple[bytes, bytes]:
    return (directory / "adapter_config.json").read_bytes(), (directory / "adapter_model.safetensors").read_bytes()


def other_values(data: bytes, change: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    """A file of the same names and shapes, as PEFT writes it."""
    return save({name: change(tensor).contiguous() for name, tensor in load(data).items()}, metadata={"format": "pt"})


def same(one: LoraWeights, other: LoraWeights) -> bool:
    assert (one.rank, one.warnings, one.reaches_kv, one.parts) == (
        other.rank,
        other.warnings,
        other.reaches_kv,
        other.parts,
    )
    assert list(one.sites) == list(other.sites)
    return all(
        torch.equal(one.sites[site].a, other.sites[site].a) and torch.equal(one.sites[site].b, other.sites[site].b)
        for site in one.sites
    )


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"r": 8, "lora_alpha": 12},
        {"r": 24, "lora_alpha": 5, "use_rslora": True},
        {"r": 4, "rank_pattern": {"q_proj": 19}, "alpha_pattern": {"up_proj": 3}},
    ],
)
def test_the_same_rows(
    world: World,
    tiny_base: Path,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    how: dict[str, object],
    narrow: bool,
) -> None:
    config, data = files(make_adapter(tiny_base, tmp_path / "a", seed=1, b_std=0.3, **how))
    if narrow:
        data = other_values(data, torch.Tensor.bfloat16)
    first = world.parse(config, data, world.layouts)
    assert same(first, world.parse(config, data, None))
    second = other_values(data, lambda tensor: torch.randn(tensor.shape).to(tensor.dtype))
    known = world.known(config, second)
    assert same(known, world.parse(config, second, None))
    assert not same(known, first)
    assert same(first, world.parse(config, data, None))  # its memory is its own


def test_another_config_is_another_layout(
    world: World, tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    config, data = files(make_adapter(tiny_base, tmp_path / "a", b_std=0.3, lora_alpha=8))
    world.parse(config, data, world.layouts)
    louder = json.dumps(json.loads(config) | {"lora_alpha": 16}).encode()
    assert not same(world.parse(louder, data, world.layouts), world.known(config, data))
    assert same(world.known(louder, data), world.parse(louder, data, None))


def test_the_tensor_that_is_not_finite_is_named(
    world: World, tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    config, data = files(make_adapter(tiny_base, tmp_path / "a", b_std=0.3))
    world.parse(config, data, world.layouts)
    tensors = load(data)
    for name in list(tensors)[:: len(tensors) // 5]:
        spoiled = {key: tensor.clone() for key, tensor in tensors.items()}
        spoiled[name].view(-1)[-1] = math.nan
        with pytest.raises(AdapterUnservable) as unknown:
            world.parse(config, save(spoiled), None)
        with pytest.raises(AdapterUnservable) as known:
            world.known(config, save(spoiled, metadata={"format": "pt"}))
        assert str(known.value) == str(unknown.value)
        assert name.removeprefix("base_model.model.").removesuffix(".weight") in str(known.value)


def test_a_delta_of_zero_is_told(
    world: World, tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    config, data = files(make_adapter(tiny_base, tmp_path / "a", b_std=0.3))
    assert not world.parse(config, data, world.layouts).warnings
    assert world.known(config, other_values(data, torch.zeros_like)).warnings


def test_a_file_that_ends_early_is_looked_at(
    world: World, tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    config, data = files(make_adapter(tiny_base, tmp_path / "a", b_std=0.3))
    world.parse(config, data, world.layouts)
    for cut in (data[:-4], data[:20], data[:3], b""):
        with pytest.raises(AdapterUnservable):
            world.parse(config, cut, world.layouts)


def test_whose_base_is_another_is_refused_all_the_same(
    world: World, tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    config, data = files(make_adapter(tiny_base, tmp_path / "a", b_std=0.3))
    world.parse(config, data, world.layouts)
    given = AdapterFiles("d", config, data, "another", "sha256:" + 64 * "0")
    with pytest.raises(BaseMismatch):
        parse_adapter(given, {}, world.base.identity, torch.bfloat16, 64, BaseWeights(world.base.model), world.layouts)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_what_is_more_than_rank_rows_is_not_kept(
    world: World, tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path, kind: dict[str, object]
) -> None:
    config, data = files(make_adapter(tiny_base, tmp_path / "a", b_std=0.3, **kind))
    world.parse(config, data, world.layouts)
    assert world.layouts.find(config, data) is None


def test_half_precision_is_not_kept(
    world: World, tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    config, data = files(make_adapter(tiny_base, tmp_path / "a", b_std=0.3))
    half = other_values(data, torch.Tensor.half)
    world.parse(config, half, world.layouts)
    assert world.layouts.find(config, half) is None


def test_so_many_are_remembered(
    world: World, tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    config, data = files(make_adapter(tiny_base, tmp_path / "a", b_std=0.3))
    configs = [json.dumps(json.loads(config) | {"lora_alpha": alpha}).encode() for alpha in range(1, MOST + 2)]
    for each in configs:
        world.parse(each, data, world.layouts)
        world.known(configs[0], data)  # used again and again: stays
    assert world.layouts.find(configs[1], data) is None
    assert all(world.layouts.find(each, data) for each in (configs[0], *configs[2:]))
