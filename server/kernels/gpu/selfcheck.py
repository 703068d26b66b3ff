"""Are the kernels right on this card? Each against plain torch on fresh random inputs, outputs poisoned.

Asked when an engine starts on a GPU, at small sizes: a driver, a compiler or a card that we have not met must refuse to
serve, not answer wrongly. The GPU benchmark asks the same at a large model's sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels import reference
from server.kernels.gpu import attention, elementwise, nf4, prompts
from server.kernels.gpu.lora import LoraSites, lora_add, scratch
from server.kernels.gpu.lora_plan import DECODE_TOKENS, LoraPlan
from server.kernels.gpu.nf4_levels import LEVELS

PAGE = 16  # tokens
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}  # of the norm of what is meant


@dataclass(frozen=True)
class Sizes:
    """Of the inputs that kernels are checked with."""

    width: int  # of rows
    outs: tuple[int, int]  # widths of two linears of one input
    weight: tuple[int, int]  # (out, in) of an NF4 weight
    lengths: tuple[int, int]  # of sequences, beside one of new tokens alone
    heads: tuple[int, int, int]  # (query heads, key heads, width)
    rows: tuple[int, int, int]  # tokens in a decode step, in a step with prompts, of one prompt


TINY = Sizes(96, (64, 40), (80, 128), (70, 90), (4, 2, 32), (8, 12, 9))
SMALL = Sizes(256, (256, 128), (96, 512), (70, 300), (8, 2, 64), (17, 100, 70))
LARGE = Sizes(4096, (4096, 1024), (4096, 4096), (3000, 4500), (32, 8, 128), (61, 700, 500))


@dataclass(frozen=True)
class Finding:
    """What a check found. error: ‖got − meant‖ / ‖meant‖, None where the kernel failed."""

    kernel: str
    error: float | None
    limit: float
    failure: str = ""

    @property
    def right(self) -> bool:
        """NaN is not."""
        return self.error is not None and self.error <= self.limit

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.kernel} failed: {self.failure}"
        return f"{self.kernel} is off by {self.error:.2g} where {self.limit:.2g} is allowed"


def findings(device: str, dtype: torch.dtype, sizes: Sizes) -> list[Finding]:
    """All checks, whatever any of them finds."""
    found = []
    for name, check in CHECKS.items():
        try:
            error: float | None = check(device, dtype, sizes)
            failure = ""
        except Exception as failed:  # one that does not compile hides no other
            error, failure = None, f"{type(failed).__name__}: {failed}"
        found.append(Finding(name, error, LIMITS[dtype], failure))
    return found


def random_weight(out: int, width: int, device: str) -> nf4.Nf4Weight:
    """Random codes, and scales under which the weight is about as large as a trained one."""
    codes = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8, device=device)
    scales = (torch.rand(out, width // 64, device=device) + 0.5) * width**-0.5
    return nf4.Nf4Weight(codes, scales.half(), torch.tensor(LEVELS, device=device))


def dense(weight: nf4.Nf4Weight) -> Tensor:
    """What it means, in float64, by plain torch."""
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], -1).flatten(1).long()
    return weight.levels.double()[codes] * weight.scales.double().repeat_interleave(64, 1)


def _distance(got: Tensor, meant: Tensor) -> float:
    return float((got.double() - meant).norm() / meant.norm())


def _check_lora(device: str, dtype: torch.dtype, sizes: Sizes, tokens: int, rows: int) -> float:
    width, outs = sizes.width, sizes.outs
    ranks = (16, 5, 33)
    a = [torch.randn(64, width, device=device).to(dtype) * width**-0.5 for _ in outs]
    b = [torch.randn(64, out, device=device).to(dtype) for out in outs]
    starts = (0, 16, 24)
    segments: list[tuple[int, int, int, int, float]] = []
    each = max(1, rows // 4)
    for adapter, (start, rank) in enumerate(zip(starts, ranks, strict=True)):
        segments.append((adapter * each, (adapter + 1) * each, start, start + rank, 1.0))
    segments.append((0, each, 24, 57, -0.5))
    x = torch.randn(rows, width, device=device).to(dtype)
    y = torch.randn(rows, sum(outs), device=device).to(dtype)
    y[3 * each :] = float("nan")
    expected, at = y.double(), 0
    for one_a, one_b in zip(a, b, strict=True):
        part = expected[:, at : at + one_b.shape[1]]
        reference.lora_add(part, x.double(), one_a.double(), one_b.double(), segments)
        at += one_b.shape[1]
    plan = LoraPlan(device, tokens=tokens, groups=rows, pieces=8 * rows)
    plan.fill(segments)
    sites = LoraSites(a, b)
    lora_add(y, x, sites, plan, scratch(plan, sites).fill_(float("nan")))
    if not bool(torch.isnan(y[3 * each :]).all()):
        return float("nan")
    return _distance(y[: 3 * each], expected[: 3 * each])


def _check_nf4(device: str, dtype: torch.dtype, sizes: Sizes, rows: int) -> float:
    out, width = sizes.weight
    weight = random_weight(out, width, device)
    if dtype == torch.float32:
        weight = nf4.Nf4Weight(weight.codes, weight.scales.float(), weight.levels)
    x = torch.randn(rows, width, device=device).to(dtype)
    return _distance(nf4.matmul(x, weight, nf4.Workspace(device)), x.double() @ dense(weight).T)


def _check_attention(device: str, dtype: torch.dtype, sizes: Sizes, tokens: int) -> float:
    """`tokens` new ones of each of three sequences, window and soft-cap on."""
    lengths = [tokens, *sizes.lengths]
    heads, kv_heads, width = sizes.heads
    counts = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(counts)).tolist()
    pages = [[order.pop() for _ in range(count)] for count in counts]
    slots = [
        torch.tensor([own[i // PAGE] * PAGE + i % PAGE for i in range(n)], device=device)
        for own, n in zip(pages, lengths, strict=True)
    ]
    k, v = (torch.full((kv_heads, sum(counts) * PAGE, width), float("nan"), device=device) for _ in range(2))
    for own in slots:
        k[:, own], v[:, own] = (torch.randn(kv_heads, len(own), width, device=device) for _ in range(2))
    k, v = k.to(dtype), v.to(dtype)
    q = torch.randn(3 * tokens, heads, width, device=device).to(dtype)
    spans = [(i * tokens, (i + 1) * tokens) for i in range(3)]
    window, softcap, scale = lengths[1] // 2, 20.0, width**-0.5
    # The reference's softmax runs in float32, hence its float32 inputs: exact enough for both limits.
    meant = reference.paged_attention(
        q.float(), k.float(), v.float(), slots, spans, scale=scale, window=window, softcap=softcap
    )
    out = torch.full_like(q, float("nan"))
    if tokens == 1:
        table, known, room = _decoding(pages, lengths, heads, width, device)
        out = attention.decode(
            q, k, v, table, known, room, page_tokens=PAGE, scale=scale, window=window, softcap=softcap
        )
    else:
        stretches = [(t0, t1, length) for (t0, t1), length in zip(spans, lengths, strict=True)]
        plan = prompts.PrefillPlan.make(stretches, pages, device)
        prompts.prefill(q, k, v, plan, out, page_tokens=PAGE, scale=scale, window=window, softcap=softcap)
    return _distance(out, meant.double())


def _decoding(
    pages: list[list[int]], lengths: list[int], heads: int, width: int, device: str
) -> tuple[Tensor, Tensor, attention.DecodeScratch]:
    """The table of pages, the lengths, and scratch memory whose sums are poisoned."""
    widest = max(map(len, pages))
    table = torch.tensor([[*own, *[0] * (widest - len(own))] for own in pages], dtype=torch.int32, device=device)
    room = attention.DecodeScratch(len(pages), heads, width, max(lengths), device)
    room.sums.fill_(float("nan"))
    return table, torch.tensor(lengths, dtype=torch.int32, device=device), room


def _check_new_tokens(device: str, dtype: torch.dtype, sizes: Sizes) -> float:
    """Rotation, storing and attention in one launch, beside the same one after the other in plain torch."""
    heads, kv_heads, width = sizes.heads
    lengths = [1, *sizes.lengths]
    pages = [list(range(i, 3 * (-(-n // PAGE)), 3)) for i, n in enumerate(lengths)]
    slots = [
        torch.tensor([own[i // PAGE] * PAGE + i % PAGE for i in range(n)], device=device)
        for own, n in zip(pages, lengths, strict=True)
    ]
    count = PAGE * (max(map(max, pages)) + 1)
    k, v = (torch.full((kv_heads, count, width), float("nan"), device=device, dtype=dtype) for _ in range(2))
    for own in slots:
        k[:, own[:-1]], v[:, own[:-1]] = (
            torch.randn(kv_heads, len(own) - 1, width, device=device).to(dtype) for _ in range(2)
        )
    qkv = torch.randn(3, (heads + 2 * kv_heads) * width, device=device).to(dtype)
    angle = torch.rand(3, width // 2, device=device).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    parts = qkv.float().view(3, -1, width)
    low, high = parts.chunk(2, -1)
    turned = (parts * cos.float()[:, None] + torch.cat([-high, low], -1) * sin.float()[:, None]).to(dtype).float()
    known_k, known_v = k.float(), v.float()
    for row, own in enumerate(slots):
        known_k[:, own[-1]] = turned[row, heads : heads + kv_heads]
        known_v[:, own[-1]] = parts[row, heads + kv_heads :]
    spans = [(i, i + 1) for i in range(3)]
    meant = reference.paged_attention(
        turned[:, :heads], known_k, known_v, slots, spans, scale=width**-0.5, window=None, softcap=None
    )
    table, known, room = _decoding(pages, lengths, heads, width, device)
    write = torch.stack([own[-1] for own in slots])
    out = attention.decode_new(
        qkv, cos, sin, write, k, v, table, known, room, heads=heads, page_tokens=PAGE, scale=width**-0.5
    )
    stored = [_distance(k[:, write], known_k[:, write].double()), _distance(v[:, write], known_v[:, write].double())]
    return max(_distance(out, meant.double()), *stored)


def _check_elementwise(device: str, dtype: torch.dtype, sizes: Sizes) -> float:
    """The largest error of the small kernels."""
    width = sizes.width
    x, weight = (torch.randn(*s, device=device).to(dtype) for s in ((5, width), (width,)))
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    errors = [_distance(elementwise.rms_norm(x, weight, 1e-5), normed)]
    gate, up = wide.chunk(2, -1)
    errors.append(_distance(elementwise.silu_mul(x), torch.nn.functional.silu(gate) * up))
    heads, kv_heads, head = 4, 2, width // 8
    angle = torch.rand(5, head // 2, device=device).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    k, v = (torch.full((kv_heads, 8, head), float("nan"), dtype=dtype, device=device) for _ in range(2))
    slots = torch.tensor([3, 1, 0, 7, 5], device=device)
    q = elementwise.rope_store(x, cos, sin, slots, k, v, heads)
    parts = wide.view(5, -1, head)
    low, high = parts.chunk(2, -1)
    turned = parts * cos.double()[:, None] + torch.cat([-high, low], -1) * sin.double()[:, None]
    errors.append(_distance(q, turned[:, :heads]))
    errors.append(_distance(k[:, slots].transpose(0, 1), turned[:, heads : heads + kv_heads]))
    errors.append(_distance(v[:, slots].transpose(0, 1), parts[:, heads + kv_heads :]))
    a, b = (torch.randn(8, n, device=device).to(dtype) for n in (width, 48))
    base = torch.randn(48, width, device=device).to(dtype)
    meant = (base.double() + b.double().T @ a.double()).norm(dim=1)
    errors.append(_distance(elementwise.row_norms(base, a, b), meant))
    return max(errors)


Check = Callable[[str, torch.dtype, Sizes], float]
CHECKS: dict[str, Check] = {
    "lora, decode": lambda device, dtype, sizes: _check_lora(device, dtype, sizes, DECODE_TOKENS, sizes.rows[0]),
    "lora, prompts": lambda device, dtype, sizes: _check_lora(device, dtype, sizes, 64, sizes.rows[1]),
    "nf4, 1 row": lambda device, dtype, sizes: _check_nf4(device, dtype, sizes, 1),
    "nf4, 11 rows": lambda device, dtype, sizes: _check_nf4(device, dtype, sizes, 11),
    "nf4, 37 rows": lambda device, dtype, sizes: _check_nf4(device, dtype, sizes, 37),
    "nf4, 100 rows": lambda device, dtype, sizes: _check_nf4(device, dtype, sizes, 100),
    "attention, decode": lambda device, dtype, sizes: _check_attention(device, dtype, sizes, 1),
    "attention, new tokens": _check_new_tokens,
    "attention, prefill": lambda device, dtype, sizes: _check_attention(device, dtype, sizes, sizes.rows[2]),
    "norm, silu, rope, DoRA": _check_elementwise,
}
