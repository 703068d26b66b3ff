"""The packed matrix products against torch in float64."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from server.kernels.native import packing
from server.kernels.native.library import library
from server.kernels.native.packing import PackedProduct
from server.model.packed import pack_linear, pack_output_head

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler on this machine")

# One rounding to the element type, and float32 sums.
TOLERANCE = {torch.bfloat16: {"rtol": 2**-8, "atol": 1e-3}, torch.float32: {"rtol": 1e-5, "atol": 5e-4}}


def multiply(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    packed = [packing.pack(weight) for weight in weights]
    assert None not in packed
    return PackedProduct([p for p in packed if p is not None], biases)(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 3, 7, 16, 17, 32, 40, 97])
@pytest.mark.parametrize(("outs", "in_features"), [((32,), 32), ((576, 192, 192), 576), ((96, 40), 1536), ((7,), 64)])
def test_multiply(rows: int, outs: tuple[int, ...], in_features: int, dtype: torch.dtype) -> None:
    weights = [torch.randn(out, in_features).to(dtype) for out in outs]
    biases = [torch.randn(out).to(dtype) if i % 2 == 0 else None for i, out in enumerate(outs)]
    x = torch.randn(rows, in_features).to(dtype)
    got = multiply(x, weights, biases)
    expected = torch.cat(
        [
            nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
            for w, b in zip(weights, biases, strict=True)
        ],
        -1,
    )
    torch.testing.assert_close(got.double(), expected, **TOLERANCE[dtype])
    # A row alone gives the same bits as in company, and a NaN stays in its row.
    assert torch.equal(multiply(x[-1:], weights, biases)[0], got[-1])
    x[0, 0] = float("nan")
    assert torch.equal(multiply(x, weights, biases)[1:], got[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_packed_weights_can_be_read_back(dtype: torch.dtype) -> None:
    weight = torch.randn(75, 96).to(dtype)
    packed = packing.pack(weight)
    assert packed is not None
    assert torch.equal(packed.dense(), weight)
    ids = torch.randint(75, (20,))
    assert torch.equal(packed.rows(ids), weight[ids])
    for outside in (-1, 75):
        with pytest.raises(IndexError):
            packed.rows(torch.tensor([3, outside]))


def test_what_cannot_be_packed_is_left_alone() -> None:
    assert packing.pack(torch.randn(64, 64).half()) is None
    assert packing.pack(torch.randn(64, 40).bfloat16()) is None


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize("out_features", [96, 40])
def test_nf4_as_bitsandbytes_dequantizes_it(rows: int, nested: bool, out_features: int) -> None:
    layer = bitsandbytes.nn.Linear4bit(
        320, out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=nested
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(out_features, 320).bfloat16(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=nested,
        module=layer,
    )
    layer = layer.to("cpu")
    dense = dequantize_4bit(layer.weight.data, layer.weight.quant_state).view(out_features, 320)
    assert dense.dtype == torch.bfloat16
    assert pack_linear(layer)
    x = torch.randn(rows, 320).bfloat16()
    torch.testing.assert_close(layer(x).double(), x.double() @ dense.double().T, **TOLERANCE[torch.bfloat16])
    # One input at a time shows single weights: they are bitsandbytes' own, bit for bit.
    assert torch.equal(layer(torch.eye(320).bfloat16()), dense.T)
    assert torch.equal(layer.weight, dense)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_reads_its_rows_from_the_packed_head(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    ).bfloat16()
    ids = torch.randint(100, (2, 9))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows, weight, x = embedding(ids).detach(), head.weight.detach().clone(), torch.randn(4, 64).bfloat16()
    assert (head.weight is embedding.weight) == tied
    pack_output_head(model)
    assert torch.equal(embedding(ids), rows)
    assert torch.equal(head.weight, weight)
    assert (len(list(embedding.parameters())) == 0) == tied
    torch.testing.assert_close(head(x).double(), x.double() @ weight.double().T, **TOLERANCE[torch.bfloat16])
