"""The sections of benchmarks/gpu.py: each takes a `Bench` and returns {"rows": [...]}, one dict a table row."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_bench import Bench, Missing, Report
from benchmarks.gpu_model import LLAMA_1B, LLAMA_8B, PAGE, TINY, Shape, Step, dense, random_nf4
from server.kernels import reference
from server.kernels.gpu import attention, elementwise, nf4
from server.kernels.gpu.lora import LoraSites, lora_add, scratch
from server.kernels.gpu.lora_plan import LoraPlan

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Section:
    """`seconds`: its budget."""

    run: Callable[[Bench], Report]
    seconds: float


def ceilings(bench: Bench) -> Report:
    """What the card does at best: a copy (bytes read plus written), a bf16 product, a copy from pinned memory."""
    size = 1 << (12 if bench.tiny else 30)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = bench.seconds([lambda: target.copy_(source)] * (1 if bench.tiny else 4))
    bench.ceilings["bytes_per_second"] = 2 * size / copy
    n = 32 if bench.tiny else 8192
    a, b = (torch.randn(n, n, dtype=BF16, device=bench.device) for _ in range(2))
    product = bench.seconds([lambda: a @ b] * (1 if bench.tiny else 4))
    bench.ceilings["bf16_flops"] = 2 * n**3 / product
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=bench.device == "cuda")
    upload = host_copy_seconds(bench, host, target[: size // 4])
    bench.ceilings["host_bytes_per_second"] = size / 4 / upload
    return {"rows": [{"ceiling": name, "per second": rate} for name, rate in bench.ceilings.items()]}


def host_copy_seconds(bench: Bench, host: Tensor, target: Tensor) -> float:
    """Median of copies host → device, which no graph holds."""
    if bench.device == "cpu":
        return bench.seconds([lambda: target.copy_(host)])
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[4]


def correct(bench: Bench) -> Report:
    """Every kernel against float64 on fresh random inputs, outputs poisoned; raises where one is off."""
    rows = []
    for dtype, limit in ((BF16, 1e-2), (torch.float32, 1e-4)):
        for name, check in CHECKS.items():
            error = check(bench, dtype)
            rows.append({"kernel": name, "dtype": str(dtype).removeprefix("torch."), "error": error, "limit": limit})
            if not error <= limit:  # NaN too
                raise AssertionError(f"{name} in {dtype} is off by {error}, more than {limit}")
    return {"rows": rows}


def _distance(got: Tensor, meant: Tensor) -> float:
    return float((got.double() - meant).norm() / meant.norm())


def _check_lora(bench: Bench, dtype: torch.dtype, tokens: int, rows: int) -> float:
    width, outs = (96, (64, 40)) if bench.tiny else (4096, (4096, 1024))
    ranks = (16, 5, 33)
    a = [torch.randn(64, width, device=bench.device).to(dtype) * width**-0.5 for _ in outs]
    b = [torch.randn(64, out, device=bench.device).to(dtype) for out in outs]
    starts = (0, 16, 24)
    segments: list[tuple[int, int, int, int, float]] = []
    each = max(1, rows // 4)
    for adapter, (start, rank) in enumerate(zip(starts, ranks, strict=True)):
        segments.append((adapter * each, (adapter + 1) * each, start, start + rank, 1.0))
    segments.append((0, each, 24, 57, -0.5))
    x = torch.randn(rows, width, device=bench.device).to(dtype)
    y = torch.randn(rows, sum(outs), device=bench.device).to(dtype)
    y[3 * each :] = float("nan")
    expected, at = y.double(), 0
    for one_a, one_b in zip(a, b, strict=True):
        part = expected[:, at : at + one_b.shape[1]]
        reference.lora_add(part, x.double(), one_a.double(), one_b.double(), segments)
        at += one_b.shape[1]
    plan = LoraPlan(bench.device, tokens=tokens, groups=rows, pieces=8 * rows)
    plan.fill(segments)
    sites = LoraSites(a, b)
    lora_add(y, x, sites, plan, scratch(plan, sites).fill_(float("nan")))
    if not bool(torch.isnan(y[3 * each :]).all()):
        return float("nan")
    return _distance(y[: 3 * each], expected[: 3 * each])


def _check_nf4(bench: Bench, dtype: torch.dtype, rows: int) -> float:
    out, width = (80, 128) if bench.tiny else (4096, 4096)
    weight = random_nf4(out, width, bench.device)
    if dtype == torch.float32:
        weight = nf4.Nf4Weight(weight.codes, weight.scales.float(), weight.levels)
    x = torch.randn(rows, width, device=bench.device).to(dtype)
    return _distance(nf4.matmul(x, weight, nf4.Workspace(bench.device)), x.double() @ dense(weight).T)


def _check_attention(bench: Bench, dtype: torch.dtype, tokens: int) -> float:
    """`tokens` new ones of each of three sequences, window and soft-cap on."""
    lengths = [tokens, 70, 90] if bench.tiny else [tokens, 3000, 4500]
    heads, kv_heads, width = (4, 2, 32) if bench.tiny else (32, 8, 128)
    counts = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(counts)).tolist()
    pages = [[order.pop() for _ in range(count)] for count in counts]
    slots = [
        torch.tensor([own[i // PAGE] * PAGE + i % PAGE for i in range(n)], device=bench.device)
        for own, n in zip(pages, lengths, strict=True)
    ]
    k, v = (torch.full((kv_heads, sum(counts) * PAGE, width), float("nan"), device=bench.device) for _ in range(2))
    for own in slots:
        k[:, own], v[:, own] = (torch.randn(kv_heads, len(own), width, device=bench.device) for _ in range(2))
    k, v = k.to(dtype), v.to(dtype)
    q = torch.randn(3 * tokens, heads, width, device=bench.device).to(dtype)
    spans = [(i * tokens, (i + 1) * tokens) for i in range(3)]
    window, softcap, scale = lengths[1] // 2, 20.0, width**-0.5
    # The reference's softmax runs in float32, hence its float32 inputs: exact enough for both limits.
    meant = reference.paged_attention(
        q.float(), k.float(), v.float(), slots, spans, scale=scale, window=window, softcap=softcap
    )
    out = torch.full_like(q, float("nan"))
    if tokens == 1:
        widest = max(counts)
        table = torch.tensor(
            [[*own, *[0] * (widest - len(own))] for own in pages], dtype=torch.int32, device=bench.device
        )
        room = attention.DecodeScratch(3, heads, width, max(lengths), bench.device)
        room.sums.fill_(float("nan"))
        known = torch.tensor(lengths, dtype=torch.int32, device=bench.device)
        out = attention.decode(
            q, k, v, table, known, room, page_tokens=PAGE, scale=scale, window=window, softcap=softcap
        )
    else:
        stretches = [(t0, t1, length) for (t0, t1), length in zip(spans, lengths, strict=True)]
        plan = attention.PrefillPlan.make(stretches, pages, bench.device)
        attention.prefill(q, k, v, plan, out, page_tokens=PAGE, scale=scale, window=window, softcap=softcap)
    return _distance(out, meant.double())


def _check_elementwise(bench: Bench, dtype: torch.dtype) -> float:
    """The largest error of the small kernels."""
    width = 64 if bench.tiny else 4096
    x, weight = (torch.randn(*s, device=bench.device).to(dtype) for s in ((5, width), (width,)))
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    errors = [_distance(elementwise.rms_norm(x, weight, 1e-5), normed)]
    gate, up = wide.chunk(2, -1)
    errors.append(_distance(elementwise.silu_mul(x), torch.nn.functional.silu(gate) * up))
    heads, kv_heads, head = 4, 2, width // 8
    angle = torch.rand(5, head // 2, device=bench.device).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    k, v = (torch.full((kv_heads, 8, head), float("nan"), dtype=dtype, device=bench.device) for _ in range(2))
    slots = torch.tensor([3, 1, 0, 7, 5], device=bench.device)
    q = elementwise.rope_store(x, cos, sin, slots, k, v, heads)
    parts = wide.view(5, -1, head)
    low, high = parts.chunk(2, -1)
    turned = parts * cos.double()[:, None] + torch.cat([-high, low], -1) * sin.double()[:, None]
    errors.append(_distance(q, turned[:, :heads]))
    errors.append(_distance(k[:, slots].transpose(0, 1), turned[:, heads : heads + kv_heads]))
    errors.append(_distance(v[:, slots].transpose(0, 1), parts[:, heads + kv_heads :]))
    a, b = (torch.randn(8, n, device=bench.device).to(dtype) for n in (width, 48))
    base = torch.randn(48, width, device=bench.device).to(dtype)
    meant = (base.double() + b.double().T @ a.double()).norm(dim=1)
    errors.append(_distance(elementwise.row_norms(base, a, b), meant))
    return max(errors)


CHECKS: dict[str, Callable[[Bench, torch.dtype], float]] = {
    "lora, decode": lambda bench, dtype: _check_lora(bench, dtype, 16, 8 if bench.tiny else 61),
    "lora, prompts": lambda bench, dtype: _check_lora(bench, dtype, 64, 12 if bench.tiny else 700),
    "nf4, 1 row": lambda bench, dtype: _check_nf4(bench, dtype, 1),
    "nf4, 37 rows": lambda bench, dtype: _check_nf4(bench, dtype, 3 if bench.tiny else 37),
    "nf4, 100 rows": lambda bench, dtype: _check_nf4(bench, dtype, 100),
    "attention, decode": lambda bench, dtype: _check_attention(bench, dtype, 1),
    "attention, prefill": lambda bench, dtype: _check_attention(bench, dtype, 9 if bench.tiny else 500),
    "norm, silu, rope, DoRA": _check_elementwise,
}


def nf4_products(bench: Bench) -> Report:
    """The four products of an 8B layer by rows: time, share of bandwidth, beside bf16 by torch."""
    shape, rows = (TINY, []) if bench.tiny else (LLAMA_8B, [])
    workspace = nf4.Workspace(bench.device)
    for name, (out, width) in shape.linears.items():
        copies = 1 if bench.tiny else max(4, (256 << 20) // (out * width // 2))
        weights = [random_nf4(out, width, bench.device) for _ in range(copies)]
        full = [torch.randn(out, width, dtype=BF16, device=bench.device) for _ in range(min(copies, 4))]
        for m in (1,) if bench.tiny else (1, 8, 16, 32, 64, 128):
            if bench.left() < 5:
                return {"rows": rows, "cut": f"no time left before {name} at {m} rows"}
            x = torch.randn(m, width, dtype=BF16, device=bench.device)
            ours = bench.seconds([lambda w=w, x=x: nf4.matmul(x, w, workspace) for w in weights])
            theirs = bench.seconds([lambda w=w, x=x: x @ w.T for w in full])
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


def nf4_tilings(bench: Bench) -> Report:
    """Other ways to cut the same products, best first: what `nf4.tiling` should choose."""
    shape = TINY if bench.tiny else LLAMA_8B
    workspace = nf4.Workspace(bench.device, 1 << 24)
    rows = []
    for name, (out, width) in shape.linears.items():
        weights = [random_nf4(out, width, bench.device) for _ in range(1 if bench.tiny else 4)]
        for m in (1,) if bench.tiny else (1, 32):
            x = torch.randn(m, width, dtype=BF16, device=bench.device)
            tried = []
            for cut in _cuts(bench, nf4.tiling(m, out, width), width):
                if bench.left() < 5:
                    break
                taken = bench.seconds([lambda w=w, x=x, c=cut: nf4.matmul(x, w, workspace, cut=c) for w in weights], 3)
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


def nf4_bitsandbytes(bench: Bench) -> Report:
    """The same products by bitsandbytes' own path."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Missing("bitsandbytes is not installed")
    if bench.device == "cpu":
        raise Missing("bitsandbytes' CUDA kernels need a GPU")
    import bitsandbytes

    rows, workspace = [], nf4.Workspace(bench.device)
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
            ours = bench.seconds([lambda w=w, x=x: nf4.matmul(x, w, workspace) for _, _, w in kept])
            theirs = bench.seconds(
                [lambda p=p, s=s, x=x: bitsandbytes.matmul_4bit(x, p.t(), quant_state=s) for p, s, _ in kept]
            )
            rows.append(
                {"product": name, "rows": m, "ours us": ours * 1e6, "theirs us": theirs * 1e6, "times": theirs / ours}
            )
    return {"rows": rows}


