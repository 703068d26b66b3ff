"""The CPU kernels against their plain-torch meaning, over fresh random inputs."""

import random

import pytest
import torch

from server.kernels import cpu, reference

POPULARITY = ["distinct", "uniform", "zipf", "identical"]


def popularity_choice(kind: str, tokens: int, adapters: int, rng: random.Random) -> list[int]:
    if kind == "distinct":
        return [i % adapters for i in range(tokens)]
    if kind == "uniform":
        return [rng.randrange(adapters) for _ in range(tokens)]
    if kind == "zipf":
        return rng.choices(range(adapters), [1 / (i + 1) ** 1.2 for i in range(adapters)], k=tokens)
    return [rng.randrange(adapters)] * tokens


@pytest.mark.parametrize("kind", POPULARITY)
@pytest.mark.parametrize("weighted", [False, True])
def test_lora_add_equals_its_meaning(kind: str, weighted: bool) -> None:
    rng = random.Random()
    ranks = [rng.choice([4, 8, 12, 16, 64]) for _ in range(12)]
    # Rows as the arena hands them out: whole blocks of 8, here and there a gap.
    starts, at = [], 0
    for rank in ranks:
        at += rng.choice([0, 8])
        starts.append(at)
        at += -(-rank // 8) * 8
    a, b = torch.randn(at, 48, dtype=torch.float64), torch.randn(at, 40, dtype=torch.float64)
    decodes = 24
    segments = []
    for token, adapter in enumerate(sorted(popularity_choice(kind, decodes, len(ranks), rng))):
        if rng.random() < 0.2:
            continue  # a row on the base alone
        weight = rng.uniform(-2, 2) if weighted else 1.0
        rows = (starts[adapter], starts[adapter] + ranks[adapter])
        segments.append((token, token + 1, *rows, weight))
        if weighted:  # a second adapter on the same token
            other = rng.randrange(len(ranks))
            if other != adapter:
                segments.append((token, token + 1, starts[other], starts[other] + ranks[other], 0.5))
    segments.append((decodes, decodes + 17, starts[3], starts[3] + ranks[3], 1.0))
    segments.append((decodes + 17, decodes + 20, starts[5], starts[5] + ranks[5], -0.25))
    x = torch.randn(decodes + 24, 48, dtype=torch.float64)
    expected = torch.randn(decodes + 24, 40, dtype=torch.float64)
    got = expected.clone()
    reference.lora_add(expected, x, a, b, segments)
    cpu.lora_add(got, x, a, b, cpu.lora_blocks(segments, decodes, torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_neighbours_overflow_stays_its_own() -> None:
    """float16 overflows to infinity in one adapter's shrink; the other token must not see NaN."""
    a = torch.ones(16, 32, dtype=torch.float16)
    a[:8] = 60000.0
    b = torch.ones(16, 8, dtype=torch.float16) * 0.01
    x = torch.ones(2, 32, dtype=torch.float16)
    y = torch.zeros(2, 8, dtype=torch.float16)
    cpu.lora_add(y, x, a, b, cpu.lora_blocks([(0, 1, 0, 8, 1.0), (1, 2, 8, 16, 1.0)], 2, torch.float16))
    assert not torch.isfinite(y[0]).any()
    torch.testing.assert_close(y[1], torch.full((8,), 8 * 32 * 0.01, dtype=torch.float16), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_neighbours_weight_that_the_precision_cannot_say_stays_its_own(dtype: torch.dtype) -> None:
    """One factor for all rows, as fixed rows have it; 0 * inf must not reach the token that is not the adapter's."""
    a, b = torch.ones(8, 32, dtype=dtype), torch.ones(8, 8, dtype=dtype)
    y = torch.zeros(2, 8, dtype=dtype)
    owner = torch.tensor([[True], [False]])
    block = cpu.LoraBlock(0, 2, 0, 8, owner, torch.full((1, 1), 3.4e38, dtype=dtype))
    cpu.lora_add(y, torch.ones(2, 32, dtype=dtype), a, b, [block])
    assert not torch.isfinite(y[0]).any()
    assert torch.equal(y[1], torch.zeros(8, dtype=dtype))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (6, 1)])
def test_decode_attention_equals_its_meaning(
    window: int | None, softcap: float | None, heads: int, kv_heads: int
) -> None:
    from server.model.attention import AttentionPlan, decode_mask

    width, page, lengths = 16, 4, [1, 4, 5, 30]
    free = torch.randperm(64).tolist()
    pages = [[free.pop() for _ in range(-(-n // page))] for n in lengths]
    slots = [
        torch.tensor([p[i // page] * page + i % page for i in range(n)]) for p, n in zip(pages, lengths, strict=True)
    ]
    k, v = torch.randn(kv_heads, 64 * page, width), torch.randn(kv_heads, 64 * page, width)
    q = torch.randn(len(lengths), heads, width)
    expected = reference.paged_attention(
        q, k, v, slots, [(i, i + 1) for i in range(len(lengths))], scale=0.3, window=window, softcap=softcap
    )
    widest = max(map(len, pages))
    padded = torch.tensor([p + [p[0]] * (widest - len(p)) for p in pages]).view(-1)
    plan = AttentionPlan(torch.empty(0), len(lengths), padded, torch.tensor(lengths), max(lengths), {}, ())
    got = cpu.decode_attention(
        q, k, v, padded, decode_mask(plan, page, window), page_tokens=page, scale=0.3, softcap=softcap
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("tokens", "length"), [(12, 12), (6, 20), (1, 9)])
def test_prefill_attention_equals_its_meaning(
    window: int | None, softcap: float | None, tokens: int, length: int
) -> None:
    k, v = torch.randn(3, length, 16), torch.randn(3, length, 16)
    q = torch.randn(tokens, 9, 16)
    expected = reference.paged_attention(
        q, k, v, [torch.arange(length)], [(0, tokens)], scale=0.25, window=window, softcap=softcap
    )
    got = cpu.prefill_attention(q, k, v, scale=0.25, window=window, softcap=softcap)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
