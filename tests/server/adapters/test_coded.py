"""Adapters on a GPU's NF4 layers, whose weight is no parameter."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from hub.lora_config import LoraConfig
from server.adapters.base_weights import BaseWeights
from server.adapters.bind_parts import BoundParts, bind_parts
from server.errors import UnsupportedAdapter
from server.kernels.gpu import nf4
from server.kernels.gpu.selfcheck import random_weight
from server.model.gpu_linear import Nf4Linear, become
from tests.server.adapters.test_base_weights import OneLinear

OUT, WIDTH = 50, 128


@pytest.fixture
def base() -> BaseWeights:
    linear = nn.Linear(WIDTH, OUT, device="meta")
    linear.bias = nn.Parameter(torch.randn(OUT), requires_grad=False)
    become(linear, random_weight(OUT, WIDTH, "cpu"), nf4.Workspace("cpu"), torch.float32)
    assert isinstance(linear, Nf4Linear)
    return BaseWeights(OneLinear(linear))


def bind(base: BaseWeights, given: dict[tuple[str, str], torch.Tensor]) -> BoundParts:
    config = LoraConfig(r=4, lora_alpha=4.0, modules_to_save=("linear",))
    return bind_parts(config, False, {}, {"linear": given}, base, torch.float32, 64)


@pytest.mark.parametrize("rows", [1, 7, OUT, 64])
def test_a_weight_is_read_in_stretches(rows: int, base: BaseWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking takes some twenty bytes a weight, and several adapters may be read at a time."""
    monkeypatch.setattr("server.adapters.base_weights._AT_ONCE", rows * WIDTH + random.randrange(WIDTH))
    read = list(base.dense_rows("linear"))
    assert max(part.shape[0] for part in read) == min(rows, OUT)
    assert torch.equal(torch.cat(read), base.dense("linear"))


def test_an_adapter_replaces_it(base: BaseWeights) -> None:
    weight, x = torch.randn(OUT, WIDTH), torch.randn(3, WIDTH)
    bound = bind(base, {("saved", "weight"): weight})
    replaced = bound.parts.modules["linear"].replacement
    assert type(replaced) is nn.Linear and not bound.inert
    bias = base.get("linear").bias  # type: ignore[union-attr]
    torch.testing.assert_close(replaced(x), nn.functional.linear(x, weight, bias))  # type: ignore[arg-type]


def test_its_bias_alone_is_not_replaced(base: BaseWeights) -> None:
    with pytest.raises(UnsupportedAdapter, match="only the bias of a quantized layer"):
        bind(base, {("saved", "bias"): torch.randn(OUT)})
