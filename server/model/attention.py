"""Attention over our own KV pages, plugged into transformers' models by name.

transformers calls the function registered here instead of its own attention. What it needs beyond q, k, v arrives
as the keyword `paged`, which `Runner` hands to `model.forward` and the model passes down to every layer. The name
is absent from transformers' mask interface, so no mask is ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from server.errors import UnsupportedArchitecture
from server.kernels import cpu, native
from server.kernels.native.decoder import ListedRows

if TYPE_CHECKING:
    from server.model.gpu_attention import GpuAttention

ATTENTION_NAME = "loraplex_paged"

# What layers pass along that changes nothing here.
_HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "is_causal",
    }
)


@dataclass(frozen=True)
class Span:
    """Prompt tokens of one sequence in a packed batch."""

    t0: int  # first and one past the last row of the batch
    t1: int
    slots: Tensor  # [L] int64: cache slots of the sequence's tokens so far, these included


@dataclass(frozen=True)
class AttentionPlan:
    """How the rows of one packed batch attend; built once a step, used by every layer.

    With native kernels the rows that are worth it are `listed` and the others in spans; `decodes` is 0 then. Without
    them rows 0 … decodes - 1 are sequences with one new token each, and the spans follow.
    """

    write_slots: Tensor  # [T] int64: where each row's key and value go
    decodes: int
    pages: Tensor  # [decodes * P] int64
    lengths: Tensor  # [decodes] int64, new token included
    longest: int  # the largest of lengths, 0 without decodes
    masks: dict[int | None, Tensor]  # by window: [decodes, 1, P * page_tokens] float32, filled when first asked for
    spans: Sequence[Span]
    listed: ListedRows | None = None
    # Deterministic steps only, then there are neither decodes nor spans: each row as a plan of one decode, for it
    # attends by itself. Rows past the last one are padding.
    alone: Sequence[AttentionPlan] = ()
    gpu: GpuAttention | None = None  # on a GPU, where nothing else than this and `write_slots` is filled


class PagedKv:
    """Keys and values of every layer: `k[layer]`, `v[layer]`: [Hkv, pages * page_tokens, D]."""

    def __init__(
        self, layers: int, kv_heads: int, width: int, pages: int, page_tokens: int, dtype: torch.dtype, device: str
    ) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        shape = (kv_heads, pages * page_tokens, width)
        # Zeros, not empty: padding reads any page, and a NaN there would survive the mask.
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.check: Callable[[Sequence[int]], list[bool]] | None = None  # what `finite` asks on a GPU

    @property
    def read_past_ends(self) -> bool:
        """Whether attention reads a page to its end, behind a sequence's last token too: torch's does, which runs on
        CPUs alone."""
        return self.k[0].device.type == "cpu"

    def scrub(self, pages: Sequence[int]) -> None:
        """Zero pages that may hold NaN before somebody else gets them: a weight of zero does not silence a NaN."""
        for cache in (*self.k, *self.v):
            cache.view(cache.shape[0], self.pages, -1)[:, list(pages)] = 0

    def finite(self, pages: Sequence[int]) -> list[bool]:
        """For each page, whether all its keys and values are finite numbers."""
        if self.check is not None:
            return self.check(pages)
        kernels = native.load(self.k[0].dtype) if self.k[0].device.type == "cpu" else None
        if kernels is not None:
            return kernels.finite_pages([*self.k, *self.v], pages, self.page_tokens)
        total = torch.zeros(len(pages), device=self.k[0].device)
        for cache in (*self.k, *self.v):
            rows = cache.view(cache.shape[0], self.pages, -1)[:, list(pages)]
            # Zero times a finite number is zero, times anything else NaN: no sum of large values can overflow.
            total += (rows * 0).sum((0, 2), dtype=torch.float32)
        return torch.isfinite(total).tolist()

    @staticmethod
    def page_bytes(layers: int, kv_heads: int, width: int, page_tokens: int, dtype: torch.dtype) -> int:
        """Bytes one page takes over all layers."""
        return 2 * layers * kv_heads * width * page_tokens * dtype.itemsize


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    paged: tuple[PagedKv, AttentionPlan],
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: q [1, Hq, T, D], k and v [1, Hkv, T, D] after RoPE → ([1, T, Hq, D], None).

    Raises `UnsupportedArchitecture` for arguments whose meaning this function does not know: a wrong answer is
    worse than none.
    """
    unknown = [name for name, given in kwargs.items() if name not in _HARMLESS and given is not None]
    if unknown or attention_mask is not None or dropout:
        raise UnsupportedArchitecture(f"the model's attention asks for what is not served: {unknown or 'a mask'}")
    kv, plan = paged
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    k, v = kv.k[layer], kv.v[layer]
    q = query[0].transpose(0, 1)  # [T, Hq, D]
    if plan.alone:
        return _each_alone(q, k, v, key[0], value[0], plan, kv.page_tokens, scaling, sliding_window, softcap), None
    k.index_copy_(1, plan.write_slots, key[0])
    v.index_copy_(1, plan.write_slots, value[0])
    if plan.gpu is not None:
        from server.model.gpu_attention import attend

        out = attend(
            q.contiguous(),
            k,
            v,
            plan.gpu,
            page_tokens=kv.page_tokens,
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
        )
        return out[None], None
    if plan.listed is not None:
        return _listed(q, k, v, plan, plan.listed, kv.page_tokens, scaling, sliding_window, softcap)[None], None
    parts = []
    if plan.decodes:
        mask = plan.masks.get(sliding_window)
        if mask is None:
            mask = plan.masks[sliding_window] = decode_mask(plan, kv.page_tokens, sliding_window)
        parts.append(
            cpu.decode_attention(
                q[: plan.decodes],
                k,
                v,
                plan.pages,
                mask,
                page_tokens=kv.page_tokens,
                scale=scaling,
                softcap=softcap,
            )
        )
    parts += [prefill(q, k, v, span, scaling, sliding_window, softcap) for span in plan.spans]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[None], None


