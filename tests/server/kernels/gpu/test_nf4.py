"""Products with bitsandbytes' own packed weights against float64, and the PTX that unpacks them, run in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.kernels.gpu import nf4
from server.kernels.gpu.nf4_levels import LEVELS, unpack_asm

Close = Callable[[Tensor, Tensor], None]
NAN = float("nan")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def quantized(out: int, width: int, nested: bool, device: str, size: float = 0.05) -> tuple[Tensor, Any, Tensor]:
    """bitsandbytes' packed weight and state, and what they mean in float64."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    dense = (torch.randn(out, width) * size).to(device)
    packed, state = quantize_4bit(dense, quant_type="nf4", blocksize=64, compress_statistics=nested)
    return packed, state, dequantize_4bit(packed, state).double().cpu()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "out", "width"), [(1, 96, 192), (5, 70, 256), (33, 64, 128)])
def test_products(nested: bool, rows: int, out: int, width: int, dtype: torch.dtype, device: str, close: Close) -> None:
    packed, state, meant = quantized(out, width, nested, device)
    weight = nf4.from_bitsandbytes(packed, state, dtype)
    assert weight.codes.data_ptr() == packed.data_ptr()
    assert weight.scales.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
    x = torch.randn(rows, width).to(dtype).to(device)
    y = nf4.matmul(x, weight, nf4.Workspace(device, 1 << 16, 8))
    close(y, x.double().cpu() @ meant.T)


@pytest.mark.parametrize("biased", [False, True])
def test_parts_of_a_sum(biased: bool, dtype: torch.dtype, device: str, close: Close) -> None:
    """Five blocks in two and three parts, outputs that end inside a tile; every launch leaves the counters at zero."""
    packed, state, meant = quantized(80, 320, True, device)
    weight = nf4.from_bitsandbytes(packed, state, dtype)
    workspace = nf4.Workspace(device, 1 << 16, 8)
    bias = torch.randn(80).to(dtype).to(device) if biased else None
    for splits in (2, 3):
        workspace.parts.fill_(NAN)
        x = torch.randn(3, 320).to(dtype).to(device)
        y = nf4.matmul(x, weight, workspace, bias, nf4.Tiling(64, splits))
        expected = x.double().cpu() @ meant.T
        close(y, expected if bias is None else expected + bias.double().cpu())
        assert not workspace.counters.any()


def test_many_rows_and_the_dense_weight(dtype: torch.dtype, device: str, close: Close) -> None:
    packed, state, meant = quantized(40, 320, True, device)
    weight = nf4.from_bitsandbytes(packed, state, dtype)
    close(nf4.dequantize(weight, dtype), meant)
    x = torch.randn(nf4.FUSED_ROWS + 1, 320).to(dtype).to(device)
    close(nf4.matmul(x, weight, nf4.Workspace(device, 16, 1)), x.double().cpu() @ meant.T)


def test_joined_weights(dtype: torch.dtype, device: str, close: Close) -> None:
    first, second = quantized(32, 128, True, device), quantized(48, 128, True, device, size=1e-6)
    weights = [nf4.from_bitsandbytes(packed, state, dtype) for packed, state, _ in (first, second)]
    # The second's scales would lose their digits in float16.
    assert weights[1].scales.dtype == torch.float32
    joined = nf4.side_by_side(weights)
    x = torch.randn(2, 128).to(dtype).to(device)
    y = nf4.matmul(x, joined, nf4.Workspace(device, 1 << 16, 8))
    close(y[:, :32], x.double().cpu() @ first[2].T)
    close(y[:, 32:], x.double().cpu() @ second[2].T)


def test_refusals(device: str) -> None:
    packed, state, _ = quantized(32, 96, False, device)
    with pytest.raises(ValueError, match=r"not nf4 in blocks of 64 over \[32, 96\]"):
        nf4.from_bitsandbytes(packed, state, torch.float32)
    packed, state, _ = quantized(32, 128, False, device)
    weight = nf4.from_bitsandbytes(packed, state, torch.float32)
    with pytest.raises(ValueError, match="64 columns times a weight"):
        nf4.matmul(torch.zeros(1, 64, device=device), weight, nf4.Workspace(device, 16, 1))
    with pytest.raises(ValueError, match="workspace is too small"):
        x = torch.zeros(1, 128, device=device)
        nf4.matmul(x, weight, nf4.Workspace(device, 16, 1), cut=nf4.Tiling(64, 2))


def test_the_tilings_of_a_large_model_fit_the_workspace() -> None:
    for out, width in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1024, 64), (128, 2048)):
        for rows in (1, 8, 16, 17, 32, 64):
            cut = nf4.tiling(rows, out, width)
            tiles = -(-out // cut.columns)
            assert 1 <= cut.splits <= width // 64
            assert tiles * cut.splits * cut.columns * nf4.power_of_two(rows) <= 1 << 22
            assert tiles <= 1 << 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_unpacking_instructions(dtype: torch.dtype) -> None:
    """Every byte in every place, through the four instructions as the PTX manual defines them."""
    asm = unpack_asm(dtype)
    table = torch.tensor(LEVELS).to(dtype)
    for shift in range(256):
        octets = [(shift + 67 * place) % 256 for place in range(4)]
        out = run_ptx(asm, int.from_bytes(bytes(octets), "little"))
        words = torch.tensor([w - (1 << 32) if w >> 31 else w for w in out], dtype=torch.int32)
        levels = words.view(torch.int16).view(dtype)
        first, second = octets[0::2], octets[1::2]  # of each int16
        codes = [
            *(o >> 4 for o in first),
            *(o & 15 for o in first),
            *(o >> 4 for o in second),
            *(o & 15 for o in second),
        ]
        assert torch.equal(levels, table[codes])


def run_ptx(asm: str, given: int) -> list[int]:
    registers = {"$4": given}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in asm.strip("{}\n").split("\n"):
        name, _, rest = line.rstrip(";").partition(" ")
        target, *sources = rest.replace(" ", "").split(",")
        if name == ".reg":
            continue
        a, b, *more = [value(source) for source in sources]
        if name == "and.b32":
            result = a & b
        elif name == "shr.b32":
            result = a >> b
        elif name == "prmt.b32":
            pool = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
            picks = [more[0] >> 4 * place & 15 for place in range(4)]
            assert all(pick < 8 for pick in picks), "the top bit of a selector replicates the sign"
            result = int.from_bytes(bytes(pool[pick] for pick in picks), "little")
        elif name == "lop3.b32":
            assert more[1] == 0xCA
            result = (a & b) | (~a & more[0])
        else:
            raise AssertionError(f"an instruction this test does not know: {name}")
        registers[target] = result & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(4)]
