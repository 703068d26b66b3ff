"""Linear layers whose weight is kept in codes, as adapters see them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class CodedLinear(nn.Linear, ABC):
    """A linear layer whose `weight` is no parameter: reading it unpacks a dense copy."""

    @property
    @abstractmethod
    def codes(self) -> Tensor:
        """What is stored: integers, not of the weight's shape."""

    @abstractmethod
    def unpacked(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of the weight [out, in], what the codes mean."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in], all of it."""
        return self.unpacked(0, self.out_features)