def _listed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    listed: ListedRows,
    page_tokens: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[T, Hq, D]: listed rows by the native kernel, spans by torch."""
    kernels = native.load(q.dtype)
    if kernels is None:
        raise AssertionError("rows were listed for kernels that are not there")
    out = kernels.attention(
        q.contiguous(),
        k,
        v,
        listed.rows,
        listed.sequences,
        listed.lengths,
        listed.pages,
        page_tokens,
        listed.longest,
        scale,
        window,
        softcap,
    )
    for span in plan.spans:
        out[span.t0 : span.t1] = prefill(q, k, v, span, scale, window, softcap)
    return out


def prefill(
    q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """A span's attention over the cache: q [T, Hq, D] of the whole batch, k, v [Hkv, slots, D] → [t1 - t0, Hq, D]."""
    return cpu.prefill_attention(
        q[span.t0 : span.t1],
        k.index_select(1, span.slots),
        v.index_select(1, span.slots),
        scale=scale,
        window=window,
        softcap=softcap,
    )


def _each_alone(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    page_tokens: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[1, T, Hq, D]: one call a row, whose shapes depend on that row alone; padding comes out as zeros."""
    count = len(plan.alone)
    k.index_copy_(1, plan.write_slots, key[:, :count])
    v.index_copy_(1, plan.write_slots, value[:, :count])
    out = torch.zeros_like(q)
    for row, own in enumerate(plan.alone):
        mask = own.masks.get(window)
        if mask is None:
            mask = own.masks[window] = decode_mask(own, page_tokens, window)
        out[row] = cpu.decode_attention(
            q[row : row + 1], k, v, own.pages, mask, page_tokens=page_tokens, scale=scale, softcap=softcap
        )[0]
    return out[None]


def decode_mask(plan: AttentionPlan, page_tokens: int, window: int | None) -> Tensor:
    """[decodes, 1, P * page_tokens] float32: 0 where the new token looks, -inf elsewhere."""
    columns = plan.pages.shape[0] // plan.decodes * page_tokens
    position = torch.arange(columns, device=plan.lengths.device)[None, :]
    seen = position < plan.lengths[:, None]
    if window is not None:
        seen &= position >= plan.lengths[:, None] - window
    mask = torch.zeros(seen.shape, dtype=torch.float32, device=seen.device)
    return mask.masked_fill_(~seen, float("-inf"))[:, None, :]


def register() -> None:
    """Make the function known to transformers; harmless when repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, paged_attention)
