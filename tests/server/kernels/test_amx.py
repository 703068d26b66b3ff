"""The packed matrix product against torch in float64."""

import pytest
import torch

from server.kernels.native import amx


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 40, 97])
@pytest.mark.parametrize(("out_features", "in_features"), [(32, 32), (576, 576), (96, 1536)])
def test_multiply(rows: int, out_features: int, in_features: int) -> None:
    weight = torch.randn(out_features, in_features).bfloat16()
    packed = amx.pack(weight)
    if packed is None:
        pytest.skip("no AMX or no C compiler on this machine")
    x, bias = torch.randn(rows, in_features).bfloat16(), torch.randn(out_features).bfloat16()
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    got = packed.multiply(x, bias)
    # One rounding to 8 bits of mantissa, and float32 sums.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-3)
    assert torch.equal(packed.dense(), weight)
    # A row alone gives the same bits as in company.
    assert torch.equal(packed.multiply(x[-1:], bias)[0], got[-1])


def test_what_cannot_be_packed_is_left_alone() -> None:
    assert amx.pack(torch.randn(64, 64)) is None
    assert amx.pack(torch.randn(40, 64).bfloat16()) is None


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_nf4_as_bitsandbytes_dequantizes_it(rows: int, nested: bool) -> None:
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit
    from torch import nn

    from server.model.packed import pack_linears

    layers: list[nn.Module] = []
    for out_features in (96, 64):
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
        layers.append(layer.to("cpu"))
    dense = torch.cat([dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers])
    assert dense.dtype == torch.bfloat16
    packed = pack_linears(*layers)
    if packed is None:
        pytest.skip("no AMX or no C compiler on this machine")
    x = torch.randn(rows, 320).bfloat16()
    expected = torch.nn.functional.linear(x.double(), dense.double())
    torch.testing.assert_close(packed(x).double(), expected, rtol=2**-8, atol=1e-3)
    # One input at a time shows single weights: they are bitsandbytes' own, bit for bit.
    one_hot = torch.eye(320).bfloat16()
    assert torch.equal(packed(one_hot), dense.T)
    # Each layer alone goes on, on its part.
    assert torch.equal(torch.cat([layer(one_hot) for layer in layers], -1), dense.T)
    assert torch.equal(torch.cat([layer.weight for layer in layers]), dense)
