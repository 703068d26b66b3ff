"""Every GPU kernel against float64 on fresh random inputs, outputs poisoned, at an 8B model's sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_bench import Bench, Report
from benchmarks.gpu_model import PAGE, dense, random_nf4
from server.kernels import reference
from server.kernels.gpu import attention, elementwise, nf4, prompts
from server.kernels.gpu.lora import LoraSites, lora_add, scratch
from server.kernels.gpu.lora_plan import DECODE_TOKENS, LoraPlan

BF16 = torch.bfloat16


def correct(bench: Bench) -> Report:
    """Every kernel against float64 on fresh random inputs, outputs poisoned; raises, naming all, where any is off."""
    rows, wrong = [], []
    for dtype, limit in ((BF16, 1e-2), (torch.float32, 1e-4)):
        for name, check in CHECKS.items():
            try:
                error = check(bench, dtype)
            except Exception as failed:  # one that does not compile hides no other
                wrong.append(f"{name} in {dtype}: {type(failed).__name__}: {failed}")
                continue
            rows.append({"kernel": name, "dtype": str(dtype).removeprefix("torch."), "error": error, "limit": limit})
            if not error <= limit:  # NaN too
                wrong.append(f"{name} in {dtype} is off by {error}, more than {limit}")
    if wrong:
        raise AssertionError("; ".join(wrong))
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
        plan = prompts.PrefillPlan.make(stretches, pages, bench.device)
        prompts.prefill(q, k, v, plan, out, page_tokens=PAGE, scale=scale, window=window, softcap=softcap)
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
    "lora, decode": lambda bench, dtype: _check_lora(bench, dtype, DECODE_TOKENS, 8 if bench.tiny else 61),
    "lora, prompts": lambda bench, dtype: _check_lora(bench, dtype, 64, 12 if bench.tiny else 700),
    "nf4, 1 row": lambda bench, dtype: _check_nf4(bench, dtype, 1),
    "nf4, 37 rows": lambda bench, dtype: _check_nf4(bench, dtype, 3 if bench.tiny else 37),
    "nf4, 100 rows": lambda bench, dtype: _check_nf4(bench, dtype, 100),
    "attention, decode": lambda bench, dtype: _check_attention(bench, dtype, 1),
    "attention, prefill": lambda bench, dtype: _check_attention(bench, dtype, 9 if bench.tiny else 500),
    "norm, silu, rope, DoRA": _check_elementwise,
}
