"""Weights are read back as they compute, also after bitsandbytes has repacked them in place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from transformers import AutoModelForCausalLM

from server.adapters.base_weights import BaseWeights
from server.adapters.parts import _by_row
from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.request import AdapterUse, Request, Stopping
from server.model.base import load_base


class OneLinear(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def get_input_embeddings(self) -> None: ...

    def get_output_embeddings(self) -> None: ...


@pytest.mark.parametrize("double", [True, False])
def test_nf4_after_the_first_call(double: bool) -> None:
    linear = bitsandbytes.nn.Linear4bit(
        128, 96, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=double
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        torch.randn(96, 128), requires_grad=False, quant_type="nf4", compress_statistics=double
    )
    linear = linear.to("cpu").eval()
    fresh = dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    read = BaseWeights(OneLinear(linear)).dense("linear")  # runs the layer once
    # The packed kernel rounds each block's scale to bfloat16, and computes with that.
    torch.testing.assert_close(read, fresh, rtol=2**-8, atol=1e-6)


def test_int8() -> None:
    weight = torch.randn(96, 128)
    linear = bitsandbytes.nn.Linear8bitLt(128, 96, bias=False, has_fp16_weights=False, threshold=0.0)
    linear.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    linear = linear.to("cpu").eval()
    weights = BaseWeights(OneLinear(linear))
    for _ in range(2):
        step = weight.abs().max(dim=1, keepdim=True).values / 127
        assert bool(((weights.dense("linear") - weight).abs() <= 0.51 * step + 1e-2).all())
        linear(torch.randn(2, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_dora_on_a_quantized_base_that_has_already_run(
    quantization: str,
    tiny_base: Path,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
    directory_fetch: Callable[[dict[str, Path]], Any],
) -> None:
    """Against PEFT on a plain model that holds the dequantized weights; the wrong norms would be far off."""
    config = ModelConfig(base=str(tiny_base), quantization=quantization, dtype="float32", threads=1)
    adapter = make_adapter(tiny_base, tmp_path / "dora", use_dora=True)
    prompt = [10, 200, 30, 41, 5]

    fresh = load_base(config)
    weights = BaseWeights(fresh.model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        for path in fresh.linears():
            plain.get_submodule(path).weight.copy_(weights.dense(path))
        base = plain(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        adapted = peft.PeftModel.from_pretrained(plain, adapter)(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)

    engine = Engine.build(
        config,
        EngineLimits(adapter_memory_bytes=4 << 20, kv_memory_bytes=4 << 20),
        directory_fetch({"dora": adapter}),
    )

    def first(*uses: AdapterUse) -> torch.Tensor:
        request = Request(str(len(uses)), tuple(prompt), Stopping(max_new_tokens=1), adapters=uses, logprobs=300)
        (answer,) = engine.generate([request])
        assert answer.error is None
        return torch.tensor([value for _, value in sorted(answer.deltas[0].logprobs[0].top)])

    try:
        before, dora = first(), first(AdapterUse("dora", "t/dora@1"))
    finally:
        engine.close()
    rounding = (before - base).abs().max()  # of the quantized kernels themselves
    assert (dora - adapted).abs().max() < 3 * rounding + 0.02
    assert (dora - before).abs().max() > 10 * rounding


@pytest.mark.parametrize("tokens", [1, 4, 7])
@pytest.mark.parametrize("heads", [1, 4])
def test_rows_of_norms_over_heads_are_found_in_either_order(tokens: int, heads: int) -> None:
    flat = torch.randn(1, tokens, heads * 8)
    by_token = flat.view(1, tokens, heads, 8)
    for given in (by_token, by_token.transpose(1, 2)):
        found = _by_row(given, tokens, 2)
        assert found is not None
        torch.testing.assert_close(found.reshape(tokens, -1), flat[0])
    assert _by_row(flat, tokens + 1, 2) is None
