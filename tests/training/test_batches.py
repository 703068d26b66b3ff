from __future__ import annotations

import random

import torch

from training.batches import LengthGroupedOrder


def test_every_epoch_visits_every_example_once_in_its_own_order() -> None:
    lengths = [random.Random(1).randrange(1, 200) for _ in range(333)]
    order = LengthGroupedOrder(lengths, 8, seed=3)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    assert sorted(first) == sorted(second) == list(range(333))
    assert first != second
    order.set_epoch(0)
    torch.rand(7)  # whatever else uses the global generator has no say
    assert list(order) == first
    assert list(LengthGroupedOrder(lengths, 8, seed=4)) != first


def test_batches_hold_about_equal_lengths() -> None:
    generator = random.Random(0)
    lengths = [int(generator.lognormvariate(4, 0.6)) + 1 for _ in range(1000)]
    order = list(LengthGroupedOrder(lengths, 8, seed=0))
    batches = [[lengths[i] for i in order[at : at + 8]] for at in range(0, 1000, 8)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert padded / sum(lengths) < 1.1
    shuffled = generator.sample(lengths, 1000)
    unsorted = sum(max(shuffled[at : at + 8]) * 8 for at in range(0, 1000, 8))
    assert unsorted / sum(lengths) > 1.4  # what it would be without


def test_an_incomplete_batch_comes_last() -> None:
    lengths = [1] * 10 + [100] * 3
    order = list(LengthGroupedOrder(lengths, 4, seed=0))
    assert len(order) == 13
    for at in range(0, 12, 4):
        assert len({lengths[i] for i in order[at : at + 4]}) <= 2
