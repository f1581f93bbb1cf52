"""Every query of the dashboard, put to a real Prometheus that scrapes a real run."""

import math
from collections.abc import Iterator

import pytest

from tests.support.pipeline import Place
from tests.support.prometheus import OVERVIEW, DashboardQuery, PrometheusServer, dashboard_queries, running_prometheus

pytestmark = pytest.mark.ray

QUERIES = dashboard_queries(OVERVIEW)


@pytest.fixture(scope="module")
def prometheus(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """A run in which a listener barges in, and a Prometheus that has seen some windows of it."""
    started = place.run("up", "-d", "--camera", "door=test://pattern", "--barge-in", "6.5s")
    assert started.returncode == 0, started.stderr
    try:
        with running_prometheus(tmp_path_factory.mktemp("prometheus"), place.url()) as server:
            server.wait_for("sum(omni_windows_total) >= 8", timeout_s=300)
            yield server
    finally:
        place.run("down")


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.panel)
def test_every_query_of_the_dashboard_has_an_answer(prometheus: PrometheusServer, query: DashboardQuery) -> None:
    samples = prometheus.wait_for(query.expr, timeout_s=2)
    assert samples, query.expr


def test_the_run_is_seen_as_it_was(prometheus: PrometheusServer) -> None:
    (interrupted,) = prometheus.query("sum(omni_speech_interrupted_total)")
    (late,) = prometheus.query('sum(omni_edge_drops_total{reason="overflow"})')
    assert (interrupted.value, late.value) == (1, 0)
    assert not any(math.isnan(sample.value) for sample in prometheus.query("omni_playback_lead_seconds"))
    ready = prometheus.query('omni_replicas{state="ready"} == 1')
    assert {"camera", "vision_encoder", "llm", "vocoder", "speaker"} <= {sample.labels["stage"] for sample in ready}
    up = {sample.labels["instance"].removesuffix("/0") for sample in prometheus.query("up == 1")}
    assert up == {"coordinator", "media", "io", "vision_encoder", "audio_encoder", "llm", "tts", "vocoder"}
