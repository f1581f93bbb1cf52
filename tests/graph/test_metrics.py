import re
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from graph.exporter import Exposition, MetricsServer, serve_metrics
from graph.ledger import REASONS
from graph.metrics import LATENCY_BUCKETS_S, MAX_CAMERAS, STAGE_BUCKETS_S, TABLE, Declaration, Metrics

WINDOW_BUDGET_S = 1.0


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


@pytest.fixture
def server(registry: CollectorRegistry) -> Iterator[MetricsServer]:
    server = serve_metrics(registry)
    yield server
    server.stop()


def exported(registry: CollectorRegistry) -> dict[tuple[str, frozenset[str]], float]:
    """Series by name and label values."""
    families = Exposition(registry).collect()
    return {(s.name, frozenset(s.labels.values())): s.value for family in families for s in family.samples}


def value(registry: CollectorRegistry, name: str, *labels: str) -> float:
    return exported(registry)[(name, frozenset(labels))]


def bind_everything(metrics: Metrics) -> None:
    metrics.stage("llm")
    metrics.edge("mic -> llm.audio")
    metrics.bus(["magic"])
    metrics.camera("door", ["timeout"])
    metrics.windows("door", ["mic"], ["llm"])
    metrics.playback("door")
    metrics.turns("door")
    metrics.llm()
    metrics.tokens(["text", "codes"])
    coordinator = metrics.coordinator(["llm"], ["crash"])
    coordinator.sessions("open", 1)
    coordinator.replicas("llm", "ready", 1)
    metrics.build_info("0.1.0", "nano", trained=True)


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_a_name_says_prefix_and_unit(metric: Declaration) -> None:
    assert re.fullmatch(r"omni(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert metric.name.endswith(("_seconds", "_units")) or metric.kind != "histogram"


def test_no_label_can_take_the_value_of_a_session_or_belongs_to_the_scraper() -> None:
    labels = {label for metric in TABLE for label in metric.labels}
    assert not labels & {"session", "url", "text", "replica", "stage_process", "instance", "job"}


def test_an_edge_of_a_bucket_lies_at_the_window_budget() -> None:
    assert WINDOW_BUDGET_S in LATENCY_BUCKETS_S
    assert WINDOW_BUDGET_S in STAGE_BUCKETS_S


def test_every_metric_is_exported_at_zero_as_soon_as_it_is_bound(registry: CollectorRegistry, metrics: Metrics) -> None:
    bind_everything(metrics)
    names = {name for name, _ in exported(registry)}
    by_gateway = {"omni_scrape_failures_total"}
    for metric in TABLE:
        sample = f"{metric.name}_count" if metric.kind == "histogram" else metric.name
        assert sample in names or metric.name in by_gateway
    assert all(value(registry, "omni_edge_drops_total", "mic -> llm.audio", reason) == 0 for reason in REASONS)


def test_a_process_exports_nothing_that_it_has_not_bound(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.stage("tts")
    families = {family.name for family in Exposition(registry).collect()}
    assert families == {
        "omni_stage_seconds",
        "omni_stage_batch_units",
        "omni_stage_carried",
        "omni_stage_cpu_seconds",
        "omni_stage_failures",
        "omni_stage_unsaid",
        "omni_units",
    }


def test_created_series_are_left_out(registry: CollectorRegistry, metrics: Metrics) -> None:
    bind_everything(metrics)
    assert not [name for name, _ in exported(registry) if name.endswith("_created")]


def test_an_edge_counts_like_its_ledger(registry: CollectorRegistry, metrics: Metrics) -> None:
    edge = metrics.edge("a -> b")
    edge.accepted(5)
    edge.delivered(age_s=0.25)
    edge.dropped("stale", 2)
    edge.in_flight(2)
    assert value(registry, "omni_edge_accepted_total", "a -> b") == 5
    assert value(registry, "omni_edge_delivered_total", "a -> b") == 1
    assert value(registry, "omni_edge_drops_total", "a -> b", "stale") == 2
    assert value(registry, "omni_edge_in_flight", "a -> b") == 2
    assert value(registry, "omni_chunk_age_seconds_sum", "a -> b") == 0.25


def test_binding_twice_counts_into_the_same_series(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.edge("a -> b").accepted()
    metrics.edge("a -> b").accepted()
    assert value(registry, "omni_edge_accepted_total", "a -> b") == 2


def test_the_share_of_windows_within_budget_is_exact(registry: CollectorRegistry, metrics: Metrics) -> None:
    windows = metrics.windows("door", ["mic"], ["llm"])
    windows.finished(latency_s=0.4)
    windows.finished(latency_s=WINDOW_BUDGET_S)
    windows.finished(latency_s=1.001, late_stage="llm")
    assert value(registry, "omni_window_seconds_bucket", "door", "1.0") == 2
    assert value(registry, "omni_windows_total", "door", "on_time") == 2
    assert value(registry, "omni_windows_total", "door", "late") == 1
    assert value(registry, "omni_window_late_total", "door", "llm") == 1


def test_a_reason_nobody_declared_counts_as_other(registry: CollectorRegistry, metrics: Metrics) -> None:
    bus = metrics.bus(["magic"])
    bus.invalid("magic")
    bus.invalid("whatever the peer likes")
    assert value(registry, "omni_bus_invalid_total", "magic") == 1
    assert value(registry, "omni_bus_invalid_total", "other") == 1


def test_cameras_beyond_the_limit_share_one_name(registry: CollectorRegistry, metrics: Metrics) -> None:
    for number in range(MAX_CAMERAS + 2):
        metrics.turns(f"camera-{number}").decided("speak")
    series = [labels for name, labels in exported(registry) if name == "omni_text_budget_tokens"]
    assert len(series) == MAX_CAMERAS + 1
    assert value(registry, "omni_decisions_total", "other", "speak") == 2


def test_a_camera_that_left_leaves_no_series_and_frees_its_place(registry: CollectorRegistry, metrics: Metrics) -> None:
    for number in range(MAX_CAMERAS):
        metrics.hold_camera(f"camera-{number}")
        metrics.camera(f"camera-{number}")
    metrics.release_camera("camera-7")
    metrics.camera("door").up(True)
    assert not [labels for _, labels in exported(registry) if "camera-7" in labels]
    assert value(registry, "omni_camera_up", "door") == 1


def test_a_cameras_series_stay_until_its_last_stage_lets_it_go(registry: CollectorRegistry, metrics: Metrics) -> None:
    for _ in range(2):
        metrics.hold_camera("door")
    metrics.playback("door").heard(1.5)
    metrics.release_camera("door")
    assert value(registry, "omni_speech_seconds_total", "door") == 1.5
    metrics.release_camera("door")
    assert not [labels for _, labels in exported(registry) if "door" in labels]


def test_the_shared_name_goes_with_the_last_who_had_it(registry: CollectorRegistry, metrics: Metrics) -> None:
    names = [f"camera-{number}" for number in range(MAX_CAMERAS + 2)]
    for name in names:
        metrics.hold_camera(name)
        metrics.turns(name)
    metrics.release_camera(names[-1])
    assert [labels for _, labels in exported(registry) if "other" in labels]
    metrics.release_camera(names[-2])
    assert not [labels for _, labels in exported(registry) if "other" in labels]


def test_an_unknown_metric_is_a_mistake_of_ours(metrics: Metrics) -> None:
    with pytest.raises(KeyError, match="omni_nonsense"):
        metrics.counter("omni_nonsense")


def test_the_exporter_serves_valid_exposition_with_the_process_itself(metrics: Metrics, server: MetricsServer) -> None:
    bind_everything(metrics)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
        families = {family.name for family in text_string_to_metric_families(answer.read().decode())}
    assert {"omni_edge_accepted", "omni_process_resident_memory_bytes", "omni_process_cpu_seconds"} <= families


def test_a_stopped_exporter_frees_its_port(registry: CollectorRegistry) -> None:
    first = serve_metrics(registry)
    first.stop()
    second = serve_metrics(registry, port=first.port)
    second.stop()
    assert second.port == first.port


def test_sixteen_cameras_stay_below_three_thousand_series(registry: CollectorRegistry, metrics: Metrics) -> None:
    for number in range(16):
        metrics.camera(f"camera-{number}")
        metrics.windows(f"camera-{number}", ["camera", "mic"], ["llm", "tts", "vocoder"])
        metrics.playback(f"camera-{number}")
        metrics.turns(f"camera-{number}")
    for number in range(8):
        metrics.edge(f"edge-{number}")
        metrics.stage(f"stage-{number}")
    assert len(exported(registry)) < 3000
