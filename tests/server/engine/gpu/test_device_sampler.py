"""Sampling on the device chooses what `sampler.sample` chooses, row for row, draw for draw."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from server.engine.device_sampler import DeviceSampler
from server.engine.request import Sampling
from server.engine.sampler import Choice, SamplerState, sample
from server.errors import NonFiniteLogits, StructureFailed

VOCABULARY = 300


class Allowing:
    """A structure that allows a random half, or nothing."""

    def __init__(self, seed: int, *, nothing: bool = False) -> None:
        mask = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(seed)) < 0.5
        self.mask = None if nothing else mask
        self.failed = "it cannot be followed further" if nothing else None
        self.taken: list[int] = []

    def allowed(self) -> Tensor | None:
        return self.mask

    def restrict(self, logits: Tensor) -> str | None:
        if self.mask is None:
            return self.failed
        logits.masked_fill_(~self.mask, -math.inf)
        return None if bool(torch.isfinite(logits.max())) else "forbidden by min_new_tokens"

    def accept(self, token: int) -> None:
        self.taken.append(token)


def states(rng: random.Random, rows: int) -> Callable[[], list[SamplerState]]:
    """Makes the same random states again and again."""
    made = []
    for row in range(rows):
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.0, 0.3, 1.0, 1e-6, 40.0]),
            top_p=rng.choice([1.0, 0.9, 0.3, 1e-9]),
            top_k=rng.choice([0, 1, 5, 1000]),
            min_p=rng.choice([0.0, 0.05, 0.9]),
            seed=rng.randrange(2**63),
            repetition_penalty=rng.choice([1.0, 1.3, 0.7]),
            presence_penalty=rng.choice([0.0, 0.5, -2.0]),
            frequency_penalty=rng.choice([0.0, 0.25]),
            logit_bias=rng.choice([(), ((3, 5.0), (7, -100.0)), ((11, float("-inf")),)]),
        )
        prompt = [rng.randrange(VOCABULARY) for _ in range(9)]
        produced = [rng.randrange(VOCABULARY) for _ in range(rng.choice([0, 4]))]
        made.append((sampling, rng.choice([None, 0, 3]), prompt, produced, rng.choice([0, 0, 9]), row))
    kinds = [rng.choice(["none", "none", "half", "nothing"]) for _ in range(rows)]

    def build() -> list[SamplerState]:
        built = []
        for (sampling, logprobs, prompt, produced, least, row), kind in zip(made, kinds, strict=True):
            state = SamplerState.begin(sampling, logprobs, prompt, frozenset({1, 2}), least)
            state.produced.extend(produced)
            if kind != "none":
                state.structure = Allowing(row, nothing=kind == "nothing")  # type: ignore[assignment]
            built.append(state)
        return built

    return build


def assert_alike(got: list[Choice], meant: list[Choice]) -> None:
    assert [choice.token_id for choice in got] == [choice.token_id for choice in meant]
    assert [type(choice.error) for choice in got] == [type(choice.error) for choice in meant]
    for ours, theirs in zip(got, meant, strict=True):
        assert (ours.logprobs is None) is (theirs.logprobs is None)
        if ours.logprobs is not None and theirs.logprobs is not None:
            assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-5)
            assert [token for token, _ in ours.logprobs.top] == [token for token, _ in theirs.logprobs.top]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_rows(device: str) -> None:
    rng = random.Random()
    sampler = DeviceSampler(device)
    for _ in range(12):
        rows = rng.choice([1, 3, 20])
        build = states(rng, rows)
        logits = torch.randn(rows, VOCABULARY) * rng.choice([0.5, 4.0])
        ours, theirs = build(), build()
        for _ in range(3):  # the draws of an answer follow one another
            with torch.inference_mode():
                assert_alike(sampler(logits.clone().to(device), ours), sample(logits.clone(), theirs))
        assert [state.produced for state in ours] == [state.produced for state in theirs]


def test_sick_rows_end_alone() -> None:
    logits = torch.randn(4, VOCABULARY)
    logits[1, 7] = math.nan
    logits[2, 9] = math.inf
    rows = [SamplerState.begin(Sampling(temperature=1.0), 2, [1], frozenset(), 0) for _ in range(4)]
    with torch.inference_mode():
        choices = DeviceSampler("cpu")(logits.clone(), rows)
    assert [isinstance(choice.error, NonFiniteLogits) for choice in choices] == [False, True, True, False]
    assert [choice.token_id is None for choice in choices] == [False, True, True, False]


def test_a_structure_that_min_new_tokens_leaves_nothing_to() -> None:
    state = SamplerState.begin(Sampling(), None, [1], frozenset({5}), 3)
    only = Allowing(0)
    only.mask = torch.zeros(VOCABULARY, dtype=torch.bool)
    only.mask[5] = True
    state.structure = only  # type: ignore[assignment]
    with torch.inference_mode():
        (choice,) = DeviceSampler("cpu")(torch.randn(1, VOCABULARY), [state])
    assert isinstance(choice.error, StructureFailed)
    assert "min_new_tokens" in str(choice.error)


def test_no_rows_and_the_call_before_the_wait() -> None:
    called: list[list[int]] = []
    sampler = DeviceSampler("cpu", meanwhile=lambda tokens: called.append(tokens.tolist()))
    with torch.inference_mode():
        assert sampler(torch.zeros(0, VOCABULARY), []) == []
        assert called == [[]]
        chosen = sampler(torch.randn(5, VOCABULARY), states(random.Random(), 5)())
    tokens = [choice.token_id for choice in chosen]
    assert [one for one, token in zip(called[1], tokens, strict=True) if token is not None] == [
        token for token in tokens if token is not None
    ]
