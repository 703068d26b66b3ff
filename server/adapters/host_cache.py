"""Parsed adapters in host memory, within a budget of bytes. No lock of its own: `Claims` says who calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

from server.adapters.weights import LoraWeights


class HostCache(Mapping[str, LoraWeights]):
    """Weights by digest, least recently parsed first. It may hold more than `budget` bytes until `evict`."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._weights: OrderedDict[str, LoraWeights] = OrderedDict()

    def __getitem__(self, digest: str) -> LoraWeights:
        return self._weights[digest]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(weights.bytes for weights in self._weights.values())

    def put(self, weights: LoraWeights) -> None:
        """Hold an adapter."""
        self._weights[weights.digest] = weights

    def drop(self, digest: str) -> None:
        """Let go of an adapter; harmless when it is not held."""
        self._weights.pop(digest, None)

    def evict(self, evictable: Callable[[str], bool]) -> None:
        """Get within the budget again as far as `evictable` allows, least recently parsed first."""
        held = self.bytes
        for digest in list(self._weights):
            if held <= self.budget:
                return
            if evictable(digest):
                held -= self._weights.pop(digest).bytes

    def check_integrity(self, evictable: Callable[[str], bool]) -> None:
        """Raise AssertionError when the budget is exceeded by what could go."""
        if self.bytes > self.budget and any(evictable(digest) for digest in self._weights):
            raise AssertionError("host memory is above its budget without need")
