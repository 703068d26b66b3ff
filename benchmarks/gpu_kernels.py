"""The kernels one by one: how long, and what share of what the card can do."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_bench import Bench, Missing, Report
from benchmarks.gpu_model import LLAMA_8B, TINY, Shape
from benchmarks.gpu_variants import compile_cuts
from server.kernels.gpu import attention, cuda, nf4, nf4_cuda, prompts
from server.kernels.gpu.launch import processors
from server.kernels.gpu.lora import LoraSites, lora_add, scratch
from server.kernels.gpu.lora_plan import DECODE_TOKENS, LoraPlan
from server.kernels.gpu.selfcheck import PAGE, random_weight

BF16 = torch.bfloat16
_NOT_TIMED = ("rows", "by_registers", "ahead")  # of a cut's fields, by the section `cuts`


def nf4_products(bench: Bench) -> Report:
    """The four products of an 8B layer by rows: time, share of bandwidth, beside bf16 by torch."""
    shape = TINY if bench.tiny else LLAMA_8B
    workspace = nf4.Workspace(bench.device)
    rows: list[dict[str, object]] = []
    for name, (out, width) in shape.linears.items():
        copies = 1 if bench.tiny else max(4, (256 << 20) // (out * width // 2))
        weights = [random_weight(out, width, bench.device) for _ in range(copies)]
        full = [torch.randn(out, width, dtype=BF16, device=bench.device) for _ in range(min(copies, 4))]
        for m in (1,) if bench.tiny else (1, 8, 16, 32, 64, 128):
            if bench.left() < 5:
                return {"rows": rows, "cut": f"no time left before {name} at {m} rows"}
            x = torch.randn(m, width, dtype=BF16, device=bench.device)
            ours = bench.seconds([partial(nf4.matmul, x, w, workspace) for w in weights])
            theirs = bench.seconds([partial(_dense_product, x, w) for w in full])
            size = weights[0].nbytes + 2 * m * (width + out)
            rows.append(
                {
                    "product": name,
                    "rows": m,
                    "NF4 us": ours * 1e6,
                    "of bandwidth": bench.share_of_bandwidth(size, ours),
                    "bf16 us": theirs * 1e6,
                    "bf16 / NF4": theirs / ours,
                }
            )
    return {"rows": rows}


def _dense_product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def nf4_tilings(bench: Bench) -> Report:
    """Other ways to cut the same products, best first: what `nf4.tiling` should choose."""
    shape = TINY if bench.tiny else LLAMA_8B
    workspace = nf4.Workspace(bench.device, 1 << 24)
    rows: list[dict[str, object]] = []
    for name, (out, width) in shape.linears.items():
        weights = [random_weight(out, width, bench.device) for _ in range(1 if bench.tiny else 4)]
        for m in (1,) if bench.tiny else (1, 32):
            x = torch.randn(m, width, dtype=BF16, device=bench.device)
            tried = []
            for cut in _cuts(bench, nf4.tiling(m, out, width), width):
                if bench.left() < 5:
                    break
                taken = bench.seconds([partial(nf4.matmul, x, w, workspace, cut=cut) for w in weights], 3)
                tried.append((taken, cut))
            tried.sort(key=lambda pair: pair[0])
            given = next((taken for taken, cut in tried if cut == nf4.tiling(m, out, width)), None)
            for taken, cut in tried[:3]:
                rows.append(
                    {
                        "product": name,
                        "rows": m,
                        "tiling": str(cut),
                        "us": taken * 1e6,
                        "given us": given and given * 1e6,
                    }
                )
    return {"rows": rows}


def _cuts(bench: Bench, given: nf4.Tiling, width: int) -> list[nf4.Tiling]:
    if bench.tiny:
        return [given]
    most = width // nf4.BLOCK
    return [given] + [
        nf4.Tiling(columns, splits, warps, stages)
        for columns, warps in ((64, 4), (128, 4), (128, 8))
        for splits in (1, 2, 4, 8, 16)
        for stages in (4, 6)
        if splits <= most
    ]


def nf4_cuts(bench: Bench) -> Report:
    """Ways to cut the CUDA product beside what `nf4_cuda.best` predicts and what Triton's kernel takes.

    Leaves the fastest of each product for the sections behind it, see `gpu_variants.measured_cuts`.
    """
    if bench.device == "cpu":
        raise Missing("CUDA's kernels need a GPU")
    if not cuda.available():
        raise Missing("cuda-bindings or NVRTC is not installed")
    device = torch.device(bench.device, torch.cuda.current_device())
    count, workspace = processors(device), nf4.Workspace(device)
    rows: list[dict[str, object]] = []
    fours = nf4_cuda.has_fours(device)
    chosen = {
        (name, m, wgmma): _different_cuts(m, *LLAMA_8B.linears[name], wgmma)
        for m, wgmma in ((32, True), (8, False), (1, False), (64, True), (16, True))
        for name in ("gate_up", "down", "qkv", "out")
        if fours or not wgmma
    }
    compile_cuts([(cut, LLAMA_8B.linears[name][1]) for (name, _, _), cuts in chosen.items() for cut in cuts], device)
    weights = {}
    for name, (out, width) in LLAMA_8B.linears.items():
        copies = max(4, (120 << 20) // (out * width // 2))
        weights[name] = [random_weight(out, width, bench.device) for _ in range(copies)]
    quickest = bench.cuts
    for (name, m, _), cuts in chosen.items():
        out, width = LLAMA_8B.linears[name]
        x = torch.randn(m, width, dtype=BF16, device=bench.device)
        triton = nf4.tiling(m, out, width)
        plain = bench.seconds([partial(nf4.matmul, x, w, workspace, cut=triton) for w in weights[name]], 3)
        meant = nf4.matmul(x, weights[name][0], workspace, cut=triton).double()
        quickest.setdefault((m, out, width), (plain, None))
        for cut in cuts:
            if bench.left() < 3:
                return {"rows": rows, "cut": f"no time left at {name}, {m} rows"}
            row: dict[str, object] = {"product": name, "rows": m, "Triton us": plain * 1e6}
            row |= {field: value for field, value in asdict(cut).items() if field not in _NOT_TIMED}
            rows.append(row)
            try:
                calls = [partial(_cut_product, x, w, workspace, cut) for w in weights[name]]
                taken = bench.seconds(calls, 3)
                off = float((calls[0]().double() - meant).norm() / meant.norm())
            except RuntimeError as error:  # one that cannot be launched hides no other
                row["failure"] = str(error)[:80]
                continue
            if off < 1e-2:
                quickest[m, out, width] = min(quickest[m, out, width], (taken, cut), key=lambda pair: pair[0])
            row |= {
                "us": taken * 1e6,
                "predicted us": cut.cycles(out, width, count) / 1755,
                "of bandwidth": bench.share_of_bandwidth(weights[name][0].nbytes, taken),
                "from Triton's": off,
            }
    return {"rows": rows}


def _different_cuts(rows: int, out: int, width: int, wgmma: bool) -> list[nf4_cuda.Cut]:
    """The likeliest that differ in more than how sums are joined: eight, and eight whose sharers have tiles of their
    own."""
    properties = torch.cuda.get_device_properties(0)
    limit, count = properties.shared_memory_per_multiprocessor, properties.multi_processor_count
    likely: dict[tuple[int, ...], nf4_cuda.Cut] = {}
    for cut in sorted(nf4_cuda.cuts(rows, width, limit, wgmma), key=lambda cut: cut.cycles(out, width, count)):
        likely.setdefault((cut.apart, cut.outputs, cut.blocks, cut.warps, cut.slices(width)), cut)
    ways = ([cut for cut in likely.values() if cut.apart == apart] for apart in (False, True))
    return [cut for way in ways for cut in way[:8]]


def written_cuts(bench: Bench, path: Path) -> None:
    """The fastest cuts by an earlier call's JSON, as if the section `cuts` had run."""
    quickest = bench.cuts
    fields = [field.name for field in dataclass_fields(nf4_cuda.Cut) if field.name not in _NOT_TIMED[1:]]
    for row in json.loads(path.read_text(encoding="utf-8"))["sections"]["cuts"]["rows"]:
        key = (row["rows"], *LLAMA_8B.linears[row["product"]])
        quickest.setdefault(key, (row["Triton us"] / 1e6, None))
        if "us" in row and row["us"] / 1e6 < quickest[key][0]:
            quickest[key] = (row["us"] / 1e6, nf4_cuda.Cut(**{name: row[name] for name in fields}))


