"""What the server tells Prometheus.

`Metrics` implements the engine's observer: its methods run on the engine thread and only add numbers. Gauges are
not kept up to date but read from `engine.snapshot()` when somebody scrapes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.observer import EngineSnapshot
from server.engine.request import Finish, Request
from server.version_metrics import VersionMetrics

BASE_LABEL = "base"
OTHER_LABEL = "other"

_LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STEP_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LOAD_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_COUNT_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class AdapterLabels:
    """Which adapters have a label of their own: the `keep` most used, all others share "other".

    A newcomer takes the place of the least used one once it was used more often, so the series on `/metrics` stay
    bounded whatever callers ask for. Use counts are bounded too: when too many names are known, all counts are
    halved and those at zero forgotten, which also lets old favourites fade.
    """

    def __init__(self, keep: int, forget: Callable[[str], None]) -> None:
        self._keep = keep
        self._forget = forget  # told a label that is in use no more
        self._uses: dict[str, int] = {}
        self._labelled: set[str] = set()
        self._lock = threading.Lock()

    def used(self, name: str) -> str:
        """Count one use of `name` and return its label."""
        if name in (BASE_LABEL, OTHER_LABEL):
            return OTHER_LABEL  # an adapter may be called so; it must not pass for the base
        with self._lock:
            uses = self._uses[name] = self._uses.get(name, 0) + 1
            demoted = self._admit(name, uses)
            if len(self._uses) > 10 * max(self._keep, 1):
                # A label keeps a count of at least 1, or names used a single time would take each other's place.
                halved = {each: n // 2 for each, n in self._uses.items() if n > 1}
                self._uses = dict.fromkeys(self._labelled, 1) | halved
            label = name if name in self._labelled else OTHER_LABEL
        if demoted is not None:
            self._forget(demoted)
        return label

    def label(self, name: str) -> str:
        """The label of `name` now."""
        return name if name in self._labelled else OTHER_LABEL

    def _admit(self, name: str, uses: int) -> str | None:
        """Label `name` if it belongs among the most used; the label that had to give way, if one did."""
        if name in self._labelled or self._keep < 1:
            return None
        if len(self._labelled) < self._keep:
            self._labelled.add(name)
            return None
        least = min(self._labelled, key=lambda each: self._uses.get(each, 0))
        if uses <= self._uses.get(least, 0):
            return None
        self._labelled.remove(least)
        self._labelled.add(name)
        return least


class Metrics:
    """Every series of the server, in a registry of its own. Safe to call from any thread."""

    def __init__(self, *, max_lora: int = 0, labelled_adapters: int = 100) -> None:
        """`max_lora` is how many adapters one step can hold; `labelled_adapters` bounds the label `adapter`."""
        disable_created_metrics()  # a second series beside every count, which nobody reads
        self.registry = CollectorRegistry()
        registry = self.registry
        self._labels = AdapterLabels(labelled_adapters, self._forget_label)

        def latency(name: str, text: str) -> Histogram:
            return Histogram(name, text, ["adapter"], registry=registry, buckets=_LATENCY_BUCKETS)

        self._first_token = latency(
            "loraplex_time_to_first_token_seconds", "Seconds from arrival to the first token of an answer."
        )
        self._inter_token = Histogram(
            "loraplex_inter_token_seconds",
            "Seconds between two tokens of an answer.",
            ["adapter"],
            registry=registry,
            buckets=_STEP_BUCKETS,
        )
        self._request = latency("loraplex_request_seconds", "Seconds from arrival to the end of a finished answer.")
        self._queue = latency("loraplex_queue_seconds", "Seconds from arrival to a request's first step.")
        self._tokens = Counter(
            "loraplex_tokens", "Tokens, by kind: prompt or completion.", ["adapter", "kind"], registry=registry
        )
        self._prefix_hits = Counter(
            "loraplex_prefix_hit_tokens", "Tokens found in the KV cache instead of computed.", registry=registry
        )
        self._preemptions = Counter(
            "loraplex_preemptions",
            "Times a running request gave its place up and went back to the queue.",
            registry=registry,
        )
        self._interludes = Counter(
            "loraplex_interlude_seconds",
            "Seconds in which newcomers' prompts were computed ahead of a crowd's step.",
            registry=registry,
        )
        self._step = Histogram(
            "loraplex_step_seconds", "Seconds of one engine step.", registry=registry, buckets=_STEP_BUCKETS
        )
        self._sequences = Histogram(
            "loraplex_batch_sequences", "Sequences in one step.", registry=registry, buckets=_COUNT_BUCKETS
        )
        self._adapters = Histogram(
            "loraplex_batch_adapters", "Distinct adapters in one step.", registry=registry, buckets=_COUNT_BUCKETS
        )
        self._step_tokens = Histogram(
            "loraplex_batch_tokens", "Tokens in one step.", registry=registry, buckets=_TOKEN_BUCKETS
        )
        self._adapters_max = Gauge(
            "loraplex_batch_adapters_max", "Most distinct adapters in one step since start.", registry=registry
        )
        self._most_adapters = 0
        self._load = Histogram(
            "loraplex_adapter_load_seconds",
            "Seconds to bring an adapter into a tier: host (fetched and parsed) or device (copied into the arena).",
            ["tier"],
            registry=registry,
            buckets=_LOAD_BUCKETS,
        )
        self._routed = Counter(
            "loraplex_routed",
            "Requests whose adapter a router chose, by what it chose: an adapter, or base for none of them.",
            ["router", "adapter"],
            registry=registry,
        )
        self._routed_labels = AdapterLabels(labelled_adapters, self._forget_routed)
        self._errors = Counter("loraplex_errors", "Calls that failed, by reason.", ["reason"], registry=registry)
        self._feedback = Counter(
            "loraplex_feedback", "Marks of answers, by rating: good, bad or none.", ["rating"], registry=registry
        )
        self._versions = VersionMetrics(registry, partial(AdapterLabels, labelled_adapters))
        self._info = Gauge(
            "loraplex_server_info",
            "1; what this server serves.",
            ["base", "quantization", "version"],
            registry=registry,
        )
        self._snapshots = _SnapshotCollector(max_lora)
        registry.register(self._snapshots)

    def attach(self, snapshot: Callable[[], EngineSnapshot], residents: Callable[[], Mapping[str, int]]) -> None:
        """Read the gauges from `snapshot`, and adapters per tier from `residents`, from now on."""
        self._snapshots.source = (snapshot, residents)

    def serving(self, base: str, quantization: str, version: str) -> None:
        """Say what is served."""
        self._info.labels(base, quantization, version).set(1)

    def error(self, reason: str) -> None:
        """Count a failed call."""
        self._errors.labels(reason).inc()

    def feedback(self, rating: str) -> None:
        """Count a mark that was stored."""
        self._feedback.labels(rating).inc()

    def routed(self, router: str, adapter: str | None) -> None:
        """Count what a router chose: an adapter's name without its version, or None for the base."""
        label = BASE_LABEL if adapter is None else self._routed_labels.used(adapter)
        self._routed.labels(router, label).inc()

    # The engine's observer.

    def step(self, *, seconds: float, sequences: int, adapters: int, tokens: int) -> None:
        """One step ran."""
        self._step.observe(seconds)
        self._sequences.observe(sequences)
        self._adapters.observe(adapters)
        self._step_tokens.observe(tokens)
        if adapters > self._most_adapters:
            self._most_adapters = adapters
            self._adapters_max.set(adapters)

    def admitted(self, request: Request, queue_seconds: float) -> None:
        """A request had its first step."""
        name = _name(request)
        label = BASE_LABEL if name is None else self._labels.used(name)
        self._queue.labels(label).observe(queue_seconds)
        self._tokens.labels(label, "prompt").inc(len(request.prompt))
        self._versions.admitted(request)

    def prefix_hit(self, request: Request, tokens: int) -> None:
        """The first `tokens` tokens of a request were found in the KV cache."""
        self._prefix_hits.inc(tokens)

    def preempted(self, request: Request) -> None:
        """A running request went back to the queue."""
        self._preemptions.inc()

    def interlude(self, seconds: float) -> None:
        """Newcomers' prompts were computed ahead of everybody else's step."""
        self._interludes.inc(seconds)

    def first_token(self, request: Request, seconds: float) -> None:
        """A request's first token is out."""
        label = self._label(request)
        self._first_token.labels(label).observe(seconds)
        self._versions.first_token(request, seconds)
        self._tokens.labels(label, "completion").inc()

    def tokens(self, request: Request, count: int, seconds: float) -> None:
        """`count` further tokens of a request, `seconds` after the one before them."""
        label = self._label(request)
        gap = self._inter_token.labels(label)
        for _ in range(count):
            gap.observe(seconds / count)
        self._tokens.labels(label, "completion").inc(count)
        self._versions.tokens(request, count)

    def finished(self, request: Request, finish: Finish | None, error: Exception | None) -> None:
        """A request ended. Failed ones are counted where they are answered, by `error`."""
        self._versions.finished(request, finish, error)
        if finish is not None:
            self._request.labels(self._label(request)).observe(finish.timing.total)

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        """An adapter reached the tier "host" or "device"."""
        self._load.labels(tier).observe(seconds)

    def _label(self, request: Request) -> str:
        name = _name(request)
        return BASE_LABEL if name is None else self._labels.label(name)

    def _forget_label(self, label: str) -> None:
        for histogram in (self._first_token, self._inter_token, self._request, self._queue):
            histogram.remove_by_labels({"adapter": label})
        self._tokens.remove_by_labels({"adapter": label})

    def _forget_routed(self, label: str) -> None:
        self._routed.remove_by_labels({"adapter": label})


