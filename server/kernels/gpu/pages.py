"""Which KV pages hold finite numbers only: asked before a page is kept for others, at every answer's end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEP = 1024


class PageCheck:
    """Looks at pages of many caches in one launch. caches: [kv_heads, slots, width] each, alike and contiguous."""

    def __init__(self, caches: Sequence[Tensor], page_tokens: int) -> None:
        if len({(t.shape, t.dtype, t.device) for t in caches}) != 1 or not all(t.is_contiguous() for t in caches):
            raise ValueError("the caches of all layers are alike and contiguous")
        self._alive = tuple(caches)
        first = caches[0]
        self._shape = first.shape
        self._dtype = first.dtype
        self._page = page_tokens * first.shape[2]  # elements of one head's page
        self._table = torch.tensor([t.data_ptr() for t in caches], dtype=torch.int64, device=first.device)
        self._device = first.device

    def __call__(self, pages: Sequence[int]) -> list[bool]:
        """For each page, whether it holds neither NaN nor infinity. Waits for the device."""
        if not pages:
            return []
        host = torch.tensor(list(pages), dtype=torch.int32)
        numbers = host.to(self._device)
        caches, heads = self._table.shape[0], self._shape[0]
        found = torch.empty(len(pages), caches, dtype=torch.int32, device=self._device)
        _finite[(len(pages), caches)](
            self._table,
            numbers,
            found,
            self._alive[0],  # for its type alone
            self._shape[1] * self._shape[2],
            CACHES=caches,
            HEADS=heads,
            PAGE=self._page,
            STEP=_STEP,
            num_warps=4,
        )
        return [not bad for bad in found.any(1).tolist()]


@triton.jit
def _finite(
    table,
    pages,
    found,
    like,
    head_stride,
    CACHES: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    STEP: tl.constexpr,
):
    """found[page, cache] = whether anything in it is no finite number."""
    place, cache = tl.program_id(0), tl.program_id(1)
    page = tl.load(pages + place).to(tl.int64)
    base = tl.multiple_of(tl.load(table + cache).to(tl.pointer_type(like.dtype.element_ty)), 16)
    k = tl.arange(0, STEP)
    bad = tl.zeros([STEP], dtype=tl.int32)
    for head in range(HEADS):
        for at in range(0, PAGE, STEP):
            inside = at + k < PAGE
            value = tl.load(base + head * head_stride + page * PAGE + at + k, mask=inside, other=0.0).to(tl.float32)
            # Zero times a finite number is zero, times anything else NaN.
            bad = bad | (value * 0.0 != 0.0).to(tl.int32)
    tl.store(found + place * CACHES + cache, tl.max(bad, 0))
