"""Sampling: distributions against their definitions, penalties by hand, seeds."""

import math
from collections import Counter

import pytest
import torch

from server.engine.request import Sampling
from server.engine.sampler import SamplerState, adjust, distribution, sample


def state(sampling: Sampling, prompt: tuple[int, ...] = (), *, logprobs: int | None = None) -> SamplerState:
    return SamplerState.begin(sampling, logprobs, prompt, frozenset(), 0)


def test_greedy_takes_the_best_and_reports_its_logprob() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    [choice] = sample(logits, [state(Sampling(), logprobs=2)])
    assert choice.token_id == 1
    assert choice.logprobs is not None
    total = math.log(math.exp(0) + math.exp(3) + math.exp(1))
    assert choice.logprobs.logprob == pytest.approx(3 - total, abs=1e-6)
    assert [token for token, _ in choice.logprobs.top] == [1, 2]


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 4,000 seeds against softmax(logits / T): df 5, 0.1 % critical value 20.5."""
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, 2.0])
    expected = (logits / 0.8).softmax(-1)
    n = 4000
    counts = Counter(
        choice.token_id
        for seed in range(n)
        for choice in sample(logits[None].clone(), [state(Sampling(temperature=0.8, seed=seed))])
    )
    chi2 = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(expected.tolist()))
    assert chi2 < 20.5


def drawn(seed: int, tokens: int = 8) -> list[int | None]:
    """The first tokens of one answer, each of 1,000 as likely as the next."""
    own = state(Sampling(temperature=1.0, seed=seed))
    return [sample(torch.zeros(1, 1000), [own])[0].token_id for _ in range(tokens)]


def test_all_64_bits_of_a_seed_count() -> None:
    seed = 0x0123456789ABCDEF
    answers = [tuple(drawn(seed ^ 1 << bit)) for bit in range(64)]
    assert len({tuple(drawn(seed)), *answers}) == 65
    assert drawn(seed) == drawn(seed)
    assert drawn(2**64 - 1) != drawn(2**63 - 1)


@pytest.mark.parametrize("step", [1, 2**32, 0x9E3779B97F4A7C15], ids=["by-one", "high-bits", "candidates"])
def test_neighbouring_seeds_draw_independently(step: int) -> None:
    """First and second tokens over 4,000 seeds a step apart fall evenly into 4 by 4, and so do first tokens of
    neighbours: chi-square, df 15, 0.01 % critical value 44.3."""
    n = 4000
    first_two = [drawn(i * step % 2**64, 2) for i in range(n)]
    quarter = [[(token or 0) // 250 for token in tokens] for tokens in first_two]
    within = Counter((a, b) for a, b in quarter)
    across = Counter((quarter[i][0], quarter[i + 1][0]) for i in range(n - 1))
    for counts in (within, across):
        total = counts.total()
        cells = [counts[a, b] for a in range(4) for b in range(4)]
        assert sum((cell - total / 16) ** 2 / (total / 16) for cell in cells) < 44.3


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    probabilities, ids = distribution(logits, Sampling(temperature=1.0, top_p=0.75))
    assert ids.tolist() == [0, 1]
    assert probabilities.tolist() == pytest.approx([0.625, 0.375])


def test_top_k_and_min_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert distribution(logits, Sampling(temperature=1.0, top_k=3))[1].tolist() == [0, 1, 2]
    assert distribution(logits, Sampling(temperature=1.0, min_p=0.5))[1].tolist() == [0, 1]


def test_the_tiniest_temperature_is_greedy_not_nan() -> None:
    [choice] = sample(torch.tensor([[1.0, 1.1, 0.0]]), [state(Sampling(temperature=1e-300, seed=3))])
    assert choice.token_id == 1


def test_the_same_seed_draws_the_same_whoever_shares_the_batch() -> None:
    logits = torch.randn(1, 50)
    sampling = Sampling(temperature=1.0, seed=42)
    alone = [sample(logits.clone(), [s])[0].token_id for s in [state(sampling)] for _ in range(1)]
    own = state(sampling)
    crowd = sample(
        torch.cat([torch.randn(3, 50), logits]), [*(state(Sampling(temperature=1.0, seed=i)) for i in range(3)), own]
    )
    assert crowd[3].token_id == alone[0]


def test_penalties_by_hand() -> None:
    s = state(Sampling(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25), (0,))
    s.produced += [1, 1]
    logits = torch.tensor([4.0, -1.0, 3.0])
    adjust(logits, s)
    # 0: 4/2; 1: -1*2 - 0.5 - 2*0.25; 2: untouched
    assert logits.tolist() == pytest.approx([2.0, -3.0, 3.0])


def test_bias_and_min_new_tokens() -> None:
    s = SamplerState.begin(Sampling(logit_bias=((2, 10.0),)), None, (), frozenset({1}), 2)
    assert sample(torch.tensor([[0.0, 50.0, 1.0]]), [s])[0].token_id == 2  # 1 may not come yet
    assert sample(torch.tensor([[0.0, 50.0, 1.0]]), [s])[0].token_id == 2
    assert sample(torch.tensor([[0.0, 50.0, 1.0]]), [s])[0].token_id == 1


def test_a_row_of_nan_ends_alone() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [1.0, 0.0]])
    choices = sample(logits, [state(Sampling()), state(Sampling()), state(Sampling())])
    assert [choice.token_id for choice in choices] == [1, None, 0]