def _name(request: Request) -> str | None:
    """What a request runs on, without versions: None for the base, several joined by "+"."""
    return "+".join(sorted(use.name for use in request.adapters)) or None


class _SnapshotCollector(Collector):  # type: ignore[misc]  # prometheus_client is untyped here
    """Gauges read from the engine at scrape time; nothing before the engine is there."""

    def __init__(self, max_lora: int) -> None:
        self._max_lora = max_lora
        self.source: tuple[Callable[[], EngineSnapshot], Callable[[], Mapping[str, int]]] | None = None

    def collect(self) -> Iterable[Metric]:
        if self.source is None:
            return
        snapshot, residents = self.source
        now = snapshot()
        usage = now.kv_pages_used / now.kv_pages_total if now.kv_pages_total else 0.0
        yield GaugeMetricFamily("loraplex_requests_running", "Requests in the running batch.", value=now.running)
        yield GaugeMetricFamily("loraplex_requests_waiting", "Requests waiting for admission.", value=now.waiting)
        yield GaugeMetricFamily("loraplex_kv_cache_usage_ratio", "Share of KV pages in use, 0 to 1.", value=usage)
        resident = GaugeMetricFamily(
            "loraplex_adapters_resident", "Adapters held, by tier: host or device.", labels=["tier"]
        )
        for tier, count in sorted(residents().items()):
            resident.add_metric([tier], count)
        yield resident
        # The names that LoRA-aware routers written for vLLM look for.
        yield GaugeMetricFamily("vllm:num_requests_running", "As loraplex_requests_running.", value=now.running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "As loraplex_requests_waiting.", value=now.waiting)
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "As loraplex_kv_cache_usage_ratio.", value=usage)
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the Unix time of the reading.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        names = [",".join(_without_versions(group)) for group in (now.running_adapters, now.waiting_adapters)]
        lora.add_metric([str(self._max_lora), *names], time.time())
        yield lora


def _without_versions(versions: Iterable[str]) -> list[str]:
    return sorted({version.rpartition("@")[0] or version for version in versions})
