"""Pages that hold NaN or infinity anywhere, in any layer or head, are found; large numbers are no such thing."""

from __future__ import annotations

import math
import random

import pytest
import torch

pytest.importorskip("triton")

from server.kernels.gpu.pages import PageCheck

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_sick_pages_are_found(dtype: torch.dtype, device: str) -> None:
    rng = random.Random()
    heads, pages, page_tokens, width = 3, 9, 16, 80  # more elements a page than one tile
    caches = [torch.full((heads, pages * page_tokens, width), 3e38).to(dtype).to(device) for _ in range(6)]
    sick = set(rng.sample(range(pages), 3))
    for page in sick:
        cache = rng.choice(caches)
        token = page * page_tokens + rng.randrange(page_tokens)
        cache[rng.randrange(heads), token, rng.randrange(width)] = rng.choice([math.nan, math.inf, -math.inf])
    check = PageCheck(caches, page_tokens)
    asked = rng.sample(range(pages), pages)
    assert check(asked) == [page not in sick for page in asked]
    assert check([]) == []
