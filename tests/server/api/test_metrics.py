"""The series, and the bound on the label `adapter`."""

from collections.abc import Sequence

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.request import AdapterUse, Finish, FinishReason, Request, Stopping, Timing, Usage
from server.metrics import AdapterLabels, Metrics

FINISH = Finish(FinishReason.STOP, Usage(3, 4), Timing(0.1, 0.2, 0.8))


def request(*versions: str) -> Request:
    uses = tuple(AdapterUse(f"sha256:{index}", version) for index, version in enumerate(versions))
    return Request("id", (1, 2, 3), Stopping(4), adapters=uses)


def run(metrics: Metrics, served: Request) -> None:
    """What the engine says of a request of 3 prompt and 4 answer tokens."""
    metrics.admitted(served, 0.1)
    metrics.first_token(served, 0.2)
    metrics.tokens(served, 1, 0.1)
    metrics.tokens(served, 2, 0.4)
    metrics.finished(served, FINISH, None)


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """(name, label values…) → value, through Prometheus' own parser."""
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, *(value for key, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_request_is_counted_under_its_adapters_name() -> None:
    metrics = Metrics()
    run(metrics, request("team/a@3"))
    run(metrics, request("team/a@4"))
    run(metrics, request())
    run(metrics, request("team/b@1", "team/a@3"))
    seen = samples(metrics)
    for name, times in {"team/a": 2, "base": 1, "team/a+team/b": 1}.items():
        assert seen[("loraplex_tokens_total", name, "prompt")] == 3 * times
        assert seen[("loraplex_tokens_total", name, "completion")] == 4 * times
        assert seen[("loraplex_time_to_first_token_seconds_sum", name)] == pytest.approx(0.2 * times)
        assert seen[("loraplex_queue_seconds_count", name)] == times
        assert seen[("loraplex_inter_token_seconds_count", name)] == 3 * times
        assert seen[("loraplex_inter_token_seconds_sum", name)] == pytest.approx(0.5 * times)
        assert seen[("loraplex_request_seconds_sum", name)] == pytest.approx(0.8 * times)


def test_failed_requests_have_no_duration() -> None:
    metrics = Metrics()
    metrics.finished(request(), None, RuntimeError())
    metrics.error("QUEUE_FULL")
    seen = samples(metrics)
    assert ("loraplex_request_seconds_count", "base") not in seen
    assert seen[("loraplex_errors_total", "QUEUE_FULL")] == 1


def test_steps_and_loads() -> None:
    metrics = Metrics()
    for sequences, adapters in ((1, 0), (9, 5), (4, 2)):
        metrics.step(seconds=0.01, sequences=sequences, adapters=adapters, tokens=sequences)
    metrics.adapter_loaded("host", 0.2)
    metrics.adapter_loaded("device", 0.01)
    metrics.serving("smollm2-135m", "nf4", "0.1.0")
    seen = samples(metrics)
    assert seen[("loraplex_batch_adapters_max",)] == 5
    assert (seen[("loraplex_batch_sequences_sum",)], seen[("loraplex_batch_adapters_sum",)]) == (14, 7)
    assert seen[("loraplex_step_seconds_count",)] == 3
    assert seen[("loraplex_adapter_load_seconds_sum", "host")] == pytest.approx(0.2)
    assert seen[("loraplex_server_info", "smollm2-135m", "nf4", "0.1.0")] == 1


def labels_of(metrics: Metrics) -> set[str]:
    return {key[1] for key in samples(metrics) if key[0] == "loraplex_tokens_total"}


def test_only_the_most_used_adapters_have_series_of_their_own() -> None:
    metrics = Metrics(labelled_adapters=3)
    for index in range(50):
        run(metrics, request(f"team/x{index}@1"))
    run(metrics, request())
    assert labels_of(metrics) == {"team/x0", "team/x1", "team/x2", "other", "base"}
    for _ in range(3):
        run(metrics, request("team/late@1"))
    assert "team/late" in labels_of(metrics)
    assert len(labels_of(metrics)) == 5


def test_adapters_cannot_pass_for_the_base() -> None:
    metrics = Metrics()
    run(metrics, request("base@1"))
    assert labels_of(metrics) == {"other"}


def test_label_bookkeeping_is_bounded() -> None:
    forgotten: list[str] = []
    labels = AdapterLabels(4, forgotten.append)
    for _ in range(3):
        labels.used("favourite")
    for index in range(10_000):
        labels.used(f"once-{index}")
    assert len(labels._uses) <= 41
    assert len(labels._labelled) == 4
    favourites = _most_used(labels, ["new-1", "new-2"], times=30)
    assert favourites <= labels._labelled


def _most_used(labels: AdapterLabels, names: Sequence[str], times: int) -> set[str]:
    for _ in range(times):
        for name in names:
            labels.used(name)
    return set(names)


def test_every_version_that_answers_has_numbers_of_its_own() -> None:
    """What a canary is judged by."""
    metrics = Metrics()
    run(metrics, request("team/a@3"))
    run(metrics, request("team/a@4"))
    run(metrics, request("team/a@4"))
    failed = request("team/a@4")
    metrics.admitted(failed, 0.1)
    metrics.finished(failed, None, RuntimeError())
    run(metrics, request())
    run(metrics, request("team/b@1", "team/a@3"))
    seen = samples(metrics)
    for version, times in {"team/a@3": 1, "team/a@4": 2, "team/a@3+team/b@1": 1}.items():
        assert seen[("loraplex_version_requests_total", "ok", version)] == times
        assert seen[("loraplex_version_tokens_total", version)] == 4 * times
        assert seen[("loraplex_version_time_to_first_token_seconds_sum", version)] == pytest.approx(0.2 * times)
        assert seen[("loraplex_version_request_seconds_sum", version)] == pytest.approx(0.8 * times)
    assert seen[("loraplex_version_requests_total", "INTERNAL", "team/a@4")] == 1
    assert {name[-1] for name in seen if name[0] == "loraplex_version_tokens_total"} == {
        "team/a@3", "team/a@4", "team/a@3+team/b@1",
    }  # fmt: skip


def test_a_version_that_cannot_be_loaded_shows_by_name() -> None:
    """A broken canary: none of its requests ever runs."""
    metrics = Metrics()
    for _ in range(2):
        metrics.finished(request("team/a@5"), None, RuntimeError())
    assert samples(metrics)[("loraplex_version_requests_total", "INTERNAL", "team/a@5")] == 2


def test_a_request_is_one_use_of_its_version_however_it_ends() -> None:
    metrics = Metrics(labelled_adapters=1)
    run(metrics, request("team/a@1"))
    metrics.finished(request("team/a@2"), None, RuntimeError())  # as often used: no reason to take the label
    run(metrics, request("team/a@1"))
    seen = samples(metrics)
    assert seen[("loraplex_version_requests_total", "ok", "team/a@1")] == 2
    assert seen[("loraplex_version_requests_total", "INTERNAL", "other")] == 1


def test_the_label_version_is_bounded_too() -> None:
    metrics = Metrics(labelled_adapters=2)
    for number in range(1, 6):
        for _ in range(number):
            run(metrics, request(f"team/a@{number}"))
    seen = samples(metrics)
    labels = {name[-1] for name in seen if name[0] == "loraplex_version_tokens_total"}
    assert len(labels) <= 3 and "other" in labels and "team/a@5" in labels
