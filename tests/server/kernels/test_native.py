"""The compiled kernels against their plain-torch meaning, over fresh random inputs."""

import random

import pytest
import torch

from server.kernels import native, reference
from server.kernels.native import Native
from server.kernels.native.build import build
from server.kernels.native.plans import DecodePlan, PrefillPlan, Sites

# One rounding at the end against torch's rounding after every operation.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def kernels(request: pytest.FixtureRequest) -> tuple[Native, torch.dtype]:
    loaded = native.load(request.param)
    if loaded is None:
        pytest.skip("no C compiler on this machine")
    return loaded, request.param


def test_rms_norm(kernels: tuple[Native, torch.dtype]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    k, dtype = kernels
    norm = LlamaRMSNorm(576, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(17, 576) * 3).to(dtype)
    torch.testing.assert_close(k.rms_norm(x, norm.weight.data.float(), 1e-5), norm(x).detach(), **TOLERANCE[dtype])


def test_silu_mul(kernels: tuple[Native, torch.dtype]) -> None:
    k, dtype = kernels
    gate_up = (torch.randn(9, 2 * 200) * 4).to(dtype)
    gate_up[0, :4] = torch.tensor([100.0, -100.0, 0.0, 30.0])
    expected = torch.nn.functional.silu(gate_up[:, :200]) * gate_up[:, 200:]
    torch.testing.assert_close(k.silu_mul(gate_up), expected, **TOLERANCE[dtype])


def test_nan_stays_nan(kernels: tuple[Native, torch.dtype]) -> None:
    k, dtype = kernels
    gate_up = torch.ones(2, 8, dtype=dtype)
    gate_up[1, 0] = float("nan")
    y = k.silu_mul(gate_up)
    assert torch.isnan(y[1, 0])
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(k.rms_norm(gate_up, torch.ones(8), 1e-5)[1]).all()


def test_rope_store(kernels: tuple[Native, torch.dtype]) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    k, dtype = kernels
    rows, heads, kv_heads, width, slots = 11, 9, 3, 64, 40
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * width).to(dtype)
    angle = torch.rand(rows, width // 2).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    write = torch.randperm(slots)[:rows]
    cache_k, cache_v = (
        torch.zeros(kv_heads, slots, width, dtype=dtype),
        torch.zeros(kv_heads, slots, width, dtype=dtype),
    )
    q = k.rope_store(qkv, cos, sin, write, cache_k, cache_v, heads)
    parts = qkv.view(1, rows, -1, width).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
    want_q, want_k = apply_rotary_pos_emb(parts[0], parts[1], cos[None], sin[None])
    torch.testing.assert_close(q, want_q[0].transpose(0, 1), **TOLERANCE[dtype])
    torch.testing.assert_close(cache_k[:, write], want_k[0], **TOLERANCE[dtype])
    assert torch.equal(cache_v[:, write], parts[2][0])
    untouched = [i for i in range(slots) if i not in write.tolist()]
    assert not cache_k[:, untouched].any()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (12, 2, 40), (2, 2, 16)])
