"""What the shared server tells Prometheus; bounded labels: methods, reasons, directions."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class RegistryMetrics:
    """Counts calls, bytes and watches; safe to use from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "loraplex_registry_calls", "Calls answered, by method and reason (OK: no error)", ["method", "reason"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "loraplex_registry_call_seconds", "Time to answer a call", ["method"], buckets=_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self._bytes = Counter(
            "loraplex_registry_bytes", "Bytes of files that came in or went out", ["direction"], registry=self.registry
        )
        self._watches = Gauge("loraplex_registry_watches", "Watches open now", registry=self.registry)

    def done(self, method: str, reason: str, seconds: float) -> None:
        """A call was answered."""
        self._calls.labels(method, reason).inc()
        if method != "Watch":  # as long as the caller likes
            self._seconds.labels(method).observe(seconds)

    def moved(self, direction: str, count: int) -> None:
        """Bytes went "in" or "out"."""
        self._bytes.labels(direction).inc(count)

    def watching(self, change: int) -> None:
        """A watch began (1) or ended (-1)."""
        self._watches.inc(change)
