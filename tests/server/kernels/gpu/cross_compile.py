"""Compiles kernels for an H200 on a machine without one; started by test_compiles.py in a process of its own.

The interpreter accepts what the compiler refuses. Here every launch is caught, compiled for compute capability 9.0
with the arguments it was given, and not run. Prints JSON: [{kernel, registers, spills, shared, wide, asked}, ...].
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from server.kernels.gpu import launch

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
found: list[dict[str, Any]] = []


def catch(kernel: JITFunction[Any], *given: Any, grid: Any = None, warmup: bool = False, **named: Any) -> None:
    """In place of `JITFunction.run`: what the launcher would compile for these arguments."""
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    values = dict(zip([p.name for p in kernel.params], given, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[index,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    asked = len(re.findall(r"prefetch\.global\.L2", ptx.partition("griddepcontrol.wait")[0]))
    found.append({"kernel": kernel.fn.__name__, **usage(compiled), "wide": wide(ptx), "asked": asked})
    if os.environ.get("KEEP_PTX"):
        for kind in ("ptx", "ttgir"):
            Path(os.environ["KEEP_PTX"], f"{len(found)}-{kernel.fn.__name__}.{kind}").write_text(compiled.asm[kind])


def usage(compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes spilled to local memory, shared bytes a program, as ptxas counts them."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(90)
    with tempfile.TemporaryDirectory() as directory:
        ptx = Path(directory, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [ptxas.path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(Path(directory, "kernel.cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None
    assert spills is not None
    return {"registers": int(registers[1]), "spills": int(spills[1]), "shared": compiled.metadata.shared}


def wide(ptx: str) -> int:
    """Loads of 16 bytes a thread, straight or into shared memory."""
    straight = len(re.findall(r"ld\.global\.[\w.:]*v4\.b32", ptx)) + len(re.findall(r"ld\.global\.[\w.:]*v2\.b64", ptx))
    return straight + len(re.findall(r"cp\.async\.c[ga]\.shared\.global.*, 0x10", ptx))


def lora(tokens: int) -> None:
    """q, k and v of an 8B model at rank 16."""
    from server.kernels.gpu.lora import LoraSites, lora_add
    from server.kernels.gpu.lora_plan import LoraPlan

    outs = (4096, 1024, 1024)
    a = [torch.zeros(16, 4096, dtype=torch.bfloat16) for _ in outs]
    b = [torch.zeros(16, out, dtype=torch.bfloat16) for out in outs]
    plan = LoraPlan("cpu", tokens=tokens, groups=8, pieces=8)
    x, y = torch.zeros(8, 4096, dtype=torch.bfloat16), torch.zeros(8, 6144, dtype=torch.bfloat16)
    lora_add(y, x, LoraSites(a, b), plan)


def nf4(rows: int, out: int) -> None:
    """The attention output (4096) or gate and up (28672) of an 8B model."""
    from server.kernels.gpu import nf4 as module

    module._asm = lambda x, weight: module._ASM[x.dtype]
    x = torch.zeros(rows, 4096, dtype=torch.bfloat16)
    module.matmul(x, nf4_weight(out), module.Workspace("cpu"))


def nf4_dense() -> None:
    from server.kernels.gpu import nf4 as module

    module.dequantize(nf4_weight(4096), torch.bfloat16)


def nf4_weight(out: int) -> Any:
    from server.kernels.gpu.nf4 import Nf4Weight

    codes, scales = torch.zeros(out, 2048, dtype=torch.uint8), torch.zeros(out, 64, dtype=torch.float16)
    return Nf4Weight(codes, scales, torch.zeros(16))


def decode(rows: int, longest: int, softcap: float | None = None) -> None:
    """One layer of an 8B model."""
    from server.kernels.gpu import attention

    window = None if softcap is None else 4096
    k, angle = torch.zeros(8, 256, 128, dtype=torch.bfloat16), torch.zeros(rows, 128, dtype=torch.bfloat16)
    pages, lengths = torch.zeros(rows, 64, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    scratch = attention.DecodeScratch(rows, 32, 128, longest, "cpu")
    limits = {"page_tokens": 16, "scale": 0.1, "window": window, "softcap": softcap}
    qkv = torch.zeros(rows, 6144, dtype=torch.bfloat16)
    attention.decode_new(qkv, angle, angle, lengths, k, k, pages, lengths, scratch, heads=32, **limits)
    attention.decode(qkv[:, :4096].view(rows, 32, 128), k, k, pages, lengths, scratch, **limits)


def early(run: Callable[[], None]) -> None:
    """With keys and values asked for while the kernel in front ends."""
    from server.kernels.gpu import attention

    attention.EARLY = True
    run()
    attention.EARLY = False


def prefill(softcap: float | None) -> None:
    from server.kernels.gpu import prompts

    k = torch.zeros(8, 256, 128, dtype=torch.bfloat16)
    q = torch.zeros(64, 32, 128, dtype=torch.bfloat16)
    plan = prompts.PrefillPlan.make([(0, 64, 64)], [[0, 1, 2, 3]], "cpu")
    window = None if softcap is None else 4096
    prompts.prefill(q, k, k, plan, q.clone(), page_tokens=16, scale=0.1, window=window, softcap=softcap)


def small() -> None:
    """The operations between the products, 8B widths."""
    from server.kernels.gpu import elementwise

    x = torch.zeros(2, 4096, dtype=torch.bfloat16)
    elementwise.rms_norm(x, x[0], 1e-5, x.clone())
    elementwise.silu_mul(torch.zeros(2, 28672, dtype=torch.bfloat16))
    k = torch.zeros(8, 256, 128, dtype=torch.bfloat16)
    qkv, angle = torch.zeros(2, 6144, dtype=torch.bfloat16), torch.zeros(2, 128, dtype=torch.bfloat16)
    elementwise.rope_store(qkv, angle, angle, torch.zeros(2, dtype=torch.int64), k, k, 32)
    rows = torch.zeros(16, 4096, dtype=torch.bfloat16)
    elementwise.row_norms(torch.zeros(4096, 4096, dtype=torch.bfloat16), rows, rows)


def traffic() -> None:
    """An adapter on its way to its rows; a page that is asked about."""
    from server.kernels.gpu.pages import PageCheck
    from server.kernels.gpu.scatter import scatter

    staging = torch.zeros(65536, dtype=torch.bfloat16)
    pieces = torch.zeros(2, 3, dtype=torch.int64)
    scatter(staging, staging, pieces, 65536, aligned=True)
    scatter(None, staging, pieces, 65536, aligned=False)
    PageCheck([torch.zeros(8, 256, 128, dtype=torch.bfloat16)] * 4, 16)([1, 2])


CASES: dict[str, Callable[[], None]] = {
    "lora-decode": lambda: lora(8),
    "lora-prompt": lambda: lora(64),
    "nf4-1": lambda: nf4(1, 28672),
    "nf4-64": lambda: nf4(64, 4096),
    "nf4-dense": nf4_dense,
    "decode-1": lambda: decode(1, 1024),
    "decode": lambda: decode(48, 1024),
    "decode-early": lambda: early(lambda: decode(48, 1024)),
    "decode-long": lambda: decode(48, 16384, 30.0),
    "small": small,
    "prefill": lambda: prefill(None),
    "prefill-capped": lambda: prefill(30.0),
    "traffic": traffic,
}


def main() -> None:
    JITFunction.run = catch  # type: ignore[method-assign]
    launch.processors = lambda device: 132  # type: ignore[assignment]
    launch._can_overlap = lambda device: True  # type: ignore[assignment]
    launch.precision = lambda operand: "exact" if operand.dtype == torch.float32 else "native"
    report = {}
    for name in sys.argv[1:] or CASES:
        found.clear()
        CASES[name]()
        report[name] = list(found)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
