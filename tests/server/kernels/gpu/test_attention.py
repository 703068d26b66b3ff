"""Paged attention against its plain-torch meaning in float64; every slot that nobody sees holds NaN."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.kernels.gpu import attention, elementwise, prompts
from server.kernels.gpu.attention import DecodeScratch, decode, decode_new
from server.kernels.gpu.prompts import PrefillPlan, prefill

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


class Batch:
    """New tokens of sequences of the given lengths, whose own keys and values are not stored yet; NaN where a row is
    padding, and wherever nothing may be read."""

    def __init__(
        self, lengths: list[int], heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str
    ) -> None:
        self.real = [row for row, length in enumerate(lengths) if length]
        self.cache = Cache([lengths[row] for row in self.real], kv_heads, width, 16, dtype, device)
        rows = len(lengths)
        self.table = torch.full((rows, max(map(len, self.cache.pages))), 1 << 20, dtype=torch.int32, device=device)
        self.table[self.real] = self.cache.table(device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.qkv = torch.full((rows, (heads + 2 * kv_heads) * width), NAN).to(dtype).to(device)
        self.qkv[self.real] = torch.randn(len(self.real), self.qkv.shape[1]).to(dtype).to(device)
        angle = (torch.rand(rows, width // 2) * 6).repeat(1, 2)
        self.cos, self.sin = angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)
        self.write_slots = torch.full((rows,), -1, dtype=torch.int32, device=device)
        for row, own in zip(self.real, self.cache.slots, strict=True):
            self.write_slots[row] = own[-1]
            self.cache.k[:, own[-1]] = self.cache.v[:, own[-1]] = NAN
        self._heads, self._width, self._longest = heads, width, max(lengths)

    def copied(self) -> tuple[Tensor, Tensor]:
        """Keys and values in which a launch may store the new ones; kept to compare with."""
        self.kept = (self.cache.k.clone(), self.cache.v.clone())
        return self.kept

    def scratch(self) -> DecodeScratch:
        made = DecodeScratch(len(self.lengths) + 1, self._heads, self._width, self._longest, self.lengths.device)
        made.sums.fill_(NAN)
        made.states.fill_(NAN)
        return made

    def meant(self, q: Tensor, window: int | None, softcap: float | None) -> Tensor:
        """Of the rows that are no padding, with what `copied` gave out."""
        self.cache.k, given = self.kept[0], self.cache.k
        self.cache.v, other = self.kept[1], self.cache.v
        spans = [(i, i + 1) for i in range(len(self.real))]
        out = self.cache.meant(q[self.real], spans, 0.3, window, softcap)
        self.cache.k, self.cache.v = given, other
        return out

    def check(self, got: Tensor, expected: Tensor, close: Close) -> None:
        """Against `expected`; rows of padding are 0."""
        close(got[self.real], expected)
        padding = sorted(set(range(len(self.lengths))) - set(self.real))
        assert (got[padding] == 0).all()


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of several parts and tiles in less time: the interpreter is slow."""
    monkeypatch.setattr(attention, "STEP", 16)
    monkeypatch.setattr(attention, "MOST", 4)
    monkeypatch.setattr(prompts, "ROWS", 32)
    monkeypatch.setattr(prompts, "STEP", 16)


SHAPES = [  # window, softcap, query heads, key heads, width
    (None, None, 6, 2, 32),
    (37, None, 2, 2, 64),
    (None, 2.0, 8, 1, 16),
    (75, 4.0, 4, 1, 24),
    (None, None, 2, 1, 96),
]
# Of one token, within one tile, to a tile's border and past it, over all parts with several tiles each; and padding.
LENGTHS = [1, 9, 0, 16, 17, 33, 150, 0]


@pytest.mark.parametrize(("window", "softcap", "heads", "kv_heads", "width"), SHAPES)
def test_decode(
    window: int | None,
    softcap: float | None,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    close: Close,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With keys and values stored before and by the launch itself; programs for each part and far fewer."""
    batch = Batch(LENGTHS, heads, kv_heads, width, dtype, device)
    stored = elementwise.rope_store(batch.qkv, batch.cos, batch.sin, batch.write_slots, *batch.copied(), heads)
    expected = batch.meant(stored, window, softcap)
    settings = {"page_tokens": 16, "scale": 0.3, "window": window, "softcap": softcap}
    for programs in (2112, 3 * kv_heads):
        monkeypatch.setattr(attention, "_PROGRAMS", programs)
        k, v = batch.cache.k.clone(), batch.cache.v.clone()
        scratch = batch.scratch()
        got = decode_new(
            batch.qkv,
            batch.cos,
            batch.sin,
            batch.write_slots,
            k,
            v,
            batch.table,
            batch.lengths,
            scratch,
            heads=heads,
            **settings,
        )
        batch.check(got, expected, close)
        assert not scratch.counters.any()
        for own, meant in zip((k, v), batch.kept, strict=True):
            torch.testing.assert_close(own, meant, rtol=0, atol=0, equal_nan=True)
        again = decode(stored, k, v, batch.table, batch.lengths, scratch, **settings)
        batch.check(again, expected, close)
        assert not scratch.counters.any()


def test_company_changes_no_answer(dtype: torch.dtype, device: str) -> None:
    """A sequence alone, and among others in a scratch for longer ones."""
    batch = Batch(LENGTHS, 4, 2, 32, dtype, device)
    k, v = batch.copied()
    q = elementwise.rope_store(batch.qkv, batch.cos, batch.sin, batch.write_slots, k, v, 4)
    together = decode(q, k, v, batch.table, batch.lengths, batch.scratch(), page_tokens=16, scale=0.3)
    for row in (3, 5, 6):
        one = slice(row, row + 1)
        room = DecodeScratch(1, 4, 32, LENGTHS[row], device)
        alone = decode(q[one], k, v, batch.table[one], batch.lengths[one], room, page_tokens=16, scale=0.3)
        assert torch.equal(alone, together[one])


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
    if window:  # what no new token sees any more may hold anything
        for own, length, count in zip(cache.slots, lengths, new, strict=True):
            gone = own[: max(0, length - count - window + 1)]
            cache.k[:, gone] = cache.v[:, gone] = NAN
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
