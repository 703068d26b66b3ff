"""Paged attention against its plain-torch meaning in float64; every slot that nobody sees holds NaN."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.kernels.gpu import attention
from server.kernels.gpu.attention import DecodeScratch, PrefillPlan, decode, prefill

Close = Callable[[Tensor, Tensor], None]
NAN = float("nan")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Cache:
    """Keys and values of sequences of the given lengths in pages scattered over a pool, NaN elsewhere."""

    def __init__(
        self, lengths: list[int], kv_heads: int, width: int, page: int, dtype: torch.dtype, device: str
    ) -> None:
        counts = [-(-n // page) for n in lengths]
        free = random.sample(range(sum(counts) + 3), sum(counts))
        self.pages = [[free.pop() for _ in range(count)] for count in counts]
        self.slots = [
            torch.tensor([own[i // page] * page + i % page for i in range(n)], dtype=torch.int64)
            for own, n in zip(self.pages, lengths, strict=True)
        ]
        self.k, self.v = (torch.full((kv_heads, (sum(counts) + 3) * page, width), NAN) for _ in range(2))
        for own in self.slots:
            self.k[:, own] = torch.randn(kv_heads, len(own), width)
            self.v[:, own] = torch.randn(kv_heads, len(own), width)
        self.k, self.v = self.k.to(dtype).to(device), self.v.to(dtype).to(device)

    def table(self, device: str) -> Tensor:
        """[sequences, P] int32; entries past a sequence's end name a page far outside the pool."""
        widest = max(map(len, self.pages))
        rows = [[*own, *[1 << 20] * (widest - len(own))] for own in self.pages]
        return torch.tensor(rows, dtype=torch.int32, device=device)

    def meant(
        self, q: Tensor, spans: list[tuple[int, int]], scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """`reference.paged_attention` written once more, in float64, row by row."""
        out = torch.full(q.shape, NAN, dtype=torch.float64)
        group = q.shape[1] // self.k.shape[0]
        for (t0, t1), own in zip(spans, self.slots, strict=True):
            keys = self.k[:, own].double().cpu().repeat_interleave(group, 0)
            values = self.v[:, own].double().cpu().repeat_interleave(group, 0)
            for t in range(t0, t1):
                stop = len(own) - (t1 - t) + 1
                start = max(0, stop - window) if window else 0
                scores = torch.einsum("hd,hld->hl", q[t].double().cpu(), keys[:, start:stop]) * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[t] = torch.einsum("hl,hld->hd", scores.softmax(-1), values[:, start:stop])
        return out


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of several chunks in less time: the interpreter is slow."""
    monkeypatch.setattr(attention, "CHUNK", 64)


@pytest.mark.parametrize(
    ("window", "softcap", "heads", "kv_heads", "width"),
    [(None, None, 6, 2, 24), (37, None, 2, 2, 64), (None, 2.0, 3, 1, 16), (75, 4.0, 4, 2, 24)],
)
def test_decode(
    window: int | None,
    softcap: float | None,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    close: Close,
) -> None:
    """Contexts within one chunk, of exactly one, and over several; a row of padding between them."""
    lengths = [1, random.randrange(2, 60), attention.CHUNK, 2 * attention.CHUNK + random.randrange(1, 40)]
    cache = Cache(lengths, kv_heads, width, 16, dtype, device)
    q = torch.randn(5, heads, width).to(dtype).to(device)
    q[4] = NAN
    table = torch.cat([cache.table(device), torch.full((1, max(map(len, cache.pages))), 1 << 20, device=device)])
    scratch = DecodeScratch(6, heads, width, 3 * attention.CHUNK, device)
    scratch.sums.fill_(NAN)
    scratch.states.fill_(NAN)
    got = decode(
        q,
        cache.k,
        cache.v,
        table.int(),
        torch.tensor([*lengths, 0], dtype=torch.int32, device=device),
        scratch,
        page_tokens=16,
        scale=0.3,
        window=window,
        softcap=softcap,
    )
    expected = cache.meant(q[:4], [(i, i + 1) for i in range(4)], 0.3, window, softcap)
    close(got[:4], expected)
    assert (got[4] == 0).all()


def test_a_context_that_needs_no_split(dtype: torch.dtype, device: str, close: Close) -> None:
    cache = Cache([9, 30], 1, 16, 4, dtype, device)
    wide = torch.randn(2, 5 * 16).to(dtype).to(device)
    q = wide[:, :48].view(2, 3, 16)  # as the first part of a joint q, k, v
    lengths = torch.tensor([9, 30], dtype=torch.int32, device=device)
    scratch = DecodeScratch(2, 3, 16, 64, device)
    got = decode(q, cache.k, cache.v, cache.table(device), lengths, scratch, page_tokens=4, scale=0.25)
    close(got, cache.meant(q, [(0, 1), (1, 2)], 0.25, None, None))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (21, None), (None, 3.0), (70, 2.0)])
def test_prefill(window: int | None, softcap: float | None, dtype: torch.dtype, device: str, close: Close) -> None:
    """A whole prompt, the end of one, and a stretch over several tiles; rows of others stay untouched."""
    lengths, new = [12, 70, 80], [12, 7, 75]
    cache = Cache(lengths, 2, 24, 8, dtype, device)
    starts = [2, 14, 21]
    spans = [(t0, t0 + count) for t0, count in zip(starts, new, strict=True)]
    q = torch.randn(99, 4, 24).to(dtype).to(device)
    out = torch.full_like(q, NAN)
    plan = PrefillPlan.make(
        [(t0, t1, length) for (t0, t1), length in zip(spans, lengths, strict=True)], cache.pages, device
    )
    prefill(q, cache.k, cache.v, plan, out, page_tokens=8, scale=0.3, window=window, softcap=softcap)
    assert torch.isnan(out[:2]).all()
    assert torch.isnan(out[96:]).all()
    close(out[2:96], cache.meant(q, spans, 0.3, window, softcap)[2:96])


def test_no_prompts_is_no_launch(device: str) -> None:
    empty = torch.zeros(0, 1, 16, device=device)
    prefill(empty, empty, empty, PrefillPlan.make([], [], device), empty, page_tokens=8, scale=1.0)


def test_what_does_not_fit_is_refused(device: str) -> None:
    cache = Cache([5], 1, 16, 4, torch.float32, device)
    q, lengths = torch.zeros(1, 2, 16, device=device), torch.tensor([5], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="scratch of"):
        decode(
            q,
            cache.k,
            cache.v,
            cache.table(device),
            lengths,
            DecodeScratch(1, 3, 16, 64, device),
            page_tokens=4,
            scale=1.0,
        )
    with pytest.raises(ValueError, match="6 rows of a sequence of 5"):
        PrefillPlan.make([(0, 6, 5)], cache.pages, device)