def _cut_product(x: Tensor, weight: nf4.Nf4Weight, workspace: nf4.Workspace, cut: nf4_cuda.Cut) -> Tensor:
    y = nf4_cuda.product(x, weight.codes, weight.scales, None, workspace.parts, workspace.counters, cut)
    if y is None:
        raise RuntimeError(f"{cut} cannot be launched")
    return y


def nf4_bitsandbytes(bench: Bench) -> Report:
    """The same products by bitsandbytes' own path."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Missing("bitsandbytes is not installed")
    if bench.device == "cpu":
        raise Missing("bitsandbytes' CUDA kernels need a GPU")
    import bitsandbytes

    workspace = nf4.Workspace(bench.device)
    rows: list[dict[str, object]] = []
    for name, (out, width) in LLAMA_8B.linears.items():
        kept = []
        for _ in range(4):
            full = torch.randn(out, width, dtype=BF16, device=bench.device) * width**-0.5
            packed, state = bitsandbytes.functional.quantize_4bit(
                full, quant_type="nf4", blocksize=64, compress_statistics=True
            )
            kept.append((packed, state, nf4.from_bitsandbytes(packed, state, BF16)))
        for m in (1, 8, 32):
            x = torch.randn(m, width, dtype=BF16, device=bench.device)
            ours = bench.seconds([partial(nf4.matmul, x, w, workspace) for _, _, w in kept])
            theirs = bench.seconds([partial(bitsandbytes.matmul_4bit, x, p.t(), quant_state=s) for p, s, _ in kept])
            rows.append(
                {"product": name, "rows": m, "ours us": ours * 1e6, "theirs us": theirs * 1e6, "times": theirs / ours}
            )
    return {"rows": rows}


def lora(bench: Bench) -> Report:
    """Shrink and expand of q, k, v and of gate, up: distinct adapters of rank 16, bytes against bandwidth."""
    shape = TINY if bench.tiny else LLAMA_8B
    rows: list[dict[str, object]] = []
    for name, outs in shape.sites.items():
        width = shape.linears[name][1]
        for batch in (2,) if bench.tiny else (1, 8, 32, 64):
            if bench.left() < 5:
                return {"rows": rows, "cut": "no time left"}
            plan = LoraPlan(bench.device, tokens=DECODE_TOKENS, groups=batch, pieces=batch)
            plan.fill([(t, t + 1, 16 * t, 16 * t + 16, 1.0) for t in range(batch)])
            size = 2 * 16 * batch * (len(outs) * width + sum(outs))
            sets = []
            for _ in range(1 if bench.tiny else max(4, min(64, (256 << 20) // size))):
                a = [torch.randn(16 * batch, width, dtype=BF16, device=bench.device) for _ in outs]
                sets.append(LoraSites(a, [torch.randn(16 * batch, n, dtype=BF16, device=bench.device) for n in outs]))
            x = torch.randn(batch, width, dtype=BF16, device=bench.device)
            y = torch.zeros(batch, sum(outs), dtype=BF16, device=bench.device)
            h = scratch(plan, sets[0])
            taken = bench.seconds([partial(lora_add, y, x, s, plan, h) for s in sets])
            plan.fill([])
            idle = bench.seconds([partial(lora_add, y, x, s, plan, h) for s in sets])
            rows.append(
                {
                    "product": name,
                    "adapters": batch,
                    "us": taken * 1e6,
                    "of bandwidth": bench.share_of_bandwidth(size, taken),
                    "base-only us": idle * 1e6,
                }
            )
    return {"rows": rows}


def attention_kernels(bench: Bench) -> Report:
    """Decode by bytes of keys and values, prefill by floating-point operations (half of the square: causal)."""
    shape = TINY if bench.tiny else LLAMA_8B
    rows: list[dict[str, object]] = []
    for batch, length in ((2, 40),) if bench.tiny else ((1, 8192), (8, 8192), (32, 384), (32, 2048), (64, 1024)):
        if bench.left() < 5:
            return {"rows": rows, "cut": "no time left"}
        pages = -(-length // PAGE)
        size = 2 * 2 * batch * length * shape.kv_heads * shape.width
        caches = [_cache(bench, shape, batch * pages) for _ in range(1 if bench.tiny else max(2, (200 << 20) // size))]
        q = torch.randn(batch, shape.heads, shape.width, dtype=BF16, device=bench.device)
        table = torch.randperm(batch * pages, device=bench.device).int().view(batch, pages)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=bench.device)
        room = attention.DecodeScratch(batch, shape.heads, shape.width, length, bench.device)
        taken = bench.seconds(
            [partial(attention.decode, q, k, v, table, lengths, room, page_tokens=PAGE, scale=0.1) for k, v in caches]
        )
        rows.append(
            {"kernel": f"decode {batch} x {length}", "us": taken * 1e6, "share": bench.share_of_bandwidth(size, taken)}
        )
    count, length = (2, 20) if bench.tiny else (8, 2048)
    pages = -(-length // PAGE)
    k, v = _cache(bench, shape, count * pages)
    q = torch.randn(count * length, shape.heads, shape.width, dtype=BF16, device=bench.device)
    plan = prompts.PrefillPlan.make(
        [(i * length, (i + 1) * length, length) for i in range(count)],
        [list(range(i * pages, (i + 1) * pages)) for i in range(count)],
        bench.device,
    )
    out = torch.empty_like(q)
    taken = bench.seconds([lambda: prompts.prefill(q, k, v, plan, out, page_tokens=PAGE, scale=0.1)])
    done = 4 * count * length**2 / 2 * shape.heads * shape.width
    ceiling = bench.ceilings.get("bf16_flops")
    rows.append(
        {
            "kernel": f"prefill {count} x {length}",
            "us": taken * 1e6,
            "share": done / taken / ceiling if ceiling else None,
        }
    )
    return {"rows": rows}


def _cache(bench: Bench, shape: Shape, pages: int) -> tuple[Tensor, Tensor]:
    size = (shape.kv_heads, pages * PAGE, shape.width)
    return torch.randn(*size, dtype=BF16, device=bench.device), torch.randn(*size, dtype=BF16, device=bench.device)
