"""What every operation means, in plain torch, one loop a definition. Slow; the tests compare all else with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lora_add(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    segments: Sequence[tuple[int, int, int, int, float]],
) -> None:
    """Add low-rank deltas to `y` in place: for each segment (t0, t1, r0, r1, w)

        y[t0:t1] += w * (x[t0:t1] @ a[r0:r1]^T) @ b[r0:r1]

    x: [T, in], y: [T, out], a: [rows, in], b: [rows, out] (the adapter's own scaling is already inside b).
    Segments may overlap in tokens: several adapters on one token add up.
    """
    for t0, t1, r0, r1, w in segments:
        y[t0:t1] += w * ((x[t0:t1] @ a[r0:r1].T) @ b[r0:r1])


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Sequence[Tensor],
    spans: Sequence[tuple[int, int]],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of several sequences over cached keys and values; returns [T, Hq, D].

    q: [T, Hq, D], the new tokens of all sequences one after another; sequence i owns rows spans[i] = (t0, t1).
    k, v: [Hkv, slots, D]; slots[i]: [L_i] the cache slots of sequence i's tokens 0 … L_i - 1, new ones included.
    Token j of sequence i attends to positions p with L_i - (t1 - t0) + j - window < p <= L_i - (t1 - t0) + j;
    scores are softcap * tanh(q.k * scale / softcap) where softcap is given. Softmax runs in float32.
    """
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[0]
    for (t0, t1), own in zip(spans, slots, strict=True):
        keys = k[:, own].repeat_interleave(group, 0).float()  # [Hq, L, D]
        values = v[:, own].repeat_interleave(group, 0).float()
        scores = torch.einsum("thd,hld->htl", q[t0:t1].float(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        length = own.shape[0]
        last = torch.arange(length - (t1 - t0), length, device=q.device)[:, None]
        position = torch.arange(length, device=q.device)[None, :]
        seen = position <= last
        if window is not None:
            seen &= position > last - window
        scores = scores.masked_fill(~seen, float("-inf"))
        out[t0:t1] = torch.einsum("htl,hld->thd", scores.softmax(-1), values).to(q.dtype)
    return out
