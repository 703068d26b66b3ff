"""The operations for a CPU: few, large torch calls over what `reference.py` defines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class LoraBlock:
    """One pair of small GEMMs: tokens t0…t1 against arena rows r0…r1.

    `owner` [t1 - t0, r1 - r0] says which row belongs to which token where they are not all everybody's; None
    means that all rows belong to all tokens. `weight` [t1 - t0, r1 - r0] scales; None means 1 everywhere.
    """

    t0: int
    t1: int
    r0: int
    r1: int
    owner: Tensor | None
    weight: Tensor | None


def lora_blocks(
    segments: Sequence[tuple[int, int, int, int, float]],
    stacked_tokens: int,
    dtype: torch.dtype,
) -> list[LoraBlock]:
    """Plan `lora_add` for `segments` (t0, t1, r0, r1, weight) as defined in `reference.lora_add`.

    Segments that lie within the first `stacked_tokens` tokens (the decoding rows, one token each) are stacked:
    all rows of adapters that lie side by side in the arena go through one GEMM, and an owner mask removes what is
    not the token's own. Redundant multiplications are cheaper there than calls. The others keep a pair each.
    """
    stacked = [s for s in segments if s[1] <= stacked_tokens]
    blocks = [
        LoraBlock(t0, t1, r0, r1, None, None if w == 1.0 else torch.full((1, 1), w, dtype=dtype))
        for t0, t1, r0, r1, w in segments
        if t1 > stacked_tokens
    ]
    for r0, r1 in _runs(sorted({(s[2], s[3]) for s in stacked})):
        inside = [s for s in stacked if r0 <= s[2] and s[3] <= r1]
        t0, t1 = min(s[0] for s in inside), max(s[1] for s in inside)
        weight = torch.zeros(t1 - t0, r1 - r0, dtype=torch.float64)
        owner = torch.zeros(t1 - t0, r1 - r0, dtype=torch.bool)
        for s0, s1, q0, q1, w in inside:
            owner[s0 - t0 : s1 - t0, q0 - r0 : q1 - r0] = True
            weight[s0 - t0 : s1 - t0, q0 - r0 : q1 - r0] = w
        plain = bool((weight[owner] == 1.0).all())
        blocks.append(
            LoraBlock(t0, t1, r0, r1, None if bool(owner.all()) else owner, None if plain else weight.to(dtype))
        )
    return blocks


def _runs(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that touch."""
    runs: list[tuple[int, int]] = []
    for r0, r1 in ranges:
        if runs and runs[-1][1] == r0:
            runs[-1] = (runs[-1][0], r1)
        else:
            runs.append((r0, r1))
    return runs


def lora_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, blocks: Sequence[LoraBlock]) -> None:
    """`reference.lora_add` by the plan of `lora_blocks`; y: [T, out] and x: [T, in] are contiguous."""
    for block in blocks:
        h = x[block.t0 : block.t1] @ a[block.r0 : block.r1].T
        if block.weight is not None:
            h = h * block.weight
        if block.owner is not None:
            # Not a product with zeros, and last: an overflow in a neighbour's row or weight must not become NaN here.
            h = torch.where(block.owner, h, 0.0)
        y[block.t0 : block.t1].addmm_(h, b[block.r0 : block.r1])


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    mask: Tensor,
    *,
    page_tokens: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`reference.paged_attention` for sequences with one new token each; returns [B, Hq, D].

    q: [B, Hq, D]; k, v: [Hkv, slots, D]; pages: [B * P] page numbers, every sequence padded to P pages with any
    valid page; mask: [B, 1, P * page_tokens] float32, 0 where seen and -inf where not.
    """
    rows, heads, width = q.shape
    kv_heads = k.shape[0]
    length = mask.shape[-1]
    keys = k.view(kv_heads, -1, page_tokens * width).index_select(1, pages).view(kv_heads * rows, length, width)
    values = v.view(kv_heads, -1, page_tokens * width).index_select(1, pages).view(kv_heads * rows, length, width)
    grouped = q.view(rows, kv_heads, heads // kv_heads, width).transpose(0, 1).reshape(kv_heads * rows, -1, width)
    scores = torch.bmm(grouped, keys.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(kv_heads, rows, -1, length) + mask
    weights = scores.softmax(-1).to(q.dtype).view(kv_heads * rows, -1, length)
    out = torch.bmm(weights, values).view(kv_heads, rows, -1, width).transpose(0, 1)
    return out.reshape(rows, heads, width)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`reference.paged_attention` for one sequence; returns [T, Hq, D].

    q: [T, Hq, D], its last T tokens; k, v: [Hkv, L, D], its L >= T tokens in order.
    """
    tokens, length = q.shape[0], k.shape[1]
    if softcap is not None:
        group = q.shape[1] // k.shape[0]
        scores = (q.transpose(0, 1) @ k.repeat_interleave(group, 0).transpose(1, 2)).float() * scale
        unseen = ~_seen(tokens, length, window, q.device)
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(unseen, float("-inf"))
        return (scores.softmax(-1).to(q.dtype) @ v.repeat_interleave(group, 0)).transpose(0, 1)
    # A whole prompt at once needs no mask, and torch has a faster path for it.
    mask = None if tokens == length and window is None else _seen(tokens, length, window, q.device)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _seen(tokens: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """[tokens, length] bool: which positions each of the last `tokens` tokens looks at."""
    last = torch.arange(length - tokens, length, device=device)[:, None]
    position = torch.arange(length, device=device)[None, :]
    seen = position <= last
    return seen if window is None else seen & (position > last - window)