def lora(bench: Bench) -> Report:
    """Shrink and expand of q, k, v and of gate, up: distinct adapters of rank 16, bytes against bandwidth."""
    shape = TINY if bench.tiny else LLAMA_8B
    rows = []
    for name, outs in shape.sites.items():
        width = shape.linears[name][1]
        for batch in (2,) if bench.tiny else (1, 8, 32, 64):
            if bench.left() < 5:
                return {"rows": rows, "cut": "no time left"}
            plan = LoraPlan(bench.device, tokens=16, groups=batch, pieces=batch)
            plan.fill([(t, t + 1, 16 * t, 16 * t + 16, 1.0) for t in range(batch)])
            size = 2 * 16 * batch * (len(outs) * width + sum(outs))
            sets = []
            for _ in range(1 if bench.tiny else max(4, min(64, (256 << 20) // size))):
                a = [torch.randn(16 * batch, width, dtype=BF16, device=bench.device) for _ in outs]
                sets.append(LoraSites(a, [torch.randn(16 * batch, n, dtype=BF16, device=bench.device) for n in outs]))
            x = torch.randn(batch, width, dtype=BF16, device=bench.device)
            y = torch.zeros(batch, sum(outs), dtype=BF16, device=bench.device)
            h = scratch(plan, sets[0])
            taken = bench.seconds([lambda s=s, x=x, y=y, p=plan, h=h: lora_add(y, x, s, p, h) for s in sets])
            plan.fill([])
            idle = bench.seconds([lambda s=s, x=x, y=y, p=plan, h=h: lora_add(y, x, s, p, h) for s in sets])
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
    rows = []
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
            [
                lambda k=k, v=v, q=q, t=table, n=lengths, r=room: attention.decode(
                    q, k, v, t, n, r, page_tokens=PAGE, scale=0.1
                )
                for k, v in caches
            ]
        )
        rows.append(
            {"kernel": f"decode {batch} x {length}", "us": taken * 1e6, "share": bench.share_of_bandwidth(size, taken)}
        )
    count, length = (2, 20) if bench.tiny else (8, 2048)
    pages = -(-length // PAGE)
    k, v = _cache(bench, shape, count * pages)
    q = torch.randn(count * length, shape.heads, shape.width, dtype=BF16, device=bench.device)
    plan = attention.PrefillPlan.make(
        [(i * length, (i + 1) * length, length) for i in range(count)],
        [list(range(i * pages, (i + 1) * pages)) for i in range(count)],
        bench.device,
    )
    out = torch.empty_like(q)
    taken = bench.seconds([lambda: attention.prefill(q, k, v, plan, out, page_tokens=PAGE, scale=0.1)])
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


def decode_steps(bench: Bench) -> Report:
    """A whole decode step of the kernels in one captured graph, context 320, against the bytes it must read."""
    if bench.tiny:
        cases = [(TINY, 2, True, adapters) for adapters in (0, 2)]
    else:
        cases = [(LLAMA_8B, rows, True, 0) for rows in (1, 8, 32)]
        cases += [(LLAMA_8B, 32, True, 32), (LLAMA_8B, 64, True, 0), (LLAMA_8B, 64, True, 64)]
        cases += [(LLAMA_8B, 32, False, 0), (LLAMA_8B, 32, False, 32)]
        cases += [(LLAMA_1B, 32, True, 0), (LLAMA_1B, 32, True, 32)]
    rows: list[dict[str, object]] = []
    alone: dict[tuple[str, int, bool], float] = {}
    for shape, batch, packed, adapters in cases:
        if bench.left() < 10:
            return {"rows": rows, "cut": f"no time left before {shape.name} at {batch} rows"}
        step = Step(shape, batch, 40 if bench.tiny else 320, bench.device, packed=packed, adapters=adapters)
        taken = bench.seconds([step.run])
        size = step.weight_bytes() + step.cache_bytes() + (step.adapter_bytes if adapters else 0)
        share = bench.share_of_bandwidth(size, taken)
        before = alone.setdefault((shape.name, batch, packed), taken)
        rows.append(
            {
                "model": f"{shape.name} {'NF4' if packed else 'bf16'}",
                "rows": batch,
                "adapters": adapters,
                "ms": taken * 1e3,
                "GB": size / 1e9,
                "of bandwidth": share,
                "times the floor": 1 / share if share else None,
                "kept share": before / taken if adapters else None,
            }
        )
        del step
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return {"rows": rows}


def swap(bench: Bench) -> Report:
    """One adapter's rows from pinned memory into an 8B arena on a side stream, against the measured copy rate."""
    if bench.device == "cpu" and not bench.tiny:
        raise Missing("needs a GPU")
    shape, rank = (TINY, 16) if bench.tiny else (LLAMA_8B, 16)
    sizes = [(outs, shape.linears[name][1]) for name, outs in shape.sites.items() for _ in range(shape.layers)]
    cells = sum(rank * (len(outs) * width + sum(outs)) for outs, width in sizes)
    host = torch.randn(cells).to(BF16)
    host = host.pin_memory() if bench.device == "cuda" else host
    arena = torch.empty(cells, dtype=BF16, device=bench.device)
    whole = host_copy_seconds(bench, host, arena)
    ceiling = bench.ceilings.get("host_bytes_per_second")
    row = {"adapter MB": cells * 2 / 1e6, "one copy ms": whole * 1e3}
    return {"rows": [row | {"times the floor": whole * ceiling / (cells * 2) if ceiling else None}]}


def engine(bench: Bench) -> Report:
    """What needs the whole engine on the GPU."""
    raise Missing(
        "the engine does not run these kernels yet: mixed 32 against PEFT, base-only against transformers' continuous "
        "batching, 2,000 adapters under zipf, whole prefill, graphs against no graphs, steps delayed by a swap"
    )


SECTIONS = {
    "ceilings": Section(ceilings, 30),
    "correct": Section(correct, 120),
    "steps": Section(decode_steps, 150),
    "nf4": Section(nf4_products, 60),
    "lora": Section(lora, 45),
    "attention": Section(attention_kernels, 45),
    "bitsandbytes": Section(nf4_bitsandbytes, 30),
    "swap": Section(swap, 15),
    "tilings": Section(nf4_tilings, 120),
    "engine": Section(engine, 5),
}
