"""Triton's interpreter stands in for a GPU where there is none (see the root conftest); with one, the same tests run
on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def distance(got: torch.Tensor, meant: torch.Tensor) -> float:
    """|got - meant| / |meant| in float64; NaN never passes a comparison with a limit."""
    got, meant = got.double().cpu(), meant.double().cpu()
    return float((got - meant).norm() / meant.norm().clamp_min(1e-30))


@pytest.fixture
def close(dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """close(got, meant): asserts that they agree as far as the dtype allows."""

    def check(got: torch.Tensor, meant: torch.Tensor) -> None:
        assert got.shape == meant.shape
        assert distance(got, meant) <= LIMITS[dtype]

    return check