def test_attention(
    kernels: tuple[Native, torch.dtype],
    window: int | None,
    softcap: float | None,
    heads: int,
    kv_heads: int,
    width: int,
) -> None:
    """Single tokens and whole prompts, of several sequences, in any order; rows that are not listed stay zero."""
    k, dtype = kernels
    page, spans = 4, [(0, 1), (1, 2), (2, 9), (9, 10), (10, 40)]
    lengths = [1, 4, 9, 30, 30]
    free = torch.randperm(64).tolist()
    own = [[free.pop() for _ in range(-(-n // page))] for n in lengths]
    slots = [
        torch.tensor([pages[i // page] * page + i % page for i in range(n)])
        for pages, n in zip(own, lengths, strict=True)
    ]
    keys, values = (torch.randn(kv_heads, 64 * page, width).to(dtype) for _ in range(2))
    q = torch.randn(41, heads, width).to(dtype)
    expected = reference.paged_attention(
        q[:40], keys, values, slots, spans, scale=0.125, window=window, softcap=softcap
    )
    listed = [
        (t, sequence, length - (t1 - t0) + t - t0 + 1)
        for sequence, ((t0, t1), length) in enumerate(zip(spans, lengths, strict=True))
        for t in range(t0, t1)
    ]
    random.shuffle(listed)
    rows, sequences, looks = (torch.tensor(column) for column in zip(*listed, strict=True))
    widest = max(map(len, own))
    pages = torch.tensor([p + [p[0]] * (widest - len(p)) for p in own])
    got = k.attention(q, keys, values, rows, sequences, looks, pages, page, 30, 0.125, window, softcap)
    torch.testing.assert_close(got[:40], expected, **TOLERANCE[dtype])
    assert not got[40].any()
    # A sequence alone gives the same bits, and a NaN in another one's pages does not show.
    keys[:, slots[0]] = float("nan")
    one = k.attention(q, keys, values, rows, sequences, looks, pages, page, 30, 0.125, window, softcap)
    assert torch.equal(one[1:40], got[1:40])
    assert torch.isnan(one[0]).all()


@pytest.mark.parametrize("kind", ["distinct", "uniform", "zipf", "identical"])
@pytest.mark.parametrize("weighted", [False, True])
def test_lora_decode(kernels: tuple[Native, torch.dtype], kind: str, weighted: bool) -> None:
    k, dtype = kernels
    rng = random.Random()
    ranks = [rng.choice([4, 8, 12, 16, 64]) for _ in range(12)]
    starts = [sum(-(-r // 8) * 8 for r in ranks[:i]) for i in range(12)]
    rows = starts[-1] + 64
    outs = (200, 64, 130)
    a = [(torch.randn(rows, 96) * 0.1).to(dtype) for _ in outs]
    b = [(torch.randn(rows, out) * 0.1).to(dtype) for out in outs]
    tokens = 20
    weights = {"distinct": None, "uniform": [1.0] * 12, "zipf": [1 / (i + 1) ** 1.2 for i in range(12)]}
    chosen = {
        "distinct": [i % 12 for i in range(tokens)],
        "identical": [rng.randrange(12)] * tokens,
    }.get(kind) or rng.choices(range(12), weights[kind], k=tokens)
    segments = []
    for token, adapter in enumerate(chosen):
        if rng.random() < 0.2:
            continue
        weight = rng.uniform(-2, 2) if weighted else 1.0
        segments.append((token, token + 1, starts[adapter], starts[adapter] + ranks[adapter], weight))
        if weighted:
            segments.append((token, token + 1, starts[3], starts[3] + ranks[3], 0.5))
    x = torch.randn(tokens, 96).to(dtype)
    together = torch.randn(tokens, sum(outs)).to(dtype)
    expected = [part.double().clone() for part in together.split(outs, 1)]
    for site, y in enumerate(expected):
        reference.lora_add(y, x.double(), a[site].double(), b[site].double(), segments)
    if segments:
        k.lora(x, Sites(a, b), together, DecodePlan(segments), None)
    for got, want in zip(together.split(outs, 1), expected, strict=True):
        torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("weighted", [False, True])
def test_lora_prefill(kernels: tuple[Native, torch.dtype], weighted: bool) -> None:
    k, dtype = kernels
    rng = random.Random()
    ranks, starts = [4, 8, 13, 64], [0, 8, 16, 32]
    outs = (200, 64, 33)
    a = [(torch.randn(96, 100) * 0.1).to(dtype) for _ in outs]
    b = [(torch.randn(96, out) * 0.1).to(dtype) for out in outs]
    segments, at = [], 3
    for _ in range(6):
        adapter, length = rng.randrange(4), rng.choice([2, 5, 16, 17, 40])
        rows = (starts[adapter], starts[adapter] + ranks[adapter])
        segments.append((at, at + length, *rows, rng.uniform(-2, 2) if weighted else 1.0))
        if weighted:
            segments.append((at, at + length, 0, 4, -0.5))
        at += length + rng.randrange(3)
    x = torch.randn(at + 2, 100).to(dtype)
    together = torch.randn(at + 2, sum(outs)).to(dtype)
    expected = [part.double().clone() for part in together.split(outs, 1)]
    for site, y in enumerate(expected):
        reference.lora_add(y, x.double(), a[site].double(), b[site].double(), segments)
    k.lora(x, Sites(a, b), together, None, PrefillPlan(segments))
    for got, want in zip(together.split(outs, 1), expected, strict=True):
        torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


def test_prompt_and_decode_agree_bit_for_bit(kernels: tuple[Native, torch.dtype]) -> None:
    k, dtype = kernels
    a, b = torch.randn(16, 100).to(dtype), torch.randn(16, 70).to(dtype)
    x, y = torch.randn(19, 100).to(dtype), torch.randn(19, 70).to(dtype)
    whole, single = y.clone(), y.clone()
    k.lora(x, Sites([a], [b]), whole, None, PrefillPlan([(0, 19, 2, 13, 0.5)]))
    k.lora(x, Sites([a], [b]), single, DecodePlan([(0, 19, 2, 13, 0.5)]), None)
    assert torch.equal(whole, single)


def test_a_row_does_not_depend_on_its_company(kernels: tuple[Native, torch.dtype]) -> None:
    """Bit for bit, whatever the number of rows."""
    k, dtype = kernels
    a, b = torch.randn(32, 96).to(dtype), torch.randn(32, 200).to(dtype)
    x, y = torch.randn(16, 96).to(dtype), torch.randn(16, 200).to(dtype)
    sites = Sites([a], [b])
    segments = [(t, t + 1, 8 * (t % 4), 8 * (t % 4) + 8, 1.0) for t in range(16)]
    crowd = y.clone()
    k.lora(x, sites, crowd, DecodePlan(segments), None)
    for t in (0, 7, 15):
        alone = y[t : t + 1].clone()
        k.lora(x[t : t + 1], sites, alone, DecodePlan([(0, 1, *segments[t][2:])]), None)
        assert torch.equal(alone[0], crowd[t])


def test_finite_pages(kernels: tuple[Native, torch.dtype]) -> None:
    k, dtype = kernels
    caches = [torch.randn(3, 40, 8).to(dtype) for _ in range(4)]
    for page, value in ((2, "nan"), (7, "inf"), (9, "-inf")):
        place = page * 4 + random.randrange(4)
        random.choice(caches)[random.randrange(3), place, random.randrange(8)] = float(value)
    pages = random.sample(range(10), 10)
    assert k.finite_pages(caches, pages, 4) == [page not in (2, 7, 9) for page in pages]
    assert k.finite_pages(caches, [], 4) == []


def test_a_machine_without_a_compiler_is_told_what_that_costs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level("WARNING"):
        assert build("native.c", [], []) is None
    assert "no C compiler (no-such-compiler)" in caplog.text
