"""The small operations between a layer's matrix products, each one pass over memory, computed in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gpu.launch import (
    early_start,
    launch_dependents,
    multiply,
    power_of_two,
    precision,
    wait_for_writes,
)

_SILU_COLUMNS = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float, add: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; x: [..., width], contiguous.

    With `add` (of x's shape), add += x first, rounded to its dtype as the residual stream is, and add is normed: one
    pass for what a decoder layer does between its two halves.
    """
    width = x.shape[-1]
    if not x.is_contiguous() or (add is not None and (add.shape != x.shape or not add.is_contiguous())):
        raise ValueError("rows to norm are contiguous and of one shape")
    y = torch.empty_like(x)
    _rms_norm[(x.numel() // width,)](
        x,
        add if add is not None else x,
        weight,
        y,
        eps,
        WIDTH=width,
        PADDED=power_of_two(width),
        ADD=add is not None,
        num_warps=8 if width > 2048 else 4,
        **early_start(x.device),
    )
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up; gate_up: [rows, 2 * width], gate first, contiguous → [rows, width]."""
    rows, both = gate_up.shape
    if not gate_up.is_contiguous() or both % 2:
        raise ValueError("gate and up lie side by side in contiguous rows")
    y = torch.empty(rows, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    grid = (rows, -(-both // 2 // _SILU_COLUMNS))
    early = early_start(gate_up.device)
    _silu_mul[grid](gate_up, y, WIDTH=both // 2, COLUMNS=_SILU_COLUMNS, num_warps=4, **early)
    return y


def rope_store(qkv: Tensor, cos: Tensor, sin: Tensor, write_slots: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Rotate queries and keys, store keys and values at `write_slots`; returns q [rows, heads, width].

    qkv: [rows, (heads + 2 kv_heads) * width], queries first, then keys, then values; cos, sin: [rows, width], both
    halves alike; k, v: [kv_heads, slots, width]; write_slots: [rows] int32 or int64, -1 for a row of padding, which
    is stored nowhere.
    """
    kv_heads, slots, width = k.shape
    rows = qkv.shape[0]
    if qkv.shape[1] != (heads + 2 * kv_heads) * width or qkv.stride(1) != 1 or width % 2:
        raise ValueError(f"{tuple(qkv.shape)} does not hold {heads} query and {kv_heads} key heads of {width}")
    if not (k.is_contiguous() and v.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("keys, values, cos and sin are contiguous")
    q = torch.empty(rows, heads, width, dtype=qkv.dtype, device=qkv.device)
    _rope_store[(rows, heads + 2 * kv_heads)](
        qkv,
        cos,
        sin,
        write_slots,
        q,
        k,
        v,
        qkv.stride(0),
        slots,
        HEADS=heads,
        KV_HEADS=kv_heads,
        WIDTH=width,
        HALF=power_of_two(width // 2),
        num_warps=1,
    )
    return q


def row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """DoRA's norms sqrt(sum over k of (weight[n, k] + sum over r of b[r, n] a[r, k])²): [out] float32.

    weight: [out, in] dense; a: [rank, in], b: [rank, out] as an adapter's arena rows. Once per adapter and layer, when
    it is loaded: no step needs it again.
    """
    out, width = weight.shape
    if not (weight.is_contiguous() and a.is_contiguous() and b.is_contiguous()):
        raise ValueError("the weight and the adapter's rows are contiguous")
    if a.shape != (b.shape[0], width) or b.shape[1] != out:
        raise ValueError(f"rows {tuple(a.shape)} and {tuple(b.shape)} for a weight {tuple(weight.shape)}")
    norms = torch.empty(out, dtype=torch.float32, device=weight.device)
    _row_norms[(-(-out // 32),)](
        weight,
        a,
        b,
        norms,
        RANK=a.shape[0],
        RANKS=power_of_two(max(1, a.shape[0])),
        OUT=out,
        WIDTH=width,
        COLUMNS=32,
        STEP=64,
        PRECISION=precision(weight),
        num_warps=4,
    )
    return norms


@triton.jit
def _rms_norm(
    x, add, weight, y, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr, DEPENDENT: tl.constexpr
):
    launch_dependents(DEPENDENT)
    row = tl.program_id(0).to(tl.int64) * WIDTH
    k = tl.arange(0, PADDED)
    inside = k < WIDTH
    gain = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    wait_for_writes(DEPENDENT)
    values = tl.load(x + row + k, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total = values + tl.load(add + row + k, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(add.dtype.element_ty)
        tl.store(add + row + k, rounded, mask=inside)
        values = rounded.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    tl.store(y + row + k, (values * factor * gain).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(gate_up, y, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr):
    launch_dependents(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wait_for_writes(DEPENDENT)
    gate = tl.load(gate_up + row * (2 * WIDTH) + k, mask=k < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + k, mask=k < WIDTH, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row * WIDTH + k, product.to(y.dtype.element_ty), mask=k < WIDTH)


@triton.jit
def turned(x, partner, cos, sin, low):
    """Numbers of a head rotated with those half a head away, rounded as they were; low: of the first half."""
    across = partner.to(tl.float32) * sin
    return (x.to(tl.float32) * cos + tl.where(low, -across, across)).to(x.dtype)


@triton.jit
def _rope_store(
    qkv,
    cos,
    sin,
    write_slots,
    q,
    k,
    v,
    stride,
    slots,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
):
    """One head of one row: a query goes to q, a key or value to its slot."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(write_slots + row).to(tl.int64)
    d = tl.arange(0, HALF)
    inside = d < WIDTH // 2
    given = qkv + row * stride + head * WIDTH + d
    low, high = tl.load(given, mask=inside, other=0.0), tl.load(given + WIDTH // 2, mask=inside, other=0.0)
    if head < HEADS + KV_HEADS:
        angle = row * WIDTH + d
        cos_low = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        sin_low = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        cos_high = tl.load(cos + angle + WIDTH // 2, mask=inside, other=0.0).to(tl.float32)
        sin_high = tl.load(sin + angle + WIDTH // 2, mask=inside, other=0.0).to(tl.float32)
        low, high = turned(low, high, cos_low, sin_low, True), turned(high, low, cos_high, sin_high, False)
    if head < HEADS:
        out = q + (row * HEADS + head) * WIDTH + d
        tl.store(out, low, mask=inside)
        tl.store(out + WIDTH // 2, high, mask=inside)
    else:
        if head < HEADS + KV_HEADS:
            out = k + ((head - HEADS).to(tl.int64) * slots + slot) * WIDTH + d
            tl.store(out, low, mask=inside & (slot >= 0))
            tl.store(out + WIDTH // 2, high, mask=inside & (slot >= 0))
        else:
            out = v + ((head - HEADS - KV_HEADS).to(tl.int64) * slots + slot) * WIDTH + d
            tl.store(out, low, mask=inside & (slot >= 0))
            tl.store(out + WIDTH // 2, high, mask=inside & (slot >= 0))


@triton.jit
def _row_norms(
    weight,
    a,
    b,
    norms,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """COLUMNS rows of the weight, all of their inputs."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANKS)
    n_seen, r_seen = n < OUT, r < RANK
    b_tile = tl.load(b + r[None, :] * OUT + n[:, None], mask=r_seen[None, :] & n_seen[:, None], other=0.0)
    squares = tl.zeros([COLUMNS], dtype=tl.float32)
    for at in range(0, WIDTH, STEP):
        k = at + tl.arange(0, STEP)
        k_seen = (k < WIDTH)[None, :]
        a_tile = tl.load(a + r[:, None] * WIDTH + k[None, :], mask=r_seen[:, None] & k_seen, other=0.0)
        row = n.to(tl.int64)[:, None] * WIDTH
        value = tl.load(weight + row + k[None, :], mask=n_seen[:, None] & k_seen, other=0.0).to(tl.float32)
        value = multiply(b_tile, a_tile, value, PRECISION)
        squares += tl.sum(value * value, 1)
    tl.store(norms + n, tl.sqrt(squares), mask=n_seen)
