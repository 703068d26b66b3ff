"""What the versions that answer tell Prometheus, one by one: how a canary does beside the version it may replace.

The label `version` is what a request's name was resolved to ("team/x@4"), several joined by "+"; the most used have
labels of their own, the others share "other", as with the label `adapter` of `server.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.engine.request import Finish, Request

OUTCOME_OK = "ok"
_BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class Labels(Protocol):
    """The part of `server.metrics.AdapterLabels` used here."""

    def used(self, name: str) -> str:
        """Count one use of `name` and return its label."""

    def label(self, name: str) -> str:
        """The label of `name` now."""


class VersionMetrics:
    """Series by resolved version; requests of the base alone are not counted here. Safe to call from any thread."""

    def __init__(self, registry: CollectorRegistry, labels: Callable[[Callable[[str], None]], Labels]) -> None:
        """`labels` makes the bounded set of labels, given what is told of one that is in use no more."""
        self._labels = labels(self._forget)
        self._running: set[str] = set()  # ids of requests that were counted as a use of their version
        self._requests = Counter(
            "loraplex_version_requests",
            'Requests that ended, by the version that answered and outcome: "ok" or the reason of the error.',
            ["version", "outcome"],
            registry=registry,
        )
        self._tokens = Counter(
            "loraplex_version_tokens", "Tokens generated, by the version that answered.", ["version"], registry=registry
        )
        self._first_token = Histogram(
            "loraplex_version_time_to_first_token_seconds",
            "Seconds from arrival to the first token, by the version that answered.",
            ["version"],
            registry=registry,
            buckets=_BUCKETS,
        )
        self._seconds = Histogram(
            "loraplex_version_request_seconds",
            "Seconds from arrival to the end of a finished answer, by the version that answered.",
            ["version"],
            registry=registry,
            buckets=_BUCKETS,
        )

    def admitted(self, request: Request) -> None:
        """A request had its first step."""
        if request.adapters:
            self._running.add(request.id)
            self._labels.used(_version(request))

    def tokens(self, request: Request, count: int) -> None:
        """`count` tokens of an answer."""
        if request.adapters:
            self._tokens.labels(self._label(request)).inc(count)

    def first_token(self, request: Request, seconds: float) -> None:
        """A request's first token is out."""
        if request.adapters:
            self._first_token.labels(self._label(request)).observe(seconds)
            self.tokens(request, 1)

    def finished(self, request: Request, finish: Finish | None, error: Exception | None) -> None:
        """A request ended."""
        if not request.adapters:
            return
        # One that never ran, because its version cannot be loaded, is a use of it too: a broken canary shows by name.
        label = self._label(request) if request.id in self._running else self._labels.used(_version(request))
        self._running.discard(request.id)
        outcome = OUTCOME_OK if error is None else str(getattr(error, "reason", "INTERNAL"))
        self._requests.labels(label, outcome).inc()
        if finish is not None:
            self._seconds.labels(label).observe(finish.timing.total)

    def _label(self, request: Request) -> str:
        return self._labels.label(_version(request))

    def _forget(self, label: str) -> None:
        for series in (self._tokens, self._first_token, self._seconds, self._requests):
            series.remove_by_labels({"version": label})


def _version(request: Request) -> str:
    return "+".join(sorted(use.version for use in request.adapters))
