"""Attention over our KV pages by the GPU's kernels: how a step's rows attend, and the call for one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.gpu import attention, elementwise, prompts
from server.kernels.gpu.attention import DecodeScratch
from server.kernels.gpu.prompts import PrefillPlan


@dataclass(frozen=True)
class GpuAttention:
    """The rows of one step: first one new token each of `decodes` sequences, then stretches of prompts."""

    decodes: int
    pages: Tensor  # [decodes, P] int32; past a sequence's end anything
    lengths: Tensor  # [decodes] int32, the new token included; 0 marks padding
    scratch: DecodeScratch | None  # None without decodes
    prompts: PrefillPlan | None  # None without prompts


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: GpuAttention,
    *,
    page_tokens: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`reference.paged_attention`; q: [T, Hq, D], heads of a token side by side → [T, Hq, D].

    The new tokens' own keys and values are in k and v, [Hkv, slots, D].
    """
    out = None
    if plan.scratch is not None:
        out = attention.decode(
            q[: plan.decodes],
            k,
            v,
            plan.pages,
            plan.lengths,
            plan.scratch,
            page_tokens=page_tokens,
            scale=scale,
            window=window,
            softcap=softcap,
        )
    if plan.prompts is None:
        return q.new_empty(q.shape) if out is None else out
    whole = torch.empty_like(q)
    if out is not None:
        whole[: plan.decodes] = out
    prompts.prefill(q, k, v, plan.prompts, whole, page_tokens=page_tokens, scale=scale, window=window, softcap=softcap)
    return whole


def attend_new(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    write_slots: Tensor,
    k: Tensor,
    v: Tensor,
    plan: GpuAttention,
    *,
    heads: int,
    page_tokens: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """`elementwise.rope_store`, then `attend`; one launch where no row is of a prompt."""
    if plan.scratch is None or plan.prompts is not None:
        q = elementwise.rope_store(qkv, cos, sin, write_slots, k, v, heads)
        return attend(q, k, v, plan, page_tokens=page_tokens, scale=scale, window=window, softcap=None)
    return attention.decode_new(
        qkv,
        cos,
        sin,
        write_slots,
        k,
        v,
        plan.pages,
        plan.lengths,
        plan.scratch,
        heads=heads,
        page_tokens=page_tokens,
        scale=scale,
        window=window,
    )
